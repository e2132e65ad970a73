"""A module seen as a function of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .guards import Guards

Adapts = Callable[[str, nn.Parameter], bool] | Iterable[str] | None


class Model:
    """A snapshot of a module's structure: which parameters it has and which of them adapt.

    A parameter used twice (weight tying) is listed once. Frozen parameters
    (`requires_grad=False`) are constants: neither adapted nor given a meta-gradient.

    Args:
        module: the user's network.
        adapts: names of the parameters that the inner loop updates, or a predicate
            `(name, parameter) -> bool`; None for all.
    """

    def __init__(self, module: nn.Module, adapts: Adapts = None) -> None:
        self.module = module
        self.graphs: dict[Any, Any] = {}  # what trace() found, by shapes
        self.modules = tuple(module.modules())
        owners = {
            id(p): (m._parameters, key)
            for m in reversed(self.modules)
            for key, p in m._parameters.items()
            if p is not None
        }
        named = dict(module.named_parameters())
        self.names = tuple(named)
        self.takes_indices = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in self.modules)
        self._slots = tuple(owners[id(p)] for p in named.values())
        self.signature = self._signature()
        self.guards = Guards(module)
        self.chosen = _choose(named, adapts)
        self._kinds = _kinds(named.values())
        self.trainable = tuple(p.requires_grad for p in named.values())
        self.adapts = tuple(c and t for c, t in zip(self.chosen, self.trainable, strict=True))
        self.shapes = tuple(tuple(p.shape) for p in named.values())

    def parameters(self) -> list[nn.Parameter]:
        """The module's current parameters, in `names` order."""
        return [owner[key] for owner, key in self._slots]  # type: ignore[misc]

    def refrozen(self) -> bool:
        """Whether a parameter was frozen, or its memory replaced by that of another kind."""
        try:
            return _kinds(self.parameters()) != self._kinds
        except (KeyError, AttributeError):
            return True

    def restructured(self) -> bool:
        """Whether submodules or parameters were added, removed, tied, renamed, frozen or replaced by another kind."""
        return self._signature() != self.signature

    def _signature(self) -> Any:
        """Which modules there are, which names stand for one parameter, and of what kind it is."""
        named = list(self.module.named_parameters(remove_duplicate=False))
        first: dict[int, int] = {}
        ties = [first.setdefault(id(p), i) for i, (_, p) in enumerate(named)]
        kinds = _kinds(p for _, p in named)
        return [id(m) for m in self.module.modules()], [n for n, _ in named], ties, kinds

    def buffers(self, copies: int | None = None) -> dict[str, Tensor]:
        """Throw-away copies of the buffers, so that training mode cannot write the real ones."""
        named = self.module.named_buffers()
        if copies is None:
            return {name: b.clone() for name, b in named}
        return {name: b.expand(copies, *b.shape).clone() for name, b in named}

    def call(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The module's output with these parameters and buffers in place of its own."""
        return functional_call(self.module, (dict(parameters), dict(buffers)), (x,))

    def named(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, values, strict=True))


def _kinds(parameters: Iterable[Tensor]) -> list[tuple[bool, torch.Size, torch.dtype, torch.device]]:
    return [(p.requires_grad, p.shape, p.dtype, p.device) for p in parameters]


def _choose(named: Mapping[str, nn.Parameter], adapts: Adapts) -> tuple[bool, ...]:
    if adapts is None:
        return (True,) * len(named)
    if callable(adapts):
        return tuple(bool(adapts(name, p)) for name, p in named.items())
    if isinstance(adapts, str):
        raise TypeError("adapts: expected an iterable of parameter names or a predicate, got a str")
    chosen = set(adapts)
    if unknown := chosen - set(named):
        raise ValueError(f"adapts: no parameter named {sorted(unknown)[0]!r}; the model has {', '.join(named)}")
    return tuple(name in chosen for name in named)


def common_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """The parameters' dtype.

    Raises:
        TypeError: they differ.
    """
    dtypes = {p.dtype for p in parameters}
    if len(dtypes) > 1:
        raise TypeError(f"model: expected parameters of one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    return dtypes.pop()


def common_device(parameters: Sequence[Tensor]) -> torch.device:
    """The parameters' device.

    Raises:
        ValueError: they differ.
    """
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(f"model: expected parameters on one device, got {', '.join(sorted(map(str, devices)))}")
    return devices.pop()
