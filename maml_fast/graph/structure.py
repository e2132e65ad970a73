"""What a model takes and returns: a tensor, or several in tuples, lists and mappings; returned also in dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Data: TypeAlias = Tensor | Sequence[Tensor] | Mapping[Any, Tensor]
"""What a person hands over as inputs or as targets: a tensor, or a tuple, list or mapping of tensors."""


class _Key(enum.Enum):
    WEIGHTS = "weights"


WEIGHTS = _Key.WEIGHTS
"""The key of weights among weighted inputs; behind all others in the order of `by_name`."""


class Weighted(dict[Any, Tensor]):
    """A model's inputs, by place or by name, and under `WEIGHTS` the weights (N,) of its samples' losses.

    Attributes:
        form: `Tensor`, `tuple` or `dict`, what the model takes.
    """

    form: type

    @classmethod
    def of(cls, x: Any, weights: Tensor) -> Weighted:
        """The inputs of a person's structure, with the weights of their samples."""
        if isinstance(x, Mapping):
            return cls.again(dict, {**x, WEIGHTS: weights})
        if isinstance(x, list | tuple):
            return cls.again(tuple, {**dict(enumerate(x)), WEIGHTS: weights})
        return cls.again(Tensor, {0: x, WEIGHTS: weights})

    @classmethod
    def again(cls, form: type, values: Mapping[Any, Tensor]) -> Weighted:
        """Of the same form."""
        made = cls(values)
        made.form = form
        return made

    @property
    def inputs(self) -> Any:
        """What the model takes."""
        given = {key: value for key, value in self.items() if key != WEIGHTS}
        if self.form is dict:
            return given
        return tuple(given[place] for place in range(len(given))) if self.form is tuple else given[0]

    @property
    def weights(self) -> Tensor:
        return self[WEIGHTS]


def unweighted(x: Any) -> Any:
    """What the model takes of inputs with or without weights."""
    return x.inputs if isinstance(x, Weighted) else x


def weights_of(x: Any) -> Tensor | None:
    """The weights of the samples' losses, where inputs have some."""
    return x.weights if isinstance(x, Weighted) else None


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


def named(name: str, data: Any) -> list[tuple[str, Any]]:
    """What stands in inputs or targets that a person calls `name`, each under a name such as `x_s['mask']`."""
    if isinstance(data, Weighted):
        return [*named(name, data.inputs), (f"{name} (weights)", data.weights)]
    if isinstance(data, Mapping):
        return [(f"{name}[{key!r}]", inner) for key, inner in data.items()]
    if isinstance(data, list | tuple):
        return [(f"{name}[{index}]", inner) for index, inner in enumerate(data)]
    return [(name, data)]


def items(data: Data) -> dict[str, Tensor]:
    """The tensors of inputs or targets by where they stand: `['mask']`, `[1]`, or nothing where there is one."""
    return dict(named("", data))


def by_name(data: Data) -> list[int]:
    """The places of the tensors of inputs or targets in an order that does not depend on how a mapping was filled."""
    if not isinstance(data, Mapping):
        return list(range(len(tensors(data))))
    names = [repr(key) for key in data]
    return sorted(range(len(names)), key=names.__getitem__)


def tensors_by_name(data: Data) -> list[Tensor]:
    """The tensors in this order."""
    found = tensors(data)
    return [found[place] for place in by_name(data)]


def called(function: Callable[..., Any], x: Data) -> Any:
    """`function(x)`, `function(*x)` or `function(**x)`, of copies that it may write."""
    x = unweighted(x)
    if isinstance(x, Tensor):
        return function(x.clone())
    if isinstance(x, Mapping):
        return function(**{name: v.clone() for name, v in x.items()})
    return function(*[v.clone() for v in x])


def constants(value: Any) -> list[tuple[str, Any]]:
    """Where every leaf stands, and those that are no tensors: equal for structures that differ in numbers alone."""
    return [(path, Tensor if isinstance(leaf, Tensor) else leaf) for path, leaf in _leaves(value, "")]


def replaced(value: Any, new: Sequence[Any]) -> Any:
    """The structure with these in place of its tensors, in the order of `tensors`."""
    rest = iter(new)
    return mapped(value, lambda _: next(rest))


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A copy of the structure with the function's value in place of every tensor."""
    return _map(value, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


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
