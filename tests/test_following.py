"""Rates and adapted parameters follow the model that is there now, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import maml_fast as mf

BACKENDS = ("cpu", "vmap", "reference")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a if hasattr(self, "a") else self.z
        return self.b(torch.tanh(first(x)))


def batch() -> list[Tensor]:
    torch.manual_seed(1)
    return [v for n in (5, 6) for v in (torch.randn(3, n, 4), torch.randint(3, (3, n)))]


NUMBERS = {"a.weight": 0.1, "a.bias": 0.2, "b.weight": 0.3, "b.bias": 0.4}


def rates(kind: str) -> dict[str, Any]:
    if kind == "numbers":
        return dict(NUMBERS)
    shapes = {n: p.shape if kind == "elements" else () for n, p in Net().named_parameters()}
    return {n: nn.Parameter(torch.full(shapes[n], r)) for n, r in NUMBERS.items()}


def textbook(model: nn.Module, data: list[Tensor], steps: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Mean query loss after plain SGD at every parameter's own rate, and its gradient for what is trainable."""
    start = dict(model.named_parameters())
    moving = [n for n, p in start.items() if p.requires_grad]
    total = torch.zeros(())
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        theta = dict(start)
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(model, theta, (x_s,)), y_s)
            found = torch.autograd.grad(loss, [theta[n] for n in moving], create_graph=True)
            theta |= {n: theta[n] - NUMBERS[n] * g for n, g in zip(moving, found, strict=True)}
        total = total + F.cross_entropy(functional_call(model, theta, (x_q,)), y_q)
    total = total / len(data[0])
    return total.detach(), list(torch.autograd.grad(total, [start[n] for n in moving]))


def is_right(maml: mf.MAML) -> None:
    data = batch()
    maml.zero_grad()
    wanted, gradients = textbook(maml.module, data)
    torch.testing.assert_close(maml.backward(*data), wanted)
    found = [p.grad for p in maml.module.parameters() if p.requires_grad]
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b)


def made(backend: str, kind: str = "numbers") -> mf.MAML:
    return mf.MAML(Net(), rates(kind), steps=2, backend=backend)


KINDS = pytest.mark.parametrize("kind", ["numbers", "scalars", "elements"])
EACH = pytest.mark.parametrize("backend", BACKENDS)


@EACH
@KINDS
@pytest.mark.parametrize("layer", ["a", "b"])
def test_layers_are_frozen_and_thawed(layer: str, kind: str, backend: str) -> None:
    maml = made(backend, kind)
    is_right(maml)
    for frozen in (True, False, True):
        getattr(maml.module, layer).requires_grad_(not frozen)
        is_right(maml)
        is_right(copy.deepcopy(maml))
    assert [n for n, _ in maml.named_parameters() if n.startswith("lr")] == [
        n for n, _ in copy.deepcopy(maml).named_parameters() if n.startswith("lr")
    ]


def renamed(model: Net) -> None:
    model.z = model.a
    del model.a


def one_more(model: Net) -> None:
    model.register_parameter("shift", nn.Parameter(torch.zeros(3)))


def larger_head(model: Net) -> None:
    model.b = nn.Linear(8, 9)


def without_bias(model: Net) -> None:
    model.b = nn.Linear(8, 3, bias=False)


MISFITS: dict[str, tuple[Callable[[Net], None], str]] = {
    "renamed": (renamed, r"got none for 'z\.weight'"),
    "one more": (one_more, "got none for 'shift'"),
    "larger head": (larger_head, r"lr\['b\.weight'\]: expected a scalar or shape \(9, 8\), got \(3, 8\)"),
    "without bias": (without_bias, r"got a rate for 'b\.bias'"),
}


FOR_ALL_SHAPES = [(change, kind) for change in MISFITS for kind in ("numbers", "scalars", "elements")]


@EACH
@pytest.mark.parametrize(("change", "kind"), [v for v in FOR_ALL_SHAPES if v[0] != "larger head" or v[1] == "elements"])
def test_a_model_that_the_rates_do_not_fit_is_refused(change: str, kind: str, backend: str) -> None:
    function, message = MISFITS[change]
    maml = made(backend, kind)
    maml.backward(*batch())
    function(maml.module)
    for _ in range(2):  # it stays refused
        with pytest.raises(ValueError, match=message):
            maml.backward(*batch())
        with pytest.raises(ValueError, match=message):
            maml.adapt(*batch()[:2])


@EACH
@pytest.mark.parametrize("kind", ["numbers", "scalars"])
def test_a_rate_for_all_elements_fits_another_shape(kind: str, backend: str) -> None:
    maml = made(backend, kind)
    is_right(maml)
    larger_head(maml.module)
    is_right(maml)


@EACH
def test_new_rates_end_the_refusal(backend: str) -> None:
    maml = made(backend)
    is_right(maml)
    renamed(maml.module)
    with pytest.raises(ValueError, match=r"z\.weight"):
        maml.backward(*batch())
    fitting = {n.replace("a.", "z."): r for n, r in NUMBERS.items()}
    maml.lr = fitting
    same = mf.MAML(maml.module, fitting, steps=2, backend=backend)
    torch.testing.assert_close(maml.meta_loss(*batch()), same.meta_loss(*batch()))


@EACH
def test_a_layer_that_was_frozen_at_the_start_needs_a_rate_when_it_thaws(backend: str) -> None:
    model = Net()
    model.a.requires_grad_(False)
    maml = mf.MAML(model, {"b.weight": 0.3, "b.bias": 0.4}, steps=2, backend=backend)
    is_right(maml)
    model.a.requires_grad_(True)
    with pytest.raises(ValueError, match=r"got none for 'a\.weight'"):
        maml.backward(*batch())
    model.a.requires_grad_(False)
    is_right(maml)


