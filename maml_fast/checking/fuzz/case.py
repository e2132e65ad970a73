"""From choices to a script: a network, a meta-batch and the settings of `MAML`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .choices import Choices
from .layers import CHANNELS, LAYERS, WIDTHS
from .sketch import Sketch, Unfit, Value

_MOST_LINES = 10
_MOST_FEATURES = 1200  # of a value, to keep the textbook quick

_SCRIPT = '''"""{title}"""

import os

{environment}
import torch
import torch.nn.functional as F
from torch import nn

import maml_fast as mf
from maml_fast.nn import Sine


{network}


def make_case():
{place}    torch.manual_seed({seed})
    model = Net()
{changes}
{data}
    return {{{arguments}}}


if __name__ == "__main__":
    report = mf.verify(**make_case())
    print(report)
    raise SystemExit(not report.ok)
'''


@dataclass(frozen=True)
class Script:
    """A case as text, and what it needs of the process.

    Attributes:
        text: defines `make_case()`, and run by itself prints a report.
        isa: the instruction set that MAML_FAST_ISA must name while it runs; empty for the widest.
    """

    text: str
    isa: str


def draw(c: Choices, isas: Sequence[str], title: str, device: str = "cpu") -> Script:
    """Make a case by these choices.

    Args:
        isas: instruction sets of the CPU to choose from. device: where the case's tensors are.
    """
    net, output = _network(c)
    loss, labels, binary = _loss(c, output.shape)
    data = _Data(c, net.values[0].shape)
    isa = c.of(["", *isas])
    names = _parameters(net)
    changes = [*_frozen(c, names), *_layouts(c, net), *_numbers(), *_modes(c)]
    dtype = c.of(("float32", "float64"))
    adapts = f"[{', '.join(repr(name) for name in names if c.once_in(2))}]" if c.once_in(4) else "None"
    changes.append(f"adapts = {adapts}")
    arguments = {
        "model": f"model.to(torch.{dtype})",
        **data.arguments(dtype, output.shape, labels, binary),
        "lr": _rate(c, dtype),
        "adapts": "adapts",
        "loss": loss,
        "steps": str(c.of((1, 0, 2, 3))),
        "first_order": str(c.of((False, True))),
        "allow_unused": "True",
        **_options(c),
    }
    text = _SCRIPT.format(
        title=title,
        environment=f'os.environ["MAML_FAST_ISA"] = "{isa}"\n' if isa else "",
        network=net.source(output),
        place=f'    torch.set_default_device("{device}")\n' if device != "cpu" else "",
        seed=c.of(range(100)),
        changes=_indented(changes),
        data=_indented(data.lines),
        arguments="\n" + "".join(f'        "{name}": {value},\n' for name, value in arguments.items()) + "    ",
    )
    return Script(text, isa)


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _network(c: Choices) -> tuple[Sketch, Value]:
    dims = c.of((1, 3, 2))
    if dims == 1:
        net = Sketch((c.of(WIDTHS),))
    else:
        net = Sketch((c.of(CHANNELS), *[c.of((4, 1, 2, 3, 5, 6, 7, 9)) for _ in range(dims - 1)]))
    x, more = net.values[0], True
    while more and len(net.lines) < _MOST_LINES:
        with c.span():
            more = c.of(range(7)) > 0
            x = _next(c, net, x) if more else x
    if c.of((True, False)):
        x = x if len(x.shape) == 1 else net.call(f"{x.name}.flatten(1)")
        x = net.apply(net.layer(f"nn.Linear({x.shape[0]}, {c.of((2, 1, 3, 5, 17))})"), x)
    elif not any(_has_parameters(net.module(f"self.{line.split()[0][5:]}")) for line in net.inits if " = " in line):
        x = net.apply(net.layer(f"nn.Linear({x.shape[-1]}, 2)"), x)
    return net, x


def _next(c: Choices, net: Sketch, x: Value) -> Value:
    """The value after a further layer, or now and then an earlier one."""
    with suppress(Unfit):
        new = c.of(LAYERS[len(x.shape)])(c, net, x)
        x = new if len(new.shape) in LAYERS and math.prod(new.shape) <= _MOST_FEATURES else x
    if c.once_in(5):
        x = c.of([v for v in reversed(net.values) if len(v.shape) in LAYERS])
    return x


def _has_parameters(held: nn.Module | Tensor) -> bool:
    return isinstance(held, Tensor) or any(True for _ in held.parameters())


def _names_of(owner: str, held: Any) -> list[str]:
    """Of a layer's parameters, or of a parameter of the network itself."""
    return [owner] if isinstance(held, Tensor) else [f"{owner}.{name}" for name, _ in held.named_parameters()]


def _parameters(net: Sketch) -> list[str]:
    """Names of the parameters; a tied weight has that of its first owner."""
    owners = [f"l{i}" for i in range(len(net.inits)) if hasattr(net._self, f"l{i}")]
    gone = {line.split(" = ")[0][5:] for line in net.inits if line.split(" = ")[0].endswith(".weight")}
    names = [name for owner in owners for name in _names_of(owner, net.module(f"self.{owner}"))]
    return [name for name in names if name not in gone]


_OWN_LOSSES = (
    "F.mse_loss(z, y) + 0.1 * z.square().mean()",
    "((z - y) ** 2).sum() / len(y)",
    "torch.log(torch.cosh(z - y)).mean()",
    "F.smooth_l1_loss(z, y) - 0.2 * F.l1_loss(z, y.tanh())",
    "((z - y) ** 2 * (y > 0)).mean()",
    "1 - F.cosine_similarity(z, y).mean()",
    "(z.exp().clamp(max=5.0) - y * z).mean()",
)
_OWN_CLASS_LOSSES = (
    "-z.log_softmax(-1).gather(1, y[:, None]).mean()",
    "F.cross_entropy(z, y) + 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()",
)


