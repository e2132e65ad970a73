"""The rule by which results agree with the textbook's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from maml_fast.backends import agreement
from maml_fast.backends.agreement import ROUNDINGS, Error, Rounding, errors_of, judge, limit, order_of, sizes_of

EPS = torch.finfo(torch.float32).eps
ORDERS = {"loss": 1, "parameters": 2}


def draws(errors: list[float], taken: list[float]) -> Iterator[Mapping[str, float]]:
    for error in errors:
        taken.append(error)
        yield {"loss": error, "parameters": 0.0}


def verdict(value: float, own: list[float]) -> tuple[Error, int]:
    taken: list[float] = []
    loss, _ = judge({"loss": value, "parameters": 0.0}, draws(own, taken), ORDERS, torch.float32)
    return loss, len(taken)


def test_twice_the_own_error_and_a_floor() -> None:
    assert limit(1e-3, 1, torch.float32) == pytest.approx(2e-3 + 8 * EPS)
    assert limit(0.0, 2, torch.float64) == 16 * torch.finfo(torch.float64).eps
    assert verdict(2e-3, [1e-3])[0].ok
    assert not verdict(2.1e-3, [1e-3])[0].ok


def test_the_floor_grows_with_the_root_of_long_sums() -> None:
    floors = [limit(0.0, 1, torch.float32, terms) for terms in (1, 64, 6400)]
    assert floors == pytest.approx([8 * EPS, 8 * EPS, 80 * EPS])


def test_further_draws_only_where_they_are_needed() -> None:
    assert verdict(1e-3, [1e-3, 9.0, 9.0]) == (Error("loss", 1e-3, limit(1e-3, 1, torch.float32)), 1)
    found, taken = verdict(1e-3, [1e-4, 2e-4, 6e-4, 9.0])
    assert found.ok
    assert taken == 3
    assert found.limit == limit(6e-4, 1, torch.float32)


def test_what_is_far_off_is_given_up() -> None:
    assert verdict(1.0, [1e-6] * 100)[1] < 15
    assert verdict(3e-6, [1e-7] * ROUNDINGS)[1] == ROUNDINGS


def test_an_own_error_that_is_not_finite_excuses_everything() -> None:
    assert verdict(math.inf, [math.inf])[0].ok
    assert not verdict(math.inf, [1.0])[0].ok


def test_orders() -> None:
    assert [order_of("loss", k, False) for k in (0, 1)] == [0, 1]
    assert [order_of(kind, 1, False) for kind in ("parameters", "rates", "x_s", "learned")] == [2] * 4
    assert order_of("parameters", 1, True) == order_of("parameters", 0, False) == 1


def tensors(*values: float) -> list[Tensor]:
    return [torch.tensor(values, dtype=torch.float64)]


def test_a_cancelled_gradient_is_measured_against_the_others() -> None:
    reference = {"loss": tensors(1e-20), "parameters": tensors(3.0, 4.0), "rates": tensors(1e-17)}
    assert sizes_of(reference) == pytest.approx({"loss": 1e-20, "parameters": 5.0, "rates": 5.0})
    found = {"loss": tensors(2e-20), "parameters": tensors(3.0, 4.5), "rates": tensors(0.0)}
    assert errors_of(found, reference) == pytest.approx({"loss": 1.0, "parameters": 0.1, "rates": 2e-18})
    assert sizes_of({"parameters": tensors(5.0), "rates": tensors(1e-9)})["rates"] == 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rounding_moves_by_one(dtype: torch.dtype) -> None:
    x = torch.randn(1000, dtype=dtype)
    moved = [Rounding(dtype, seed)(x) for seed in (0, 0, 1)]
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])
    distance = ((moved[0] - x) / x).abs()
    assert 0 < distance.max() <= 1.51 * torch.finfo(dtype).eps
    labels = torch.arange(5)
    assert Rounding(dtype, 0)(labels) is labels


def test_as_many_as_are_promised() -> None:
    assert len(list(agreement.roundings(torch.float32))) == ROUNDINGS
