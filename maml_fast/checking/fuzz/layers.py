"""What random networks are made of: everything that the fused core knows.

A layer is a function `(choices, sketch, x) -> value` and its row in the table for samples of so many dimensions. It may
raise `Unfit`, or leave it to PyTorch to refuse its lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import nn

from .choices import Choices
from .sketch import Sketch, Unfit, Value

Layer: TypeAlias = Callable[[Choices, Sketch, Value], Value]

WIDTHS = (3, 1, 2, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)
CHANNELS = (2, 1, 3, 4, 6, 8, 9, 16, 17)

_ACTIVATIONS = (
    "torch.tanh({x})", "F.relu({x})", "F.leaky_relu({x}, 0.2)", "F.elu({x}, 0.7)", "F.gelu({x})",
    'F.gelu({x}, approximate="tanh")', "F.silu({x})", "torch.sigmoid({x})", "F.softplus({x})",
    "F.softplus({x}, 3.0, 2.0)", "torch.sin({x})", "torch.sin(2.0 * {x})", "F.hardtanh({x}, -0.6, 0.8)", "F.relu6({x})",
    "F.hardswish({x})", "F.mish({x})", "F.selu({x})", "F.celu({x}, 0.5)", "F.logsigmoid({x})", "{x}.relu()",
    "{x}.tanh()", "{x}.sigmoid()", "{x}.sin()", "torch.relu({x})", "F.relu({x}, inplace=True)",
    "F.leaky_relu({x}, 0.1, inplace=True)",
)  # fmt: skip
_ACTIVATION_MODULES = (
    "nn.Tanh()", "nn.ReLU()", "nn.LeakyReLU(0.1)", "nn.ELU(1.3)", "nn.GELU()", 'nn.GELU("tanh")', "nn.SiLU()",
    "nn.Sigmoid()", "nn.Softplus()", "nn.Softplus(2.0, 5.0)", "Sine(2.0)", "nn.Hardtanh()", "nn.ReLU6()",
    "nn.Hardswish()", "nn.Mish()", "nn.SELU()", "nn.CELU(1.5)", "nn.LogSigmoid()", "nn.ReLU(inplace=True)",
    "nn.Identity()", "nn.Dropout(0.0)",
)  # fmt: skip
_ARITHMETIC = (
    "{x} * 0.5", "{x} + 0.25", "1.5 - {x}", "-{x}", "{x} / 3", "2 * {x} - 1", "{x}.mul(0.7).add(0.1)",
    "torch.add({x}, 1.0, alpha=0.5)", "{x}.sub(0.3)", "{x}.clone()", "{x}.contiguous()",
)  # fmt: skip


_FUNCTIONS = (
    "torch.exp(-{x}.abs())", "torch.sqrt({x} * {x} + 1)", "torch.log1p({x}.abs())", "{x} ** 2", "0.1 * {x} ** 3",
    "torch.cos({x})", "{x}.clamp(-0.7, 0.9)", "torch.rsqrt({x} ** 2 + 0.5)", "1 / (2 + torch.sin({x}))",
    "F.hardsigmoid({x})", "F.softsign({x})", "F.softshrink({x}, 0.3)", "F.hardshrink({x}, 0.2)", "F.tanhshrink({x})",
    "torch.where({x} > 0.1, {x}, 0.3 * {x} - 0.07)", "torch.erf({x})", "torch.maximum({x}, 0.4 * {x} - 0.1)",
    "torch.expm1({x}.clamp(max=2.0))", "{x} * ({x} > 0)", "({x} ** 2 + 0.3) ** 0.7", "torch.log({x} ** 2 + 1)",
)  # fmt: skip
_NOISE = (
    "F.dropout({x}, 0.3)", "F.alpha_dropout({x}, 0.2)", "{x} + 0.1 * torch.randn_like({x})",
    "{x} * (0.5 + torch.rand_like({x}))", "{x} * {x}.new_empty({x}.shape[:1] + (1,) * ({x}.ndim - 1)).bernoulli_(0.7)",
    "F.dropout1d({x}.unsqueeze(-1), 0.4).squeeze(-1)", "torch.bernoulli(torch.sigmoid({x})) * {x}",
)  # fmt: skip
_ROWWISE = (
    "torch.softmax({x}, {d})", "F.log_softmax({x}, {d})", "F.normalize({x}, dim={d})",
    "{x} - {x}.mean({d}, keepdim=True)", "{x} - torch.logsumexp({x}, {d}, keepdim=True)",
    "{x} / (1 + {x}.norm(dim={d}, keepdim=True))", "{x} * {x}.sum({d}, keepdim=True).tanh()",
    "{x} - {x}.max({d}, keepdim=True)[0]", "{x}.flip({d})", "{x}.roll(1, {d})", "{x}.cumsum({d})",
)  # fmt: skip
_REDUCED = (
    "{x}.sum({d})", "{x}.mean({d})", "{x}.max({d})[0]", "{x}.amax({d})", "torch.logsumexp({x}, {d})",
    "({x} ** 2 + 0.1).sum({d}).sqrt()", "{x}.select({d}, 0)", "{x}.min({d}).values",
)  # fmt: skip


def function(c: Choices, net: Sketch, x: Value) -> Value:
    """An expression of one operand."""
    return net.call(c.of(_FUNCTIONS).format(x=x.name))


def noise(c: Choices, net: Sketch, x: Value) -> Value:
    """Something random, of which every backend draws the same."""
    return net.call(c.of(_NOISE).format(x=x.name))


def gate(c: Choices, net: Sketch, x: Value) -> Value:
    """A function of two values of the same shape."""
    other = c.of([v for v in reversed(net.values) if v.shape == x.shape])
    line = c.of(("{x} * torch.sigmoid({y})", "{x} * {y}", "{x} / (1 + {y} ** 2)", "torch.minimum({x}, {y})"))
    return net.call(line.format(x=x.name, y=other.name))


def scale(c: Choices, net: Sketch, x: Value) -> Value:
    """With a parameter that is broadcast."""
    shape = tuple(n if c.of((True, False)) else 1 for n in x.shape[c.of(range(len(x.shape))) :])
    parameter = net.layer(f"nn.Parameter(0.5 + 0.3 * torch.randn({shape}))")
    line = c.of(("{x} * {p}", "{x} + {p}", "{x} * torch.exp({p}) - {p}", "torch.tanh({x} * {p})"))
    return net.call(line.format(x=x.name, p=parameter))


def computed_weight(c: Choices, net: Sketch, x: Value) -> Value:
    """A product with a matrix that is no layer's."""
    wide = c.of(WIDTHS)
    matrix = net.layer(f"nn.Parameter(0.5 * torch.randn({x.shape[-1]}, {wide}))")
    line = c.of(("{x} @ {m}", "{x} @ (1.5 * torch.tanh({m}))", "F.linear({x}, F.normalize({m}.t(), dim=1))"))
    return net.call(line.format(x=x.name, m=matrix))


