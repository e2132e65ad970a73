"""`torch.autograd.gradcheck` in float64 through the public calls, on the real kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from maml_fast.backends import cpu
from maml_fast.cases import SMALL, Case, Problem, select

BACKEND = "cpu" if cpu.info()["built"] else "vmap"
# large ones take long, and somewhere in them there is a kink beside every entry that is moved
LARGE = ("size-17", "size-6", "size-wide", "low-rank", "sample-tiles", "siren", "batchnorm-deep", "resnet12")
# whose derivative is not the slope: a gradient is cut
CASES = [c for c in SMALL if not c.name.startswith((*LARGE, "cut-gradients"))]
FEW = select(
    ["tanh", "batchnorm", "layernorm", "residual", "tied", "rate-per_element", "loss-cross-entropy", "adapts-head",
     "conv-everything", "pooled-block", "groupnorm", "maxpool-overlapping"]
)  # fmt: skip


def leaves(case: Case) -> tuple[list[Tensor], Problem]:
    """Every tensor with a gradient, and the problem they belong to."""
    problem = case.build(torch.float64)
    return [*problem.leaves, problem.x_s.requires_grad_(), problem.x_q.requires_grad_()], problem


def check(case: Case, call: str, fast: bool) -> None:
    tensors, problem = leaves(case)
    maml = problem.maml(BACKEND)
    try:
        maml.explain(*problem.batch)
    except RuntimeError as declined:
        assert BACKEND != "cpu"
        pytest.skip(str(declined))

    def function(*_: Tensor) -> Tensor:
        # gradcheck moves the leaves in place, and the module reads them there
        return maml.meta_loss(*problem.batch) if call == "meta_loss" else maml(*problem.batch[:3])

    assert gradcheck(function, tensors, fast_mode=fast, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_meta_loss(case: Case) -> None:
    check(case, "meta_loss", fast=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_query_outputs(case: Case) -> None:
    check(case, "forward", fast=True)


@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_meta_loss_entry_by_entry(case: Case) -> None:
    check(case, "meta_loss", fast=False)
