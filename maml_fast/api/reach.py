"""Checks of what one task's loss depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..algorithms.goal import Mode
from ..graph.losses import Loss
from ..graph.probe import Probe
from ..graph.structure import first
from ..lower.plan import Plan
from . import checks

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def check(plan: Plan, found: Probe, allow_unused: bool | None) -> None:
    """Raise ValueError if parameters that should be learned are not reached.

    Args:
        allow_unused: True accepts whatever is not reached; False, nothing; None accepts it if others are reached.
    """
    names, by_loss = plan.model.names, found.reached_by_loss or (False,) * len(plan.model.names)
    reached = [a or b for a, b in zip(found.reached, by_loss, strict=True)]
    trainable = [i for i, t in enumerate(plan.model.trainable) if t]
    if allow_unused is True or not trainable:
        return
    missing = [i for i in trainable if not reached[i]]
    if missing and allow_unused is False:
        raise ValueError(f"model: parameter {names[missing[0]]!r} does not reach the output")
    if len(missing) == len(trainable):
        raise ValueError(
            f"model: no parameter reaches the output, {names[missing[0]]!r} neither; allow_unused=True accepts that"
        )
    adapts = [i for i, a in enumerate(plan.model.adapts) if a]
    if plan.mode is not Mode.APPLY and plan.inner.steps and adapts and not any(by_loss[i] for i in adapts):
        raise ValueError(
            f"model: no parameter that adapts reaches the support loss, {names[adapts[0]]!r} neither; "
            "allow_unused=True accepts that"
        )


def check_targets(found: Probe, targets: Mapping[str, Tensor], samples: int, loss: Loss) -> None:
    """Check targets against outputs of `samples` samples that a model without a graph has returned."""
    shape = tuple(first(found.outputs).shape) if loss.name != "custom" and found.outputs is not None else ()
    for name, y in targets.items():
        if shape and shape[0] == samples:
            checks.target_shape(name, y, shape[1:], loss)


def notes(found: Probe) -> list[str]:
    """What a person should know about a call, a line each."""
    return [_about_buffers(found.written)] if found.written else []


def stale(found: Probe) -> str:
    """What to say of buffers that forward counts on to move, such as a power iteration's; empty where there are none.

    The running statistics of norms are not among them: they stay in MAML by convention.
    """
    names = [name for name in found.written if name.rpartition(".")[2] not in _STATISTICS]
    return f"maml_fast: {_about_buffers(names)}. A call of the model itself moves them" if names else ""


def _about_buffers(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"forward writes buffers ({names[0]}{more}): every pass starts from their values, which stay"
