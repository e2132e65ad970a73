"""From `nn.Module` to `Graph`: the only file that knows PyTorch's modules and functions.

A layer is one emitter below and its rows in the tables at the end.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .graph import Graph, Op, Shape
from .nn import Sine

_SAMPLES = 1031  # stands for the number of samples: a prime that no layer has as a dimension


class Untraceable(Exception):
    """The module does something that no fused kernel knows; the message says what."""


class Value:
    """A traced tensor (samples, *shape)."""

    def __init__(self, index: int, shape: Shape) -> None:
        self.index = index
        self.shape = shape


def trace(module: nn.Module, in_shape: Shape) -> tuple[Graph | None, list[str]]:
    """The module's graph for samples of shape `in_shape`, or the reasons why there is none."""
    try:
        return _Tracer(module, in_shape).graph(), []
    except Untraceable as error:
        return None, [str(error)]


class _LeafTracer(fx.Tracer):
    """Symbolic tracing that stops at the modules of the table."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in MODULES or super().is_leaf_module(m, module_qualified_name)


class _Tracer:
    """Interprets an fx graph over `Value`s, collecting operations."""

    def __init__(self, module: nn.Module, in_shape: Shape) -> None:
        _refuse_hooks(module)
        self.module = module
        self.indices = {id(p): i for i, p in enumerate(module.parameters())}
        self.buffers = {id(b): name for name, b in module.named_buffers()}
        self.ops: list[Op] = []
        self.shapes: list[Shape] = [in_shape]

    def graph(self) -> Graph:
        results: dict[fx.Node, Any] = {}
        for node in self._fx_graph().nodes:
            if node.op == "placeholder":
                if results:
                    raise Untraceable(f"forward takes more than one input ({node.target!r})")
                results[node] = Value(0, self.shapes[0])
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), results.__getitem__)
            if node.op == "output":
                if not isinstance(args[0], Value):
                    raise Untraceable("forward does not return a single tensor")
                return Graph(tuple(self.ops), tuple(self.shapes), args[0].index)
            results[node] = self._node(node, args, kwargs)
        raise Untraceable("forward returns nothing")

    def _fx_graph(self) -> fx.Graph:
        if type(self.module) in MODULES:
            graph = fx.Graph()
            x = graph.placeholder("x")
            graph.output(graph.call_module("", (x,)))
            return graph
        try:
            return _LeafTracer().trace(self.module)
        except Exception as error:  # whatever the user's forward raises under tracing is the reason
            raise Untraceable(f"torch.fx cannot trace forward: {str(error).strip().splitlines()[0]}") from error

    def _node(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.module)
        if node.op == "call_module":
            layer = self.module.get_submodule(str(node.target))
            emit = MODULES.get(type(layer))
            if emit is None:
                raise Untraceable(f"layer {node.target!r} is a {type(layer).__name__}, which has no fused kernel")
            return emit(self, layer, *args, **kwargs)
        table: dict[Any, Callable[..., Any]] = FUNCTIONS if node.op == "call_function" else METHODS
        function = table.get(node.target)
        if function is None:
            name = getattr(node.target, "__name__", node.target)
            raise Untraceable(f"forward calls {name}, which has no fused kernel")
        try:
            return function(self, *args, **kwargs)
        except TypeError as error:
            raise Untraceable(f"forward calls {node.target} with unsupported arguments ({error})") from error

    # ---- what the emitters use -----------------------------------------------------------------

    def emit(
        self,
        kind: str,
        inputs: Sequence[Value],
        shape: Shape,
        parameters: Sequence[Tensor | None] = (),
        constants: Sequence[Tensor] = (),
        /,
        **attributes: float,
    ) -> Value:
        output = Value(len(self.shapes), shape)
        self.shapes.append(shape)
        self.ops.append(
            Op(
                kind,
                tuple(v.index for v in inputs),
                output.index,
                tuple(None if p is None else self._parameter(p, kind) for p in parameters),
                attributes,
                tuple(self._buffer(b, kind) for b in constants),
            )
        )
        return output

    def _parameter(self, tensor: Tensor, kind: str) -> int:
        if id(tensor) not in self.indices:
            raise Untraceable(f"{kind} has a weight that is not a parameter of the model")
        return self.indices[id(tensor)]

    def _buffer(self, tensor: Tensor, kind: str) -> str:
        if id(tensor) not in self.buffers:
            raise Untraceable(f"{kind} reads a tensor that is not a buffer of the model")
        return self.buffers[id(tensor)]


def _refuse_hooks(module: nn.Module) -> None:
    for name, m in module.named_modules():
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            raise Untraceable(f"layer {name!r} has hooks, which fused kernels would not call")


def _value(x: Any, what: str) -> Value:
    if not isinstance(x, Value):
        raise Untraceable(f"{what} is applied to something that is not an activation")
    return x


# ---- emitters: one a layer ---------------------------------------------------------------------


def _linear(t: _Tracer, x: Any, weight: Tensor, bias: Tensor | None = None) -> Value:
    x = _value(x, "linear")
    if not x.shape:
        raise Untraceable("linear is applied to samples without a feature dimension")
    if x.shape[-1] != weight.shape[1]:
        raise Untraceable(f"linear expects {weight.shape[1]} features, got {x.shape[-1]}")
    return t.emit("linear", [x], (*x.shape[:-1], weight.shape[0]), [weight, bias])


def _batch_norm(t: _Tracer, layer: nn.BatchNorm1d, x: Any) -> Value:
    x = _value(x, "BatchNorm1d")
    if len(x.shape) not in (1, 2) or x.shape[0] != layer.num_features:
        raise Untraceable(f"BatchNorm1d({layer.num_features}) is applied to samples of shape {x.shape}")
    mean, variance = layer.running_mean, layer.running_var
    affine = [layer.weight, layer.bias]
    if layer.training or mean is None or variance is None:
        return t.emit("batch_norm", [x], x.shape, affine, eps=layer.eps)
    return t.emit("running_norm", [x], x.shape, affine, [mean, variance], eps=layer.eps)


def _layer_norm(
    t: _Tracer,
    x: Any,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Value:
    x, size = _value(x, "layer_norm"), tuple(shape)
    if x.shape[len(x.shape) - len(size) :] != size:
        raise Untraceable(f"layer_norm over {size} is applied to samples of shape {x.shape}")
    return t.emit("layer_norm", [x], x.shape, [weight, bias], eps=eps, size=math.prod(size))


def _activation(t: _Tracer, kind: str, x: Any, **attributes: float) -> Value:
    x = _value(x, kind)
    return t.emit(kind, [x], x.shape, **attributes)


def _gelu(t: _Tracer, x: Any, approximate: str = "none") -> Value:
    return _activation(t, "gelu_tanh" if approximate == "tanh" else "gelu", x)


def _dropout(t: _Tracer, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    if training and p > 0:
        raise Untraceable("dropout is random in training mode; call eval() or set p=0")
    return _value(x, "dropout")


def _scale(t: _Tracer, x: Any, factor: float = 1.0, shift: float = 0.0) -> Value:
    x = _value(x, "arithmetic")
    return t.emit("affine", [x], x.shape, factor=float(factor), shift=float(shift))


def _sum(t: _Tracer, a: Any, b: Any, alpha: float = 1.0) -> Value:
    """a + alpha · b for values and numbers."""
    if isinstance(a, Value) and isinstance(b, Value):
        if a.shape != b.shape:
            raise Untraceable(f"sum of values of shapes {a.shape} and {b.shape}: broadcasting has no fused kernel")
        return t.emit("add", [a, b], a.shape, alpha=float(alpha))
    if isinstance(b, int | float):
        return _scale(t, a, shift=alpha * b)
    if isinstance(a, int | float):
        return _scale(t, b, alpha, shift=a)
    raise Untraceable("a parameter or tensor is added to an activation, which has no fused kernel")


def _difference(t: _Tracer, a: Any, b: Any, alpha: float = 1.0) -> Value:
    return _sum(t, a, b, -alpha)


def _product(t: _Tracer, a: Any, b: Any) -> Value:
    if isinstance(b, int | float):
        return _scale(t, a, b)
    if isinstance(a, int | float):
        return _scale(t, b, a)
    raise Untraceable("an activation is multiplied by a tensor, which has no fused kernel")


def _quotient(t: _Tracer, a: Any, b: Any) -> Value:
    if not isinstance(b, int | float):
        raise Untraceable("division by a tensor has no fused kernel")
    return _scale(t, a, 1.0 / b)


def _sine(t: _Tracer, x: Any) -> Value:
    """sin(w0 · x): folds a preceding multiplication by a constant."""
    x = _value(x, "sin")
    last = t.ops[-1] if t.ops else None
    if last is not None and last.kind == "affine" and last.output == x.index and last.attributes["shift"] == 0.0:
        source = Value(last.inputs[0], t.shapes[last.inputs[0]])
        return _activation(t, "sine", source, w0=last.attributes["factor"])
    return _activation(t, "sine", x, w0=1.0)


def _cat(t: _Tracer, values: Sequence[Any], dim: int = 0) -> Value:
    parts = [_value(v, "cat") for v in values]
    rank = len(parts[0].shape) + 1
    axis = dim % rank - 1
    if axis < 0:
        raise Untraceable("cat over the sample dimension has no fused kernel")
    shapes = [list(p.shape) for p in parts]
    if any(len(s) + 1 != rank or s[:axis] + s[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for s in shapes):
        raise Untraceable(f"cat of shapes {[p.shape for p in parts]}")
    shape = (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])
    return t.emit("cat", parts, shape, outer=math.prod(shape[:axis]))


def _reshape(t: _Tracer, x: Any, *sizes: Any) -> Value:
    x = _value(x, "reshape")
    size = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list | torch.Size) else list(sizes)
    total = _SAMPLES * math.prod(x.shape)
    if size.count(-1) == 1:
        known = -math.prod(size)
        size[size.index(-1)] = total // known if known else 0
    if not size or size[0] != _SAMPLES or math.prod(size) != total:
        raise Untraceable(f"reshape of samples {x.shape} to {tuple(size)} does not keep the sample dimension first")
    return t.emit("reshape", [x], tuple(size[1:]))


def _flatten(t: _Tracer, x: Any, start_dim: int = 0, end_dim: int = -1) -> Value:
    x = _value(x, "flatten")
    full = (_SAMPLES, *x.shape)
    start, end = start_dim % len(full), end_dim % len(full)
    return _reshape(t, x, (*full[:start], math.prod(full[start : end + 1]), *full[end + 1 :]))


def _size(t: _Tracer, x: Any, dim: int | None = None) -> Any:
    full = (_SAMPLES, *_value(x, "size").shape)
    return full if dim is None else full[dim]


def _getattr(t: _Tracer, x: Any, name: str) -> Any:
    if isinstance(x, Value) and name == "shape":
        return _size(t, x)
    raise Untraceable(f"forward reads attribute {name!r}, which has no fused kernel")


def _getitem(t: _Tracer, x: Any, index: Any) -> Any:
    if isinstance(x, Value):
        raise Untraceable("indexing an activation has no fused kernel")
    return x[index]


def _unary(kind: str, **defaults: float) -> Callable[..., Value]:
    """An emitter for an activation function whose arguments after x are `defaults`, in order."""

    def emit(t: _Tracer, x: Any, *args: float, inplace: bool = False, **kwargs: float) -> Value:
        given = dict(zip(defaults, args, strict=False)) | kwargs
        return _activation(t, kind, x, **{name: float(given.get(name, d)) for name, d in defaults.items()})

    return emit


_relu = _unary("relu")
_leaky_relu = _unary("leaky_relu", negative_slope=0.01)
_elu = _unary("elu", alpha=1.0)
_silu = _unary("silu")
_tanh = _unary("tanh")
_sigmoid = _unary("sigmoid")
_softplus = _unary("softplus", beta=1.0, threshold=20.0)


# ---- the tables: where PyTorch's names meet the emitters ---------------------------------------

MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: lambda t, m, x: _linear(t, x, m.weight, m.bias),
    nn.BatchNorm1d: _batch_norm,
    nn.LayerNorm: lambda t, m, x: _layer_norm(t, x, m.normalized_shape, m.weight, m.bias, m.eps),
    nn.ReLU: lambda t, m, x: _relu(t, x),
    nn.LeakyReLU: lambda t, m, x: _leaky_relu(t, x, m.negative_slope),
    nn.ELU: lambda t, m, x: _elu(t, x, m.alpha),
    nn.GELU: lambda t, m, x: _gelu(t, x, m.approximate),
    nn.SiLU: lambda t, m, x: _silu(t, x),
    nn.Tanh: lambda t, m, x: _tanh(t, x),
    nn.Sigmoid: lambda t, m, x: _sigmoid(t, x),
    nn.Softplus: lambda t, m, x: _softplus(t, x, m.beta, m.threshold),
    Sine: lambda t, m, x: _activation(t, "sine", x, w0=m.w0),
    nn.Flatten: lambda t, m, x: _flatten(t, x, m.start_dim, m.end_dim),
    nn.Identity: lambda t, m, x: x,
    nn.Dropout: lambda t, m, x: _dropout(t, x, m.p, m.training),
}

FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.relu: _relu,
    torch.relu: _relu,
    F.leaky_relu: _leaky_relu,
    F.elu: _elu,
    F.gelu: _gelu,
    F.silu: _silu,
    F.tanh: _tanh,
    torch.tanh: _tanh,
    F.sigmoid: _sigmoid,
    torch.sigmoid: _sigmoid,
    F.softplus: _softplus,
    torch.sin: _sine,
    F.dropout: _dropout,
    torch.flatten: _flatten,
    torch.reshape: _reshape,
    torch.cat: _cat,
    torch.concat: _cat,
    operator.add: _sum,
    operator.iadd: _sum,
    torch.add: _sum,
    operator.sub: _difference,
    torch.sub: _difference,
    operator.mul: _product,
    operator.imul: _product,
    torch.mul: _product,
    operator.truediv: _quotient,
    torch.div: _quotient,
    operator.neg: lambda t, x: _scale(t, x, -1.0),
    torch.neg: lambda t, x: _scale(t, x, -1.0),
    operator.getitem: _getitem,
    getattr: _getattr,
}

METHODS: dict[str, Callable[..., Any]] = {
    "relu": _relu,
    "relu_": _relu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "sin": _sine,
    "flatten": _flatten,
    "view": _reshape,
    "reshape": _reshape,
    "size": _size,
    "contiguous": lambda t, x: x,
    "add": _sum,
    "sub": _difference,
    "mul": _product,
    "div": _quotient,
    "neg": lambda t, x: _scale(t, x, -1.0),
}
