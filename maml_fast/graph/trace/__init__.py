"""From `nn.Module` to `Graph`: the only package that knows PyTorch's modules and functions.

A layer is one emitter in the file of its family, and its rows in the tables at the end of that file.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from ..graph import Graph, Shape
from . import activations, arithmetic, linear, norms, pools, shapes
from .graphs import Emitter, Tracing, Untraceable, Value

_MODULES: dict[type[nn.Module], Emitter] = {
    **linear.MODULES,
    **norms.MODULES,
    **activations.MODULES,
    **pools.MODULES,
    **shapes.MODULES,
}
_FUNCTIONS: dict[Callable[..., Any], Emitter] = {
    **linear.FUNCTIONS,
    **norms.FUNCTIONS,
    **activations.FUNCTIONS,
    **pools.FUNCTIONS,
    **arithmetic.FUNCTIONS,
    **shapes.FUNCTIONS,
}
_METHODS: dict[str, Emitter] = {
    **activations.METHODS,
    **pools.METHODS,
    **arithmetic.METHODS,
    **shapes.METHODS,
}


def trace(module: nn.Module, in_shape: Shape) -> tuple[Graph | None, list[str]]:
    """The module's graph for samples of shape `in_shape`, or the reasons why there is none."""
    try:
        _refuse_hooks(module)
        return _interpret(_fx_graph(module), module, in_shape), []
    except Untraceable as error:
        return None, [str(error)]


# While torch.fx traces, it stands in for `nn.Module.__call__` and `__getattr__` in every thread, and two tracings at
# once would put back each other's stand-ins.
_one_at_a_time = threading.RLock()


class _LeafTracer(fx.Tracer):
    """Symbolic tracing of forward(x) that stops at the modules of the table, and lets other threads call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Forward's other arguments keep their defaults, on which Python code may branch."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _MODULES or super().is_leaf_module(m, module_qualified_name)


def _fx_graph(module: nn.Module) -> fx.Graph:
    if type(module) in _MODULES:
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_module("", (x,)))
        return graph
    try:
        with _one_at_a_time:
            return _LeafTracer().trace(module)
    except Exception as error:  # whatever the user's forward raises under tracing is the reason
        raise Untraceable(f"torch.fx cannot trace forward: {str(error).strip().splitlines()[0]}") from error


def _interpret(graph: fx.Graph, module: nn.Module, in_shape: Shape) -> Graph:
    """Run an fx graph over `Value`s, collecting operations."""
    tracing, results = Tracing(module, in_shape), dict[fx.Node, Any]()
    for node in graph.nodes:
        if node.op == "placeholder":
            results[node] = Value(0, in_shape)
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), results.__getitem__)
        if node.op == "output":
            if not isinstance(args[0], Value):
                raise Untraceable("forward does not return a single tensor")
            return Graph(tuple(tracing.ops), tuple(tracing.shapes), args[0].index)
        results[node] = _node(tracing, module, node, args, kwargs)
    raise Untraceable("forward returns nothing")


def _node(t: Tracing, module: nn.Module, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(module)
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        emit = _MODULES.get(type(layer))
        if emit is None:
            raise Untraceable(f"layer {node.target!r} is a {type(layer).__name__}, which has no fused kernel")
        return emit(t, layer, *args, **kwargs)
    table: dict[Any, Emitter] = _FUNCTIONS if node.op == "call_function" else _METHODS
    emit = table.get(node.target)
    if emit is None:
        name = getattr(node.target, "__name__", node.target)
        raise Untraceable(f"forward calls {name}, which has no fused kernel")
    try:
        return emit(t, *args, **kwargs)
    except TypeError as error:
        raise Untraceable(f"forward calls {node.target} with unsupported arguments ({error})") from error


def _refuse_hooks(module: nn.Module) -> None:
    for name, m in module.named_modules():
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            raise Untraceable(f"layer {name!r} has hooks, which fused kernels would not call")