def _loss(c: Choices, shape: tuple[int, ...]) -> tuple[str, bool, bool]:
    """The loss as an expression; whether its targets are labels, or zeros and ones."""
    losses = ['"mse"', "nn.MSELoss()", '"bce_with_logits"', '"l1"', '"huber"', "nn.HuberLoss(delta=0.3)", "F.l1_loss"]
    classes = ['"cross_entropy"', "nn.CrossEntropyLoss(label_smoothing=0.2)", "F.cross_entropy"]
    losses += [f"lambda z, y: {own}" for own in _OWN_LOSSES]
    classes += [f"lambda z, y: {own}" for own in _OWN_CLASS_LOSSES]
    loss = c.of([*losses, *classes] if len(shape) == 1 else losses)
    return loss, loss in classes, "bce" in loss


class _Data:
    """The lines that make the meta-batch."""

    def __init__(self, c: Choices, in_shape: tuple[int, ...]) -> None:
        self._in_shape = in_shape
        self._tasks = c.of((1, 2, 3, 4, 7, 9))
        self._samples = {"s": c.of((3, 1, 2, 4, 5, 8, 9, 17)), "q": c.of((3, 1, 2, 4, 5, 8, 9, 16))}
        self._layouts = {half: c.of(_LAYOUTS) for half in "sq"}
        self._numbers = c.of(("{}", "{}", "{}", "{}", "{}", "{}", "{}.round()", "{}.relu()", "3 * {}"))
        self.lines: list[str] = []

    def arguments(self, dtype: str, out_shape: tuple[int, ...], labels: bool, binary: bool) -> dict[str, str]:
        """The names of the four tensors, whose lines are added."""
        cast = "" if dtype == "float32" else ".double()"
        for half, samples in self._samples.items():
            shape = (self._tasks, samples, *self._in_shape)
            self.lines.append(f"x = {self._numbers.format(f'torch.randn({shape})')}{cast}")
            self.lines.append(f"x_{half} = {self._layouts[half]}")
            leading = (self._tasks, samples)
            if labels:
                y = f"torch.randint({out_shape[0]}, {leading})"
            else:
                y = f"torch.randn({(*leading, *out_shape)})"
                y = f"({y} > 0).float(){cast}" if binary else y + cast
            self.lines.append(f"y_{half} = {y}")
        return {name: name for name in ("x_s", "y_s", "x_q", "y_q")}


_LAYOUTS = (
    "x",
    "x",
    "x",
    "x.transpose(0, 1).contiguous().transpose(0, 1)",
    "x.transpose(1, -1).contiguous().transpose(1, -1)",
    "torch.stack([x, x + 1], -1)[..., 0]",
    "torch.cat([x, x], 1)[:, ::2]",
    "x[:1].expand_as(x)",
    "torch.cat([x.flatten(), x.flatten()])[1 : 1 + x.numel()].view(x.shape)",
    "torch._neg_view(-x)",
)
"""The same shape, laid out in memory in other ways."""


def _frozen(c: Choices, names: Sequence[str]) -> list[str]:
    if not c.once_in(4):
        return []
    frozen = [name for name in names if c.once_in(3)][: len(names) - 1]
    return [f"model.get_parameter({name!r}).requires_grad_(False)" for name in frozen]


def _layouts(c: Choices, net: Sketch) -> list[str]:
    """Weights that are not contiguous."""
    if not c.once_in(5):
        return []
    lines = []
    for i in range(len(net.inits)):
        module = getattr(net._self, f"l{i}", None)
        if isinstance(module, nn.Conv2d):
            lines.append(f"model.l{i} = model.l{i}.to(memory_format=torch.channels_last)")
        elif isinstance(module, nn.Linear):
            lines.append(f"model.l{i}.weight.data = model.l{i}.weight.data.t().contiguous().t()")
    return lines


def _numbers() -> list[str]:
    """Norms start as identities; other scales, shifts and statistics show more mistakes."""
    return [
        "with torch.no_grad():",
        "    for p in model.parameters():",
        "        if p.dim() == 1:",
        "            p.add_(torch.randn_like(p), alpha=0.2)",
        "    for name, b in model.named_buffers():",
        "        if b.is_floating_point():",
        "            b.add_(torch.rand_like(b) - 0.4)",
    ]


def _modes(c: Choices) -> list[str]:
    return ["model.eval()"] if c.once_in(4) else []


def _rate(c: Choices, dtype: str) -> str:
    moving = "if p.requires_grad and (adapts is None or n in adapts)"
    named = f"for n, p in model.named_parameters() {moving}"
    like = f"dtype=torch.{dtype}"
    return c.of(
        (
            "0.05",
            "0.3",
            f"nn.Parameter(torch.tensor(0.1, {like}))",
            f"torch.tensor(0.1, {like})",
            f"{{n: nn.Parameter(0.1 * torch.rand((), {like})) {named}}}",
            f"{{n: nn.Parameter(0.1 * torch.rand(p.shape, {like})) {named}}}",
            f"{{n: nn.Parameter(0.1 * torch.rand(p.shape if i % 2 else (), {like})) for i, (n, p) in "
            f"enumerate(model.named_parameters()) {moving}}}",
            f"{{n: 0.1 if p.dim() == 1 else nn.Parameter(torch.full_like(p, 0.05, {like})) {named}}}",
        )
    )


def _options(c: Choices) -> dict[str, str]:
    options = {}
    if c.once_in(4):
        options["tape_bytes"] = "0"
    threads = c.of((None, 1, 2, 3))
    if threads is not None:
        options["threads"] = str(threads)
    return options