def rowwise(c: Choices, net: Sketch, x: Value) -> Value:
    """Over one dimension, which stays."""
    return net.call(c.of(_ROWWISE).format(x=x.name, d=c.of(range(1, len(x.shape) + 1))))


def reduction(c: Choices, net: Sketch, x: Value) -> Value:
    """Over one dimension, which goes."""
    if len(x.shape) < 2:
        raise Unfit("no dimension to spare")
    return net.call(c.of(_REDUCED).format(x=x.name, d=c.of(range(1, len(x.shape) + 1))))


def arrangement(c: Choices, net: Sketch, x: Value) -> Value:
    """A slice, a padding, a permutation."""
    d = c.of(range(len(x.shape)))
    cut = f"{x.name}[{':, ' * (d + 1)}{c.of((0, 1))}:{max(2, x.shape[d] - c.of((0, 1)))}]"
    if len(x.shape) == 1:
        return net.call(c.of((cut, f"F.pad({x.name}, (1, 2))", f"{x.name}.repeat(1, 2)", f"{x.name}[:, ::2]")))
    swap = f"{x.name}.transpose({len(x.shape) - 1}, {len(x.shape)})"
    return net.call(c.of((cut, swap, swap, f"F.pad({x.name}, (1, 0))", f"{x.name}.movedim(1, -1)")))


