"""Whether a model's output for one sample depends on the other samples of its batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import structure
from .conditions import constant
from .objective import Objective
from .probe import trying
from .structure import Data


def mixes_samples(objective: Objective, x: Data) -> str:
    """What in the model mixes the samples of one task's inputs (N, *in); empty where nothing does.

    Of inputs with a derivative an output's is asked for, which is exactly zero where there is no way from one to the
    other. Of whole numbers all samples but the first are replaced by copies of it.
    """
    if structure.first(x).shape[0] < 2 or not (_reaches(objective, x) or _changes(objective, x)):
        return ""
    return _layer(objective.model.module)


def _reaches(objective: Objective, x: Data) -> bool:
    """Whether the first sample's outputs depend on the numbers of the others."""
    with torch.inference_mode(False), torch.enable_grad():
        given = structure.mapped(x, lambda v: constant(v).requires_grad_(v.is_floating_point()))
        leaves = [v for v in structure.tensors(given) if v.requires_grad]
        ends = [v[0].sum() for v in _outputs(objective, given) if v.requires_grad]
        if not leaves or not ends:
            return False
        gradients = torch.autograd.grad(ends, leaves, allow_unused=True)
    return any(bool((g[1:] != 0).any()) for g in gradients if g is not None)


def _changes(objective: Objective, x: Data) -> bool:
    """Whether they depend on the other samples' whole numbers."""
    if all(v.is_floating_point() for v in structure.tensors(x)):
        return False
    alike = structure.mapped(x, lambda v: v if v.is_floating_point() else v[:1].expand_as(v).contiguous())
    pairs = zip(_outputs(objective, x), _outputs(objective, alike), strict=True)
    return not all(torch.allclose(a[0], b[0], rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in pairs)


def _outputs(objective: Objective, x: Data) -> list[Tensor]:
    """The outputs of N samples, with the same random numbers every time."""
    with trying(objective, x) as at:
        torch.manual_seed(0)
        found = structure.tensors(objective.outputs(at, x))
    samples = structure.first(x).shape[0]
    return [v for v in found if v.is_floating_point() and v.dim() and v.shape[0] == samples]


def _layer(model: nn.Module) -> str:
    """The first layer that is known to, or the model."""
    return next(_normalising(model), f"forward of {type(model).__name__}")


def _normalising(model: nn.Module) -> Iterator[str]:
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            yield f"layer {name!r} ({type(layer).__name__})"
