"""What a model returns: a tensor, or tensors in tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a structure, in order.

    Raises:
        TypeError: it holds something that is neither a tensor, a constant, nor a structure of them.
    """
    return [leaf for _, leaf in _leaves(value, "") if isinstance(leaf, Tensor)]


def first(value: Any) -> Tensor:
    """The tensor, or the first of several: what a named loss takes.

    Raises:
        TypeError: there is none.
    """
    found = [value] if isinstance(value, Tensor) else tensors(value)
    if not found:
        raise TypeError(f"model: expected outputs with a tensor in them, got {type(value).__name__}")
    return found[0]


def constants(value: Any) -> list[tuple[str, Any]]:
    """Where every leaf stands, and those that are no tensors: equal for structures that differ in numbers alone."""
    return [(path, Tensor if isinstance(leaf, Tensor) else leaf) for path, leaf in _leaves(value, "")]


def replaced(value: Any, new: Sequence[Any]) -> Any:
    """The structure with these in place of its tensors, in the order of `tensors`."""
    rest = iter(new)
    return _map(value, lambda leaf: next(rest) if isinstance(leaf, Tensor) else leaf)


def stacked(tasks: Sequence[Any]) -> Any:
    """One structure whose tensors have a leading axis over tasks.

    Raises:
        TypeError, ValueError: what the tasks returned cannot be stacked.
    """
    expected = constants(tasks[0])
    for task, value in enumerate(tasks):
        if (got := constants(value)) != expected:
            here = next((f": {a} against {b}" for a, b in zip(got, expected, strict=False) if a != b), "")
            raise ValueError(f"model: expected outputs of one structure for all tasks, task {task} differs{here}")
    columns = zip(*[tensors(value) for value in tasks], strict=True)
    return replaced(tasks[0], [torch.stack(column) for column in columns])


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Tensor, *_CONSTANTS)):
        yield path, value
        return
    for name, inner in _items(value, path):
        yield from _leaves(inner, f"{path}{name}")


def _items(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"[{key!r}]", inner
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield f"[{index}]", inner
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield f".{field.name}", getattr(value, field.name)
    else:
        where = f" in outputs{path}" if path else ""
        raise TypeError(
            "model: expected outputs that are a tensor, tuple, list, mapping or dataclass of tensors, "
            f"got {type(value).__name__}{where}"
        )


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """A copy with every leaf mapped; subclasses stay what they are."""
    if isinstance(value, (Tensor, *_CONSTANTS)):
        return function(value)
    if isinstance(value, Mapping):
        result: Any = copy.copy(value) if isinstance(value, dict) else dict(value)
        for key, inner in value.items():
            result[key] = _map(inner, function)
        return result
    if isinstance(value, list | tuple):
        items = [_map(inner, function) for inner in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    result = copy.copy(value)
    for field in dataclasses.fields(value):
        object.__setattr__(result, field.name, _map(getattr(value, field.name), function))
    return result