def attention(c: Choices, net: Sketch, x: Value) -> Value:
    """Of rows to each other."""
    y = x.name
    line = c.of((f"torch.softmax({y} @ {y}.transpose(-1, -2) / 2, -1) @ {y}", f"{y} @ {y}.transpose(-1, -2)"))
    if math.prod(x.shape) > 300 or x.shape[-2] > 12:
        raise Unfit("large enough")
    return net.call(line)


def activation(c: Choices, net: Sketch, x: Value) -> Value:
    """A function or a module."""
    if c.of((False, True)):
        return net.apply(net.layer(c.of(_ACTIVATION_MODULES)), x)
    return net.call(c.of(_ACTIVATIONS).format(x=x.name))


def arithmetic(c: Choices, net: Sketch, x: Value) -> Value:
    """With constants."""
    return net.call(c.of(_ARITHMETIC).format(x=x.name))


def linear(c: Choices, net: Sketch, x: Value) -> Value:
    """Over the last dimension."""
    square = (x.shape[-1],) * 4  # fits shortcuts and shared weights
    layer = net.layer(f"nn.Linear({x.shape[-1]}, {c.of((*WIDTHS, *square))}, bias={not c.once_in(3)})")
    if not c.once_in(4):
        return net.apply(layer, x)
    return net.call(f"F.linear({x.name}, {layer}.weight, {layer}.bias)")


def convolution(c: Choices, net: Sketch, x: Value) -> Value:
    """Strided, padded, dilated and grouped by chance."""
    channels, *space = x.shape
    groups = c.of([g for g in (1, 1, 2, 3, channels) if channels % g == 0])
    out = groups * c.of((1, 2, 3) if groups > 1 else (*CHANNELS, channels, channels))
    if c.once_in(6):
        kernel = str(tuple(c.of([k for k in (3, 1, 5) if k <= max(n, 1)]) for n in space))
        window = f'{kernel}, padding="{c.of(("same", "valid"))}"'
    else:
        window = _windows(c, space, dilations=(1, 1, 2))
    dims = len(space)
    layer = net.layer(f"nn.Conv{dims}d({channels}, {out}, {window}, groups={groups}, bias={not c.once_in(3)})")
    return net.apply(layer, x)


