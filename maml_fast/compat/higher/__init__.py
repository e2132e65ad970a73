"""higher's differentiable inner loops: `import maml_fast.compat.higher as higher`.

Loops written for higher run as they are. Inner loops of the same kind are recorded and computed together by `mf.MAML`
once a result is read, a gradient is looked at, or a parameter changes; see `docs/compat.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from . import optim, patch
from .optim import create_diff_optim, get_diff_optim
from .patch import monkeypatch

__all__ = ["create_diff_optim", "get_diff_optim", "innerloop_ctx", "monkeypatch", "optim", "patch"]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: Any,
    device: Any = None,
    copy_initial_weights: bool = True,
    override: Any = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[Any, Any]]:
    """A functional copy of a model and a differentiable optimiser of its fast weights.

    Args:
        model: any module. opt: `torch.optim.SGD`, `Adam` or `RMSprop` over its parameters, or some of them.
        device: where the fast weights are to be; None for the model's.
        copy_initial_weights: whether the fast weights begin as copies; False lets losses derive to the model's own.
        override: by name of a setting, a list with one value for each parameter group, or for all.
        track_higher_grads: False keeps no graph between the steps.

    Raises:
        ValueError: another optimiser, or parameters that are not the model's.
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads, opt)
    yield fmodel, get_diff_optim(opt, model.parameters(), fmodel, device, override, track_higher_grads)
