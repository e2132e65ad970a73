"""The Triton kernels at kinks, far out, at infinities and NaN, under Triton's interpreter: see its tests."""

from __future__ import annotations

import interpreted
import pytest
import torch
from extremes import ACTIVATIONS, assert_derivatives, derivatives, points
from test_activations import measured, network
from test_losses_at_extremes import assert_like_the_reference, at_kinks, ruled_out

from maml_fast.backends import dispatch
from maml_fast.backends.triton import TritonBackend
from maml_fast.backends.triton.kernels import launch
from maml_fast.backends.triton.kernels.activation import activation
from maml_fast.backends.triton.memory import Memory
from maml_fast.graph.graph import ACTIVATIONS as KINDS
from maml_fast.graph.inputs import Inputs, Leaf
from maml_fast.graph.losses import resolve
from maml_fast.graph.model import Model
from maml_fast.graph.objective import Objective
from maml_fast.graph.trace import trace

TOLERANCE = 2e-6
COMPOSED = ("selu", "log_sigmoid")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")  # NumPy's


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(dispatch.BACKENDS, "triton-wide", TritonBackend("wide"))
    interpreted.poison(monkeypatch, Memory)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in COMPOSED])
def test_kernel(name: str) -> None:
    """f, f' and f'' as `activate` gives them to every kernel."""
    layer, x = ACTIVATIONS[name](), points(torch.float32)
    graph, _ = trace(Objective(Model(layer), resolve("mse")), [(1, None)], Inputs((Leaf((1,), torch.float32),)))
    assert graph is not None
    (op,) = graph.live_ops()
    parameters = (*(op.attributes[attribute] for attribute in KINDS[op.kind]), 0.0, 0.0)[:2]
    found = (torch.empty_like(x), torch.empty_like(x), torch.empty_like(x))
    activation(launch.run, (op.kind, *parameters), x, *found)
    value, slope, curvature = derivatives(layer, x)
    assert found[0][value.isnan()].isnan().all()
    keep = slope.abs() < 1e20
    assert_derivatives(
        (found[0][keep], found[1][keep], found[2][keep]),
        (value[keep], slope[keep], curvature[keep]),
        x[keep],
        TOLERANCE,
    )


@pytest.mark.parametrize("name", [*COMPOSED, "hardswish", "mish"])
def test_meta_gradient(name: str) -> None:
    net, x = network(ACTIVATIONS[name](), torch.float32), points(torch.float32)[::2]
    expected = derivatives(net[1], x)
    assert_derivatives(measured(net, x, expected[0], "triton-wide"), expected, x, TOLERANCE)


@pytest.mark.parametrize("loss", ["l1", "huber", "mse"])
def test_kinks_of_losses(loss: str) -> None:
    assert_like_the_reference(*at_kinks(torch.float32), loss, "triton-wide")


def test_class_ruled_out() -> None:
    assert_like_the_reference(*ruled_out(torch.float32), "cross_entropy", "triton-wide")