def _windows(c: Choices, space: Sequence[int], dilations: Sequence[int] = (1,), pool: bool = False) -> str:
    """Kernel, stride, padding and dilation that fit, as arguments."""
    rows = []
    for n in space:
        dilation, padding = c.of(dilations), c.of((0, 1, 2))
        fitting = (n + 2 * padding - 1) // dilation + 1
        kernel = c.of([k for k in ((2, 1, 3, 4) if pool else (3, 1, 2, 4, 5)) if k <= fitting] or [1])
        if pool:  # PyTorch itself writes beyond its memory for a dilated window of nothing but padding
            padding = min(padding, kernel // 2) if n >= dilation else 0
        rows.append((kernel, c.of((1, 2, 3)), padding, dilation))
    kernel_, stride, padding_, dilation_ = (tuple(column) for column in zip(*rows, strict=True))
    last = f", dilation={dilation_}" if len(dilations) > 1 else ""
    return f"{kernel_}, stride={stride}, padding={padding_}{last}"


def max_pool(c: Choices, net: Sketch, x: Value) -> Value:
    space = x.shape[1:]
    ceil = ", ceil_mode=True" if c.once_in(4) else ""
    arguments = _windows(c, space, dilations=(1, 1, 2), pool=True) + ceil
    if c.once_in(3):
        return net.call(f"F.max_pool{len(space)}d({x.name}, {arguments})")
    return net.apply(net.layer(f"nn.MaxPool{len(space)}d({arguments})"), x)


def average_pool(c: Choices, net: Sketch, x: Value) -> Value:
    space = x.shape[1:]
    ceil = ", ceil_mode=True" if c.once_in(4) else ""
    arguments = _windows(c, space, pool=True) + f", count_include_pad={c.of((True, False))}" + ceil
    if c.once_in(3):
        return net.call(f"F.avg_pool{len(space)}d({x.name}, {arguments})")
    return net.apply(net.layer(f"nn.AvgPool{len(space)}d({arguments})"), x)


def adaptive_pool(c: Choices, net: Sketch, x: Value) -> Value:
    space = x.shape[1:]
    sizes = tuple(c.of([1, n, *(d for d in range(2, n) if n % d == 0)]) for n in space)
    return net.apply(net.layer(f"nn.AdaptiveAvgPool{len(space)}d({sizes})"), x)


def mean_over_space(c: Choices, net: Sketch, x: Value) -> Value:
    dims = tuple(range(2, len(x.shape) + 1))
    return net.call(f"{x.name}.mean({dims}, {c.of((False, True))})")


def upsample(c: Choices, net: Sketch, x: Value) -> Value:
    if math.prod(x.shape) > 300:
        raise Unfit("large enough")
    factors = tuple(c.of((1, 2, 3)) for _ in x.shape[1:])
    if c.once_in(3):
        size = tuple(n * f for n, f in zip(x.shape[1:], factors, strict=True))
        return net.call(f"F.interpolate({x.name}, size={size})")
    return net.apply(net.layer(f"nn.Upsample(scale_factor={factors})"), x)


def batch_norm(c: Choices, net: Sketch, x: Value) -> Value:
    dims = 2 if len(x.shape) == 3 else 1
    options = c.of(("", ", affine=False", ", track_running_stats=False", ", eps=0.1", ", momentum=None"))
    layer = net.layer(f"nn.BatchNorm{dims}d({x.shape[0]}{options})")
    if not options and c.once_in(4):
        statistics = f"{layer}.running_mean, {layer}.running_var"
        return net.call(f"F.batch_norm({x.name}, {statistics}, {layer}.weight, {layer}.bias, training=True)")
    return net.apply(layer, x)


def layer_norm(c: Choices, net: Sketch, x: Value) -> Value:
    shape = list(x.shape[-c.of(range(1, len(x.shape) + 1)) :])
    if c.once_in(4):
        return net.call(f"F.layer_norm({x.name}, {shape})")
    return net.apply(net.layer(f"nn.LayerNorm({shape}{c.of(('', ', elementwise_affine=False', ', bias=False'))})"), x)


def group_norm(c: Choices, net: Sketch, x: Value) -> Value:
    groups = c.of([g for g in (1, 2, 3, x.shape[0]) if x.shape[0] % g == 0])
    return net.apply(net.layer(f"nn.GroupNorm({groups}, {x.shape[0]}{c.of(('', ', affine=False', ', eps=0.01'))})"), x)


def instance_norm(c: Choices, net: Sketch, x: Value) -> Value:
    options = c.of(("", ", affine=True", ", affine=True, track_running_stats=True"))
    return net.apply(net.layer(f"nn.InstanceNorm{len(x.shape) - 1}d({x.shape[0]}{options})"), x)


def shortcut(c: Choices, net: Sketch, x: Value) -> Value:
    """Adds or subtracts an earlier value of the same shape."""
    others = [v for v in reversed(net.values) if v.shape == x.shape]
    line = c.of(("{x} + {y}", "{y} - {x}", "torch.add({x}, {y}, alpha=0.5)", "torch.sub({x}, {y}, alpha=2)"))
    return net.call(line.format(x=x.name, y=c.of(others).name))


def concatenation(c: Choices, net: Sketch, x: Value) -> Value:
    """With up to two earlier values, along any dimension."""
    axis = c.of(range(len(x.shape)))
    rest = x.shape[:axis] + x.shape[axis + 1 :]
    others = [v for v in reversed(net.values) if v.shape[:axis] + v.shape[axis + 1 :] == rest]
    others = [v for v in others if len(v.shape) == len(x.shape) and math.prod(v.shape) < 300]
    if not others or math.prod(x.shape) > 300:
        raise Unfit("nothing to concatenate")
    names = [x.name, *[c.of(others).name for _ in range(c.of((1, 2)))]]
    return net.call(f"torch.cat([{', '.join(names)}], {axis + 1})")


def reshape(c: Choices, net: Sketch, x: Value) -> Value:
    """To any shape of up to three dimensions."""
    size = math.prod(x.shape)
    first = c.of([d for d in range(1, size + 1) if size % d == 0])
    second = c.of([d for d in range(1, size // first + 1) if size // first % d == 0])
    shape = c.of(((size,), (first, size // first), (first, second, size // first // second)))
    forms = [f"{x.name}.reshape(-1, {str(shape)[1:-1].rstrip(',')})", f"{x.name}.reshape({x.name}.shape[0], *{shape})"]
    if len(x.shape) == 1 and len(shape) > 1:
        forms.append(f"{x.name}.unflatten(1, {shape})")
    return net.call(c.of(forms))


def flatten(c: Choices, net: Sketch, x: Value) -> Value:
    start = c.of(range(1, len(x.shape) + 1))
    if c.of((False, True)):
        return net.call(f"torch.flatten({x.name}, {start})")
    return net.apply(net.layer(f"nn.Flatten({start})"), x)


def squeezing(c: Choices, net: Sketch, x: Value) -> Value:
    """Adds a dimension of one element, or removes one."""
    ones = [d for d, n in enumerate(x.shape, 1) if n == 1]
    if ones and len(x.shape) > 1:
        return net.call(f"{x.name}.squeeze({c.of(ones)})")
    return net.call(f"{x.name}.unsqueeze({c.of(range(1, len(x.shape) + 2))})")


def again(c: Choices, net: Sketch, x: Value) -> Value:
    """Calls an earlier layer once more."""
    fitting = [layer for layer, shape in net.layers.items() if shape == x.shape and _has_weight(net.module(layer))]
    if not fitting:
        raise Unfit("no layer fits")
    return net.apply(c.of(fitting), x)


def tied(c: Choices, net: Sketch, x: Value) -> Value:
    """A new linear layer with the weight of an earlier one."""
    fitting = [layer for layer in net.layers if _same_features(net.module(layer), x.shape[-1])]
    if not fitting:
        raise Unfit("no weight fits")
    source = c.of(fitting)
    wide = net.module(source).out_features
    layer = net.layer(f"nn.Linear({x.shape[-1]}, {wide})")
    net.inits.append(f"{layer}.weight = {source}.weight")
    return net.apply(layer, x)


def _has_weight(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _same_features(module: nn.Module, features: int) -> bool:
    return isinstance(module, nn.Linear) and module.in_features == features


_ANYWHERE: tuple[Layer, ...] = (
    activation, activation, arithmetic, shortcut, concatenation, reshape, again, squeezing,
    function, gate, scale, rowwise, arrangement, computed_weight, noise,
)  # fmt: skip

LAYERS: dict[int, tuple[Layer, ...]] = {
    1: (linear, linear, linear, tied, tied, batch_norm, layer_norm, *_ANYWHERE),
    2: (
        linear, convolution, convolution, max_pool, average_pool, adaptive_pool, mean_over_space, upsample, batch_norm,
        layer_norm, group_norm, instance_norm, flatten, reduction, attention, *_ANYWHERE,
    ),
    3: (
        convolution, convolution, convolution, convolution, max_pool, max_pool, average_pool, adaptive_pool,
        mean_over_space, upsample, batch_norm, layer_norm, group_norm, instance_norm, flatten, linear, reduction,
        attention, *_ANYWHERE,
    ),
}  # fmt: skip
"""By the number of a sample's dimensions; twice what should come twice as often."""
