"""Which parameters a module has and where it keeps them, at one moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .stand_ins import lock, refuse_nested

try:
    from .._core import Kinds
except ImportError:
    Kinds = None  # type: ignore[assignment,misc]


class Snapshot:
    """The parameters of a module and of everything in it.

    A parameter used twice (weight tying) is listed once. Frozen parameters (`requires_grad=False`) are constants.

    Args:
        module: whose parameters; None for nobody's.
        besides: a snapshot whose modules and parameters are left out.

    Attributes:
        modules: every module whose tensors these are.
        names, shapes, trainable: of each parameter, in one order. slots: the table and key that hold each.

    Raises:
        TypeError: a part is scripted, so that its tensors cannot be exchanged.
    """

    modules: tuple[nn.Module, ...]

    def __init__(self, module: nn.Module | None, besides: Snapshot | None = None) -> None:
        known = {id(m) for m in besides.modules} if besides else set()
        with lock:
            inside = [] if module is None else list(module.named_modules())
            refuse_nested([m for _, m in inside])
            _refuse_scripted(inside)
            own = [(name, m) for name, m in inside if id(m) not in known]
            self.modules = tuple(m for _, m in own)
            self._prefixes = [f"{name}." if name else "" for name, _ in own]
            elsewhere = {id(p) for p in besides.parameters()} if besides else set()
            named = dict(module.named_parameters()) if module is not None else {}
            named = {n: p for n, p in named.items() if id(p) not in elsewhere}
            owners = {
                id(p): (m._parameters, key)
                for m in reversed(self.modules)
                for key, p in m._parameters.items()
                if p is not None
            }
            self.slots: list[tuple[dict[str, Any], str]] = [owners[id(p)] for p in named.values()]
            self._tables = [t for m in self.modules for t in (m._modules, m._parameters)]
            self._values = [t.values() for t in self._tables]  # views: they follow their tables
            self._sizes, self._keys = self._layout()
            self._held = list(chain.from_iterable(self._values))
            self._ties = _ties(self._held)
            self._kinds = _kinds(named.values())
            self._same_kinds = _quick_comparison(list(named.values()))
        self.names = tuple(named)
        self.shapes = tuple(tuple(p.shape) for p in named.values())
        self.trainable = tuple(p.requires_grad for p in named.values())

    def parameters(self) -> list[nn.Parameter]:
        """The current parameters, in `names` order."""
        with lock:
            return [owner[key] for owner, key in self.slots]

    def restructured(self) -> bool:
        """Whether submodules or parameters were added, removed, renamed, tied, untied, frozen or changed in kind.

        Raises:
            RuntimeError: asked inside the forward or the loss of the same module.
        """
        if not self.modules:
            return False
        with lock:
            refuse_nested(self.modules)
            if self._layout() != (self._sizes, self._keys):
                return True
            if not all(map(is_, chain.from_iterable(self._values), self._held)):
                held = list(chain.from_iterable(self._values))
                if _ties(held) != self._ties:
                    return True
                self._held = held
            return self.as_they_were() is None

    def _layout(self) -> tuple[list[int], list[str]]:
        """How many submodules and parameters every module has, and their names: made at every call, so in C."""
        return list(map(len, self._tables)), list(chain.from_iterable(self._tables))

    def as_they_were(self) -> list[nn.Parameter] | None:
        """The current parameters; None if one was frozen, or its memory replaced by that of another kind."""
        try:
            parameters = [owner[key] for owner, key in self.slots]
            if self._same_kinds is not None and self._same_kinds(parameters):
                return parameters
            return parameters if _kinds(parameters) == self._kinds else None
        except (KeyError, AttributeError):
            return None

    def buffers(self) -> dict[str, Tensor]:
        """Every buffer once, under its first name."""
        found: dict[int, tuple[str, Tensor]] = {}
        for prefix, module in zip(self._prefixes, self.modules, strict=True):
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    found.setdefault(id(buffer), (prefix + key, buffer))
        return dict(found.values())

    def named(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, values, strict=True))


def _refuse_scripted(modules: Iterable[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            where = f" in {name!r}" if name else ""
            raise TypeError(f"model: expected modules in Python, got a {type(module).__name__}{where}")


def _ties(held: Iterable[Any]) -> list[int]:
    """For each slot the module in it, or the first slot with the same parameter, or -1 where it is empty."""
    first = {id(None): -1}
    return [id(v) if isinstance(v, nn.Module) else first.setdefault(id(v), slot) for slot, v in enumerate(held)]


def _kinds(parameters: Iterable[Tensor]) -> list[tuple[bool, torch.Size, torch.dtype, torch.device, bool]]:
    return [(p.requires_grad, p.shape, p.dtype, p.device, p.is_neg()) for p in parameters]


def _quick_comparison(parameters: list[Tensor]) -> Callable[[list[Any]], bool] | None:
    """The core's, which looks at tensors with memory of their own alone."""
    if Kinds is None:
        return None
    try:
        return Kinds(parameters).same
    except (RuntimeError, TypeError, BufferError, ValueError):
        return None


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