@EACH
def test_one_rate_serves_every_parameter_that_there_is(backend: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    maml = mf.MAML(model, 0.1, backend=backend)
    maml.backward(*batch())
    model.insert(0, nn.Linear(4, 4))
    model[3] = nn.Linear(8, 7)
    same = mf.MAML(copy.deepcopy(model), 0.1, backend=backend)
    for m in (maml, same):
        m.zero_grad()
    torch.testing.assert_close(maml.backward(*batch()), same.backward(*batch()))
    for a, b in zip(maml.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---- the mapping itself --------------------------------------------------------------------------


def test_the_mapping_is_copied_and_shown_read_only() -> None:
    given = rates("numbers")
    maml = mf.MAML(Net(), given, steps=2)
    given["a.weight"] = 9.0
    is_right(maml)
    with pytest.raises(TypeError):
        maml.lr["a.weight"] = 9.0
    assert dict(maml.lr) == NUMBERS


@EACH
def test_a_registered_rate_is_replaced(backend: str) -> None:
    maml = made(backend, "scalars")
    before = maml.meta_loss(*batch())
    maml.lr2 = nn.Parameter(torch.tensor(0.9))
    assert maml.lr["b.weight"].item() == pytest.approx(0.9)
    assert not torch.equal(maml.meta_loss(*batch()), before)
    maml.load_state_dict({n: v.clone() for n, v in made(backend, "scalars").state_dict().items()}, assign=True)
    is_right(maml)


@pytest.mark.parametrize("kind", ["scalars", "elements"])
def test_a_mapping_of_one_rate_is_copied(kind: str) -> None:
    shape = (3, 8) if kind == "elements" else ()
    maml = mf.MAML(Net(), {"b.weight": nn.Parameter(torch.full(shape, 0.3))}, adapts=["b.weight"])
    twin = copy.deepcopy(maml)
    assert torch.equal(twin.meta_loss(*batch()), maml.meta_loss(*batch()))
    assert twin.state_dict().keys() == maml.state_dict().keys()


def test_adapts_may_be_an_iterator() -> None:
    model = Net()
    maml = mf.MAML(model, 0.1, adapts=(n for n in ("b.weight", "b.bias")))
    model.b = nn.Linear(8, 5)
    same = mf.MAML(model, 0.1, adapts=["b.weight", "b.bias"])
    assert torch.equal(maml.meta_loss(*batch()), same.meta_loss(*batch()))


# ---- adapted models ------------------------------------------------------------------------------


def adapted(backend: str) -> tuple[mf.MAML, mf.Adapted, Tensor]:
    maml = mf.MAML(Net(), 0.1, backend=backend)
    x_s, y_s, x_q, _ = batch()
    return maml, maml.adapt(x_s, y_s), x_q


@EACH
def test_the_parameters_of_an_adapted_model_are_read_only(backend: str) -> None:
    _, found, _ = adapted(backend)
    weight = found.parameters["a.weight"]
    for edit in (
        lambda: found.parameters.__setitem__("a.weight", weight[:1]),
        lambda: found.parameters.__delitem__("a.weight"),
        lambda: found.parameters.pop("a.weight"),
        lambda: setattr(found, "parameters", {"a.weight": weight}),
    ):
        with pytest.raises((TypeError, AttributeError)):
            edit()
    assert found.parameters["a.weight"] is weight


def by_name(found: mf.Adapted, model: nn.Module, x: Tensor) -> Tensor:
    tasks = [{n: v[t] for n, v in found.parameters.items()} for t in range(len(x))]
    return torch.stack([functional_call(model, theta, (x[t],)) for t, theta in enumerate(tasks)]).detach()


def another_order(model: Net) -> None:
    first = model.a
    del model.a
    model.a = first


@EACH
@pytest.mark.parametrize("change", ["none", "in place", "order", "activation of another kind", "frozen"])
def test_an_adapted_model_is_called_by_name(change: str, backend: str) -> None:
    maml, found, x = adapted(backend)
    if change == "in place":
        found.parameters["a.weight"].mul_(2.0)
    elif change == "order":
        another_order(maml.module)
    elif change == "activation of another kind":
        maml.module.b = nn.Linear(8, 3)
    elif change == "frozen":
        maml.module.a.requires_grad_(False)
    torch.testing.assert_close(found(x), by_name(found, maml.module, x))


GONE: dict[str, tuple[Callable[[Net], None], str]] = {
    "renamed": (renamed, r"parameter 'z\.weight', got none"),
    "one more": (one_more, "parameter 'shift', got none"),
    "larger head": (larger_head, r"expected shape \(3, 9, 8\) for parameter 'b\.weight', got shape \(3, 3, 8\)"),
    "without bias": (without_bias, r"it has no parameter 'b\.bias' now"),
}


@EACH
@pytest.mark.parametrize("change", GONE)
def test_an_adapted_model_that_is_no_more_is_refused(change: str, backend: str) -> None:
    maml, found, x = adapted(backend)
    function, message = GONE[change]
    function(maml.module)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"the model has changed since adapt.*{message}"):
            found(x)


@EACH
def test_a_model_of_another_dtype_is_refused(backend: str) -> None:
    maml, found, x = adapted(backend)
    maml.module.double()
    for value in (x, x.double()):
        with pytest.raises(TypeError, match=r"expected torch\.float"):
            found(value)


@EACH
def test_an_adapted_parameter_of_another_shape_is_refused(backend: str) -> None:
    _, found, x = adapted(backend)
    found.parameters["a.bias"].resize_(3, 1)
    with pytest.raises(RuntimeError, match=r"parameter 'a\.bias', got shape \(3, 1\)"):
        found(x)
