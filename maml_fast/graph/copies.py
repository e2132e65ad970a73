"""Deep copies of a person's model in another dtype."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_T = TypeVar("_T")
_DEEPEST = 6  # containers within containers


def cast(value: _T, source: torch.dtype, target: torch.dtype, functions: Iterable[Any] = ()) -> _T:
    """A deep copy of anything (a module, a dict of arguments) whose tensors of dtype `source` have dtype `target`.

    Parameters, buffers and tensors in plain attributes alike; strides stay, gradients and graphs are left behind.

    Args:
        functions: those in the value that may read modules and tensors from closures and globals, as a loss does that
            penalises the model's parameters. Their copies read the copies; `copy.deepcopy` copies no function.

    Raises:
        RuntimeError: something in it cannot be copied.
    """
    memo: dict[int, Any] = {}
    try:
        with _Casting(source, target):
            _copy_functions(functions, memo)
            return deepcopy(value, memo)
    except Exception as error:
        raise RuntimeError(f"{type(value).__name__} cannot be copied: {error}") from error


def functions_in(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The functions in the modules' attributes and in lists and tables there, hooks included."""
    for module in modules:
        yield from _held(vars(module).values(), depth=0)


def _held(values: Iterable[Any], depth: int) -> Iterator[Any]:
    for value in values:
        if isinstance(value, dict | list | tuple) and depth < _DEEPEST:
            yield from _held(value.values() if isinstance(value, dict) else value, depth + 1)
        elif isinstance(value, types.FunctionType):
            yield value


def _copy_functions(functions: Iterable[Any], memo: dict[int, Any]) -> None:
    """Enter copies of those functions that read modules or tensors, and of the functions in their closures."""
    found = _with_closures(functions)
    for function in found:  # first all, with empty cells: what they read may hold them
        memo[id(function)] = _emptied(function)
    for function in found:
        copy = memo[id(function)]
        for cell, new in zip(function.__closure__ or (), copy.__closure__ or (), strict=True):
            if _is_full(cell):
                content = cell.cell_contents
                new.cell_contents = deepcopy(content, memo) if _is_copied(content, memo) else content
        for name in function.__code__.co_names:
            if _is_copied(content := function.__globals__.get(name), memo):
                copy.__globals__[name] = deepcopy(content, memo)


def _with_closures(functions: Iterable[Any]) -> list[types.FunctionType]:
    """The functions, and those in their closures, of which each reads something."""
    found: dict[int, types.FunctionType] = {}
    left = list(functions)
    while left:
        function = left.pop()
        if isinstance(function, types.FunctionType) and id(function) not in found:
            cells = [c.cell_contents for c in function.__closure__ or () if _is_full(c)]
            if cells or any(_is_copied(function.__globals__.get(n), {}) for n in function.__code__.co_names):
                found[id(function)] = function
                left += cells
    return list(found.values())


def _emptied(function: types.FunctionType) -> types.FunctionType:
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    copy = types.FunctionType(
        function.__code__, dict(function.__globals__), function.__name__, function.__defaults__, cells
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy


def _is_full(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a name that is assigned later
        return False
    return True


def _is_copied(content: Any, memo: dict[int, Any]) -> bool:
    return isinstance(content, nn.Module | Tensor) or id(content) in memo


class _Casting(TorchFunctionMode):
    """While active, copies of tensors of one dtype have another."""

    def __init__(self, source: torch.dtype, target: torch.dtype) -> None:
        super().__init__()
        self._source, self._target = source, target

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self._deepcopy(*args)
        result = func(*args, **(kwargs or {}))
        # a parameter copies itself by way of clone
        return self._convert(result) if func is Tensor.clone else result

    def _deepcopy(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        """Unlike PyTorch's, also of tensors that have a graph, such as the weights that `weight_norm` computes."""
        if id(tensor) not in memo:
            memo[id(tensor)] = self._convert(tensor.detach().clone()).requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._target) if tensor.dtype == self._source else tensor
