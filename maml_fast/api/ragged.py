"""Tasks of different sizes as one meta-batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph import structure
from ..graph.structure import Data

_NAMES = ("x_s", "y_s", "x_q", "y_q")


def ragged(tasks: Iterable[tuple[Data, Data, Data, Data]]) -> dict[str, Any]:
    """Pad tasks of different sizes to one meta-batch whose losses are those of the tasks by themselves.

    Every set is filled up to the largest one's size with copies of its first sample, of weight 0; its own n samples
    have weight 1 / n each. A model whose samples mix (BatchNorm on batch statistics) refuses weights.

    Args:
        tasks: x_s (Ns, *in), y_s (Ns, …), x_q (Nq, *in), y_q (Nq, …) of each task, or several such tensors in tuples,
            lists or mappings, alike in all but Ns and Nq, of at least one sample.

    Returns:
        `x_s`, `y_s`, `x_q`, `y_q`, `weights_s (T, Ns)`, `weights_q (T, Nq)`: `maml.meta_loss(**mf.ragged(tasks))`.
        Weights have the dtype of the first floating-point tensor, or the default one, and the device of `x_s`.

    Raises:
        TypeError, ValueError: no tasks, an empty set, or tasks that differ in more than size.
    """
    rows = list(tasks)
    if not rows:
        raise ValueError("tasks: expected at least one, got none")
    for number, task in enumerate(rows):
        if not isinstance(task, tuple | list) or len(task) != 4:
            raise TypeError(f"tasks[{number}]: expected (x_s, y_s, x_q, y_q), got {_described(task)}")
        _check(number, task, rows[0])
    columns = {name: [task[place] for task in rows] for place, name in enumerate(_NAMES)}
    batch = {name: _padded(column) for name, column in columns.items()}
    for name in ("s", "q"):
        batch[f"weights_{name}"] = _weights(columns[f"x_{name}"])
    return batch


def _check(number: int, task: Sequence[Any], like: Sequence[Any]) -> None:
    """Raise unless the task has the structures, sample shapes and types of the first one."""
    for place, name in enumerate(_NAMES):
        what, leaves = f"tasks[{number}], {name}", structure.named("", task[place])
        if odd := [v for _, v in leaves if not isinstance(v, Tensor)] or [None] * (not leaves):
            raise TypeError(f"{what}: expected tensors, got {type(odd[0]).__name__}")
        expected = structure.named("", like[place])
        if [at for at, _ in leaves] != [at for at, _ in expected]:
            raise ValueError(f"{what}: expected the structure of task 0, got another")
        samples = {v.shape[0] if v.dim() else 0 for _, v in leaves + structure.named("", task[place // 2 * 2])}
        if len(samples) > 1 or 0 in samples:
            raise ValueError(
                f"{what}: expected as many samples as in x_{name[-1]}, at least one, got {sorted(samples)}"
            )
        for (at, v), (_, other) in zip(leaves, expected, strict=True):
            if (v.shape[1:], v.dtype, v.device) != (other.shape[1:], other.dtype, other.device):
                raise ValueError(f"{what}{at}: expected samples like those of task 0, {_about(other)}, got {_about(v)}")


def _about(v: Tensor) -> str:
    return f"{tuple(v.shape[1:])} {v.dtype} on {v.device}"


def _described(task: Any) -> str:
    return f"{len(task)} parts" if isinstance(task, tuple | list) else type(task).__name__


def _padded(column: Sequence[Data]) -> Data:
    """(T, N, …) of the tasks' (n, …)."""
    most = max(structure.first(part).shape[0] for part in column)

    def filled(v: Tensor) -> Tensor:
        return torch.cat([v, v[:1].expand(most - v.shape[0], *v.shape[1:])])

    result: Data = structure.stacked([structure.mapped(part, filled) for part in column])
    return result


def _weights(column: Sequence[Data]) -> Tensor:
    sizes = torch.tensor([structure.first(part).shape[0] for part in column])
    leaves = structure.tensors(column[0])
    dtype = next((v.dtype for v in leaves if v.is_floating_point()), torch.get_default_dtype())
    places = torch.arange(int(sizes.max()))
    weights = torch.where(places < sizes[:, None], 1.0 / sizes[:, None].to(dtype), 0.0)
    return weights.to(leaves[0].device)
