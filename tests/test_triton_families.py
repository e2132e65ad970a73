"""Operations of families in the wide Triton kernels, under Triton's interpreter: see `test_triton_interpreter.py`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import interpreted
import pytest
import test_captured_losses
import test_draws
import test_families
import test_lookups
import test_per_batch
import torch
from interpreted import assert_close, assert_equal, record
from torch import Tensor, nn

from maml_fast import MAML, cases
from maml_fast.algorithms import maml as algorithm
from maml_fast.backends import agreement, dispatch, philox
from maml_fast.backends.triton import TritonBackend
from maml_fast.backends.triton.kernels import launch, tiles, written
from maml_fast.backends.triton.kernels.expressions import Pointwise
from maml_fast.backends.triton.kernels.gather import Array, both_ways, gather
from maml_fast.backends.triton.kernels.largest import Largest
from maml_fast.backends.triton.kernels.lookup import Lookup
from maml_fast.backends.triton.kernels.matmul import Matrices, matmul
from maml_fast.backends.triton.kernels.philox import draw
from maml_fast.backends.triton.kernels.softmax import Rows
from maml_fast.backends.triton.kernels.vectors import Step
from maml_fast.backends.triton.memory import Memory
from maml_fast.backends.triton.runtime.executor import Executor
from maml_fast.checking import verify
from maml_fast.graph import structure
from maml_fast.graph.boxes import Box, sliced, summed
from maml_fast.graph.expressions import call, variable
from maml_fast.graph.expressions.language import PRIMITIVES
from maml_fast.graph.losses import LossLike

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")  # NumPy's


OWN_TILES = tiles.product


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend with memory that is NaN until something is written; and large tiles, which the interpreter likes."""
    torch.set_num_threads(1)
    monkeypatch.setitem(dispatch.BACKENDS, "triton-wide", TritonBackend("wide"))
    monkeypatch.setattr(tiles, "product", interpreted.large_tile)
    interpreted.poison(monkeypatch, Memory)


# ---- the shared case list ------------------------------------------------------------------------------


def shown(names: Iterable[str], chosen: Collection[str]) -> list[Any]:
    """All of them as parameters; those that are not chosen are left to `make test-exhaustive`."""
    return [n if n in chosen else pytest.param(n, marks=pytest.mark.exhaustive) for n in names]


CASES = [case.name for case in cases.select(tag="families")]


@pytest.mark.parametrize("name", shown(CASES, {*CASES} - {"computed-filters"}))
def test_second_order(name: str) -> None:
    (case,) = cases.select([name])
    assert_close(case, interpreted.meta_gradient("triton-wide", case, first_order=False), first_order=False)


@pytest.mark.parametrize("name", ["gate"])
def test_first_order(name: str) -> None:
    (case,) = cases.select([name])
    assert_close(case, interpreted.meta_gradient("triton-wide", case, first_order=True), first_order=True)


@pytest.mark.parametrize("name", ["over-samples"])
def test_same_bits_every_time(name: str) -> None:
    (case,) = cases.select([name])
    first, second = (interpreted.meta_gradient("triton-wide", case, first_order=False) for _ in range(2))
    assert_equal(first, second)


def test_every_mode() -> None:
    (case,) = cases.select(["computed-weight"])
    assert_close(case, verify.observe(case.build(torch.float32), "triton-wide", first_order=False), first_order=False)


def test_recomputing_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases.select(["over-samples"])
    saved = interpreted.meta_gradient("triton-wide", case, first_order=False)
    emit = algorithm.emit
    monkeypatch.setattr(algorithm, "emit", lambda goal, **kept: emit(goal, **kept | {"save": False}))
    assert_equal(interpreted.meta_gradient("triton-wide", case, first_order=False), saved)


def test_chunks_of_tasks_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases.select(["computed-weight"])
    whole = interpreted.meta_gradient("triton-wide", case, first_order=False)
    monkeypatch.setitem(dispatch.BACKENDS, "triton-wide", TritonBackend("wide", budget=60_000))
    chunks, run = [], Executor.run
    monkeypatch.setattr(Executor, "run", lambda self, chunk: (chunks.append(chunk), run(self, chunk)))
    for kind, values in interpreted.meta_gradient("triton-wide", case, first_order=False).items():
        assert verify.relative_error(values, [v.double() for v in whole[kind]]) < 1e-6, kind
    assert max(chunks) < case.tasks


# ---- the models of the cpu backend's tests ----------------------------------------------------------------

KINDS_OF_RESULT = ("loss", "parameters", "x_s", "x_q")


def results(model: nn.Module, backend: str, data: Sequence[Tensor], first_order: bool) -> dict[str, list[Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = test_families.numbers(model, backend, tuple(data), first_order=first_order)
    return dict(zip(KINDS_OF_RESULT, ([one] for one in found), strict=False)) | {"adapted": found[4:]}


def assert_like_the_textbook(name: str, first_order: bool, samples: tuple[int, int] = (5, 4)) -> None:
    """By the rule of `agreement.py`, in float32 against the float64 reference."""
    model, shape = test_families.made(name)
    model = model.float()
    data = [d.float() for d in test_families.batch(model.double(), shape, samples)]
    wanted = results(model.double(), "reference", [d.double() for d in data], first_order)
    found = results(model.float(), "triton-wide", data, first_order)

    def own() -> Iterator[dict[str, float]]:
        yield agreement.errors_of(results(model, "reference", data, first_order), wanted)
        for moved in agreement.roundings(torch.float32):
            yield agreement.errors_of(results(model, "reference", list(map(moved, data)), first_order), wanted)

    orders = {kind: agreement.order_of(kind, 2, first_order) for kind in found}
    errors = agreement.judge(agreement.errors_of(found, wanted), own(), orders, torch.float32)
    assert all(e.ok for e in errors), [e for e in errors if not e.ok]


SHOWN = ("zero-d-scale", "straight-through", "transposed-samples", "image-squeeze", "stacked", "softmax-inside")
SHOWN += ("max", "lora", "hypernetwork")
MODELS = [n for n in test_families.MODELS if n not in (*test_families._ONCE_ONLY, "lstm")]  # a minute by itself


@pytest.mark.parametrize("name", shown(MODELS, SHOWN))
def test_model(name: str) -> None:
    assert_like_the_textbook(name, first_order=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [n for n in MODELS if n not in test_families._AMBIGUOUS])
def test_one_sample_and_first_order(name: str) -> None:
    assert_like_the_textbook(name, first_order=True, samples=(1, 3))


@pytest.mark.parametrize("name", shown(test_families._ONCE_ONLY, ["infinite-slopes"]))
def test_cuts_select_where_slopes_are_infinite(name: str) -> None:
    """0 · ∞ would be NaN."""
    assert_like_the_textbook(name, first_order=True)


# ---- losses of no name, and multiples of those with one ----------------------------------------------------

NETWORK = test_captured_losses.NETWORK
LOSSES: dict[str, tuple[nn.Module, LossLike]] = {
    **{name: (NETWORK, loss) for name, loss in {**test_captured_losses.VALUES, **test_captured_losses.OWN}.items()},
    **{name: (NETWORK, loss) for name, loss in test_captured_losses.LABELS.items()},
    **{name: (NETWORK, loss) for name, loss in test_captured_losses.OWN_LABELS.items()},
    **test_captured_losses.BESIDE,
}
LABELS = (*test_captured_losses.LABELS, *test_captured_losses.OWN_LABELS)
SHOWN_LOSSES = ("sum", "nll-sum", "weighted-samples", "of-no-targets", "gather", "of-parameter-and-targets")
REFUSED_LOSSES = ("over-samples-and-rows", "over-samples-first")  # no backend has a graph for them


def of_loss(name: str, backend: str, dtype: torch.dtype, moved: agreement.Rounding | None = None) -> agreement.Results:
    """A meta-gradient with outputs, every task's loss and adapted parameters, in numbers that float32 has."""
    model, loss = LOSSES[name]
    model.float().to(dtype)
    torch.manual_seed(1)
    samples = 4, 3
    shape = model(torch.zeros(1, 4, dtype=dtype)).shape[1:]
    y = [torch.randint(3, (2, n)) if name in LABELS else torch.randn(2, n, *shape).to(dtype) for n in samples]
    x = [torch.randn(2, n, 4).to(dtype) for n in samples]
    data = [t if moved is None else moved(t) for pair in zip(x, y, strict=True) for t in pair]
    rate = nn.Parameter(torch.tensor(0.25, dtype=dtype))
    maml = MAML(model, rate, steps=2, loss=loss, backend=backend, check="never")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = maml.meta_loss(*data, reduction="none")
        leaves = [*model.parameters(), rate]
        gradients = torch.autograd.grad(losses @ torch.tensor([1.0, 2.0], dtype=dtype), leaves, allow_unused=True)
        for leaf in leaves:
            leaf.grad = None
        total, outputs = maml.backward(*data, outputs=True)
        adapted = list(maml.adapt(*data[:2]).parameters.values())
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
    pulled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves, strict=True)]
    return {
        "loss": (losses.detach(), total.detach()), "outputs": (outputs.detach(),), "adapted": adapted,
        "parameters": pulled[:-1], "backward": own[:-1], "rates": [pulled[-1], own[-1]],
    }  # fmt: skip


def assert_loss_like_the_textbook(name: str) -> None:
    model, _ = LOSSES[name]
    try:
        wanted = of_loss(name, "reference", torch.float64)
        found = of_loss(name, "triton-wide", torch.float32)

        def own() -> Iterator[dict[str, float]]:
            for moved in (None, *agreement.roundings(torch.float32)):
                yield agreement.errors_of(of_loss(name, "reference", torch.float32, moved), wanted)

        orders = {kind: agreement.order_of(kind, 2, False) for kind in found}
        errors = agreement.judge(agreement.errors_of(found, wanted), own(), orders, torch.float32)
    finally:
        model.double()
    assert all(e.ok for e in errors), [e for e in errors if not e.ok]


@pytest.mark.parametrize("name", shown([n for n in LOSSES if n not in REFUSED_LOSSES], SHOWN_LOSSES))
def test_loss(name: str) -> None:
    assert_loss_like_the_textbook(name)


@pytest.mark.parametrize(("name", "why"), [("half", "a multiple of a mean"), ("penalty", "none of the named ones")])
def test_the_resident_variant_declines_such_losses(name: str, why: str) -> None:
    model, loss = LOSSES[name]
    small = [torch.randn(2, 3, 4), torch.randn(2, 3, 3)] * 2
    try:
        with pytest.raises(RuntimeError, match=f"{why}.* has no instruction in the resident kernel"):
            MAML(model.float(), 0.1, loss=loss, backend="triton-resident").explain(*small)
        assert "variant wide" in MAML(model.float(), 0.1, loss=loss, backend="triton").explain(*small)
    finally:
        model.double()


# ---- expressions ------------------------------------------------------------------------------------------

IN_TORCH: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg, "abs": torch.abs,
    "sign": torch.sign, "exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p,
    "sqrt": torch.sqrt, "sin": torch.sin, "cos": torch.cos, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "erf": torch.erf, "pow": torch.pow, "fmod": torch.fmod, "floor": torch.floor, "ceil": torch.ceil,
    "round": torch.round, "trunc": torch.trunc, "minimum": torch.minimum, "maximum": torch.maximum,
    "lt": lambda a, b: (a < b).to(a), "le": lambda a, b: (a <= b).to(a), "eq": lambda a, b: (a == b).to(a),
    "where": lambda c, a, b: torch.where(c != 0, a, b),
}  # fmt: skip
POINTS = (0.0, -0.0, 1e-30, -1e-6, 1e-3, 0.5, -0.5, 1.0, -1.5, 2.5, -3.0, 20.0, -90.0, 1e5, 3e38, math.inf, -math.inf)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(name: str) -> None:
    """At ordinary and extreme numbers; NaN stays NaN, or whatever PyTorch makes of it."""
    points = torch.tensor([*POINTS, math.nan])
    count = PRIMITIVES[name]
    operands = [g.reshape(1, -1).contiguous() for g in torch.meshgrid([points] * count, indexing="ij")]
    function = call(name, *(variable(f"x{j}") for j in range(count)))
    size = operands[0].numel()
    y = torch.full((1, size), math.nan)
    Pointwise(launch.run, 1, 1, function, [(size,)] * count, (size,), [False] * count).forward(operands, y)
    wanted = IN_TORCH[name](*(o.double() for o in operands)).float()
    if name == "sign":
        wanted = wanted.nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)  # as the core has it
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("shared", [(False, False, False), (False, True, False), (True, False, True)])
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 4), (2, 1, 4), (1, 3, 1)),
        ((1, 1, 1), (2, 3, 4), (2, 1, 1)),
        ((9, 1, 40), (1, 7, 1), (9, 7, 40)),  # several blocks of elements, and of terms
    ],
)
def test_broadcast_operands(shapes: tuple[tuple[int, ...], ...], shared: tuple[bool, ...]) -> None:
    """Every delta is the sum over whatever its operand is repeated along, and is added where it should be."""
    tasks, samples, shape = 2, 3, tuple(map(max, zip(*shapes, strict=True)))
    function = variable("x0") * variable("x1") * variable("x1") + call("exp", variable("x2")) * variable("x0")
    full = [(tasks, 1 if one else samples, *s) for one, s in zip(shared, shapes, strict=True)]
    x = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in full]
    dy = torch.randn(tasks, samples, *shape, dtype=torch.float64)
    y = x[0] * x[1] ** 2 + torch.exp(x[2]) * x[0]
    wanted = torch.autograd.grad((y.expand_as(dy) * dy).sum(), x)
    kernels = Pointwise(launch.run, tasks, samples, function, shapes, shape, shared)
    given = [v.detach().float().flatten(1) for v in x]
    found = [torch.ones_like(v) for v in given]
    kernels.backward(given, dy.float().flatten(1), [(to, j == 1, j) for j, to in enumerate(found)])
    for j, (mine, right) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(mine.double(), right.flatten(1) + (j == 1), rtol=1e-5, atol=1e-5)


def test_two_operands_in_one_buffer_add_up() -> None:
    kernels = Pointwise(launch.run, 1, 1, variable("x0") * variable("x1"), [(4,), (4,)], (4,), [False, False])
    x, dy = torch.randn(1, 4), torch.randn(1, 4)
    to = torch.full((1, 4), math.nan)
    kernels.backward([x, x], dy, [(to, False, 7), (to, True, 7)])
    torch.testing.assert_close(to, 2 * x * dy)


def test_deltas_of_the_outputs_shape_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record(monkeypatch)
    kernels = Pointwise(launch.run, 1, 1, variable("x0") * variable("x1"), [(4,), (4,)], (4,), [False, False])
    x, dy, to = torch.randn(1, 4), torch.randn(1, 4), [torch.empty(1, 4) for _ in range(2)]
    kernels.backward([x, x], dy, [(to[0], False, 1), (to[1], False, 2)])
    assert [name for name, _ in seen] == ["expression_kernel"]


# ---- linear maps ------------------------------------------------------------------------------------------

MAPS: dict[str, tuple[int, int, tuple[Box, ...]]] = {
    "flipped": (6, 6, (sliced((6,), 0, 5, -1, 6),)),
    "placed": (4, 7, (sliced((4,), 0, 0, 1, 4)._replace(start_out=2),)),
    "summed": (24, 8, (summed((2, 3, 4), [1], 0.25),)),
    "overlapping": (5, 6, (Box(0, 1.0, 0, 0, (5,), (1,), (1,)), Box(0, -2.0, 1, 3, (3, 2), (1, 0), (1, 0)))),
    "many": (700, 700, (sliced((20, 35), 1, 34, -1, 35),)),
    "many-to-few": (1200, 3, (summed((400, 3), [0]),)),
    "to-one": (40, 1, (Box(0, 0.5, 0, 0, (40,), (1,), (0,)),)),
    "nothing": (3, 2, ()),
}


@pytest.mark.parametrize("sampled", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("name", MAPS)
def test_boxes(name: str, sampled: tuple[bool, bool]) -> None:
    """Both ways, against the map as a matrix; where only one side has samples they are summed or repeated."""
    width, features, boxes = MAPS[name]
    matrix = torch.zeros(features, width, dtype=torch.float64)
    for box in boxes:
        for place in torch.cartesian_prod(*map(torch.arange, box.sizes)).reshape(-1, len(box.sizes)):
            at = int((place * torch.tensor(box.strides_in)).sum()), int((place * torch.tensor(box.strides_out)).sum())
            matrix[box.start_out + at[1], box.start_in + at[0]] += box.factor
    tasks, samples = 2, 3
    for terms, m, (a_sampled, out_sampled) in zip(
        both_ways(boxes, width, features), (matrix, matrix.mT), (sampled, sampled[::-1]), strict=True
    ):
        a = torch.randn(tasks, samples if a_sampled else 1, m.shape[1]).double()
        wanted, size = (
            (x if out_sampled else x.sum(1, keepdim=True)).expand(tasks, samples if out_sampled else 1, -1).flatten(1)
            for x in (a @ m.mT, a.abs() @ m.abs().mT)
        )
        for add in (False, True):
            out = torch.full(wanted.shape, 1.0 if add else math.nan)
            arrays = Array(a.float().flatten(1), m.shape[1], a_sampled), Array(out, m.shape[0], out_sampled)
            gather(launch.run, terms, terms.tensors, *arrays, samples, 3.0, add)
            assert ((out.double() - (3 * wanted + add)).abs() <= 1e-6 * (3 * size + add)).all()


# ---- softmax and the largest element -------------------------------------------------------------------------


def _rows() -> Tensor:
    """Ordinary rows, some with classes ruled out, one far from the others, one of equal elements."""
    x = torch.randn(7, 5)
    x[1, 2:4], x[2], x[3, 0], x[4] = -math.inf, 0.0, 80.0, x[4] * 1e4
    return x


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_softmax(log: bool, add: bool) -> None:
    x, tx, dy, ey = _rows(), *(torch.randn(7, 5) for _ in range(3))
    function = torch.log_softmax if log else torch.softmax
    exact = [v.double() for v in (x, tx, dy, ey)]

    def back(v: Tensor, d: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(function(v, -1), v, d, create_graph=True)
        return found

    exact[0].requires_grad_()
    y = function(exact[0], -1)
    p = torch.softmax(exact[0], -1)
    ty = exact[1] - (p * exact[1]).sum(-1, keepdim=True)
    ty = ty if log else p * ty
    dx = back(exact[0], exact[2])
    (ex,) = torch.autograd.grad(dx, exact[0], exact[1], retain_graph=True)
    ex = ex + back(exact[0], exact[3])
    rows = Rows(launch.run, 5, log)
    mine = [torch.full((7, 5), 1.0 if add and j > 1 else math.nan) for j in range(4)]
    rows.forward(x, mine[0])
    rows.tangent(mine[0], tx, mine[1])
    rows.backward(mine[0], dy, mine[2], add)
    rows.backward_tangent(mine[0], mine[1], dy, ey, mine[3], add)
    for j, wanted in enumerate((y, ty, dx, ex)):
        torch.testing.assert_close(mine[j].double(), wanted.detach() + (add and j > 1), rtol=2e-6, atol=2e-6)


def test_softmax_of_what_has_none() -> None:
    """NaN in a row, or nothing but −∞, is NaN all along it, and nowhere else."""
    x = torch.randn(4, 3)
    x[1, 1], x[2] = math.nan, -math.inf
    for log in (False, True):
        y = torch.empty_like(x)
        Rows(launch.run, 3, log).forward(x, y)
        assert y.isnan().all(1).tolist() == [False, True, True, False]
        assert not y[[0, 3]].isnan().any()


@pytest.mark.parametrize("inner", [1, 70])
def test_largest(inner: int) -> None:
    """The first of equal ones, and the first NaN, as PyTorch has it."""
    x = torch.randint(0, 3, (6, 4, inner)).float()
    x[0, 2], x[1] = math.nan, -math.inf
    wanted, places = x.max(1)
    y, where = torch.empty(6, inner), torch.empty(6, inner, dtype=torch.int32)
    kernels = Largest(launch.run, 4, inner)
    kernels.maximum(x, y, where)
    first = x.isnan().float().argmax(1)
    places = torch.where(x.isnan().any(1), first, (x == wanted[:, None]).float().argmax(1))
    torch.testing.assert_close(y, wanted, equal_nan=True)
    assert torch.equal(where.long(), places)
    dy, dx = torch.randn(6, inner), torch.ones(6, 4, inner)
    kernels.unpick(dy, where, dx, add=True)
    torch.testing.assert_close(dx, 1 + torch.zeros_like(x).scatter(1, places[:, None], dy[:, None]))
    tx, ty = torch.randn(6, 4, inner), torch.empty(6, inner)
    kernels.pick(tx, where, ty)
    torch.testing.assert_close(ty, tx.gather(1, places[:, None])[:, 0])


def test_declines_rows_that_are_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maml_fast.backends.triton.kernels.softmax.WIDEST", 5)
    assert "softmax over 6 elements, more than 5" in declined(nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1)), 6)


def declined(model: nn.Module, width: int) -> str:
    """What the backend says of a network from 4 numbers."""
    batch = [torch.randn(2, 3, 4), torch.randn(2, 3, width)] * 2
    with pytest.raises(RuntimeError) as error:
        MAML(model, 0.1, backend="triton-wide", loss="mse").explain(*batch)
    return str(error.value)


def test_declines_maps_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maml_fast.backends.triton.kernels.gather.MOST_TERMS", 5)
    model = nn.Sequential(nn.Linear(4, 6), test_families.Lambda(lambda x: x.flip(1)))
    assert "layer flip has 6 terms for each sample, more than 5" in declined(model, 6)


# ---- products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("samples", "groups", "sizes"), [(3, 2, (2, 5, 3)), (2, 1, (20, 35, 70))])
def test_matmul(
    samples: int, groups: int, sizes: tuple[int, int, int], sampled: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three products with both pairs, in more than one tile."""
    monkeypatch.setattr(tiles, "product", OWN_TILES)
    rows, width, columns = sizes
    of_y = any(sampled)

    def drawn(one: bool, *shape: int) -> Tensor:
        return torch.randn(2, samples if one else 1, groups, *shape, dtype=torch.float64)

    a, b, y = ([drawn(one, *s) for _ in range(2)] for one, s in (
        (sampled[0], (rows, width)), (sampled[1], (width, columns)), (of_y, (rows, columns)),
    ))  # fmt: skip
    products = {
        "y": ((a, b, of_y), lambda a, b: a @ b, (rows, columns)),
        "a": ((y, b, sampled[0]), lambda y, b: y @ b.mT, (rows, width)),
        "b": ((a, y, sampled[1]), lambda a, y: a.mT @ y, (width, columns)),
    }
    for which, ((left, right, kept), function, shape) in products.items():
        pairs = [function(u, v) for u, v in zip(left, right, strict=True)]
        for twice in (False, True):
            wanted = sum(pairs[1:] if twice else [], start=pairs[0])
            wanted = wanted if kept else wanted.sum(1, keepdim=True)
            c = torch.full(wanted.shape, 1.0 if twice else math.nan)
            factors = []
            for u, v in zip(left, right, strict=True):
                one, other = (
                    Matrices(x.float().flatten(1), *x.shape[-2:], x.shape[1] == samples) for x in (u, v)
                )  # fmt: skip
                factors.append((one.mT if which == "b" else one, other.mT if which == "a" else other))
            to = Matrices(c, *shape, kept)
            matmul(launch.run, to, factors[0], factors[1] if twice else None, samples, groups, twice, "ieee")
            torch.testing.assert_close(c.double(), wanted + twice, rtol=1e-4, atol=1e-4)


def _of_a_sigmoid(m: test_families.Net, x: Tensor) -> Tensor:
    """Activations of parameters, as a weight and as what every sample meets."""
    return m.b(torch.tanh(nn.functional.linear(x, torch.sigmoid(m.a.weight)) + torch.tanh(m.scale)))


def _squares(m: test_families.Net, x: Tensor) -> Tensor:
    """Products of a value with itself, of samples and of the task."""
    h, w = m.twelve(x)[:, :9].view(-1, 3, 3), torch.tanh(m.three.weight)
    return m.three((torch.bmm(h, h) / 3).sum(1)) @ nn.functional.linear(w, w)


def _branch(m: test_families.Net, x: Tensor) -> Tensor:
    """A linear layer of the task, and the activation behind it."""
    return m.b(torch.tanh(m.a(x)) * torch.relu(m.g(torch.tanh(m.z))))


MIXED = {"of-a-sigmoid": _of_a_sigmoid, "squares": _squares, "branch": _branch}


@pytest.mark.parametrize("name", MIXED)
def test_values_of_the_task(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(test_families.MODELS, name, (lambda: test_families.Net(MIXED[name]), (4,)))
    assert_like_the_textbook(name, first_order=False)


def test_declines_primitives_that_nobody_has_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(written.WRITTEN, "cos")
    model = nn.Sequential(nn.Linear(4, 6), test_families.Lambda(torch.cos))
    assert "layer cos is made of cos, which has no kernel" in declined(model, 6)


# ---- what a task is given or draws, and rows of tables -------------------------------------------------------


def of_batch(model: nn.Module, backend: str, batch: Any, **settings: Any) -> agreement.Results:
    """A meta-gradient, also to inputs, and adapted parameters; the same random numbers every time."""
    x_s, y_s, x_q, y_q = batch
    x_s, x_q = (structure.mapped(x, lambda v: v.clone().requires_grad_(v.is_floating_point())) for x in (x_s, x_q))
    support, query = ([v for v in structure.tensors(x) if v.requires_grad] for x in (x_s, x_q))
    leaves = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(3)
    maml = MAML(model, **{"lr": 0.3, "backend": backend, "check": "never", "allow_unused": True} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = maml.meta_loss(x_s, y_s, x_q, y_q)
        found = torch.autograd.grad(loss, [*leaves, *support, *query], allow_unused=True)
        adapted = list(maml.adapt(batch[0], y_s).parameters.values())
    pulled = [torch.zeros_like(v) if g is None else g for g, v in zip(found, [*leaves, *support, *query], strict=True)]
    inputs = {"x_s": pulled[len(leaves) : len(leaves) + len(support)], "x_q": pulled[len(leaves) + len(support) :]}
    return {"loss": (loss.detach(),), "parameters": pulled[: len(leaves)], "adapted": adapted} | (
        inputs if support else {}
    )


def cast(batch: Any, dtype: torch.dtype, moved: agreement.Rounding | None = None) -> Any:
    def one(v: Tensor) -> Tensor:
        v = v.to(dtype) if v.is_floating_point() else v
        return v if moved is None else moved(v)

    return [structure.mapped(x, one) for x in batch]


def assert_like_the_core(model: nn.Module, batch: Any, **settings: Any) -> None:
    """By the rule of `agreement.py`, against the core's float64 numbers and what its float32 makes of them."""
    settings = {"steps": 2, "first_order": False} | settings
    wanted = of_batch(model.double(), "cpu", cast(batch, torch.float64), **settings)
    model.float()
    found = of_batch(model, "triton-wide", cast(batch, torch.float32), **settings)

    def own() -> Iterator[dict[str, float]]:
        for moved in (None, *agreement.roundings(torch.float32)):
            once = of_batch(model, "cpu", cast(batch, torch.float32, moved), **settings)
            yield agreement.errors_of(once, wanted)

    orders = {kind: agreement.order_of(kind, settings["steps"], settings["first_order"]) for kind in found}
    errors = agreement.judge(agreement.errors_of(found, wanted), own(), orders, torch.float32)
    assert all(e.ok for e in errors), [e for e in errors if not e.ok]


@pytest.mark.parametrize(("samples", "outer", "inner"), [(1, 1, 1), (3, 1, 5), (5, 3, 7), (4, 2, 200)])
@pytest.mark.parametrize("step", [None, 0, 3])
def test_uniform_numbers_are_the_same_everywhere(samples: int, outer: int, inner: int, step: int | None) -> None:
    seed, elements = 2**61 + 12345, samples * outer * inner
    y = torch.full((3, elements), math.nan)
    draw(launch.run, y, torch.tensor([seed]), 7, step, 5, samples, outer)
    wanted = philox.uniform(seed, 7, -1 if step is None else step, 5, 3, elements).view(3, outer, samples, inner)
    assert torch.equal(y.double().view(3, samples, outer, inner), wanted.transpose(1, 2))


SHOWN_DRAWS = ("samples-second", "one-number", "bernoulli", "noisy-weights", "normal")


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("name", shown([n for n in test_draws.MODELS if n not in ("dropout", "gru")], SHOWN_DRAWS))
def test_what_is_drawn(name: str) -> None:
    assert_like_the_core(test_draws.made(name), test_draws.batch(), lr=0.1)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [True, False])
def test_dropout(steps: int, first_order: bool) -> None:
    assert_like_the_core(test_draws.made("dropout"), test_draws.batch(), lr=0.1, steps=steps, first_order=first_order)


def test_chunks_and_recomputed_tapes_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3)), test_draws.batch(torch.float32)
    whole = of_batch(model, "triton-wide", batch)
    emit = algorithm.emit
    monkeypatch.setattr(algorithm, "emit", lambda goal, **kept: emit(goal, **kept | {"save": False}))
    monkeypatch.setitem(dispatch.BACKENDS, "triton-wide", TritonBackend("wide", budget=10_000))
    chunks, run = [], Executor.run
    monkeypatch.setattr(Executor, "run", lambda self, chunk: (chunks.append(chunk), run(self, chunk)))
    for kind, values in of_batch(model, "triton-wide", batch).items():
        assert verify.relative_error(values, [v.double() for v in whole[kind]]) < 1e-6, kind
    assert min(chunks) < 3


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("name", shown(test_per_batch.MODELS, ["factor-and-shift", "tensor"]))
def test_numbers_that_depend_on_the_samples(name: str) -> None:
    assert_like_the_core(test_per_batch.Net(test_per_batch.MODELS[name]), test_per_batch.batch(), lr=0.1)


SHOWN_LOOKUPS = ("padding", "computed", "indexed", "twice", "one-hot", "booleans", "two", "three")


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("name", shown([n for n in test_lookups.MODELS if n != "unread"], SHOWN_LOOKUPS))
def test_lookups_and_inputs(name: str) -> None:
    assert_like_the_core(*test_lookups.made(name))


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [True, False])
def test_an_embedding_that_adapts(steps: int, first_order: bool) -> None:
    assert_like_the_core(*test_lookups.made("mean"), steps=steps, first_order=first_order)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("name", ["padding", "two"])
def test_a_table_that_does_not_adapt(name: str) -> None:
    assert_like_the_core(*test_lookups.made(name), adapts=lambda n, p: n.startswith("out."))


@pytest.mark.usefixtures("core")
def test_an_input_that_nothing_reads() -> None:
    model, batch = test_lookups.made("unread")
    assert_like_the_core(model, batch)
    assert_like_the_core(model, [{"a": x[0], "b": x[1]} if isinstance(x, tuple) else x for x in batch])


@pytest.mark.usefixtures("core")
def test_an_index_that_depends_on_parameters() -> None:
    """Nothing comes back through it."""
    model = test_lookups.Text(lambda m, x: m.words((m.places.weight[:6, 0] * x > 0).long()).mean(1))
    batch = [test_lookups.normal(n, 6) if x else test_lookups.whole(n, below=3) for n in (5, 7) for x in (1, 0)]
    assert_like_the_core(model, batch)


@pytest.mark.usefixtures("core")
def test_several_targets() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def batch(samples: int) -> list[Any]:
        y = {"y": test_lookups.whole(samples, below=3), "weight": test_lookups.normal(samples)}
        return [test_lookups.normal(samples, 4), y]

    def loss(z: Tensor, y: dict[str, Tensor]) -> Tensor:
        return (nn.functional.cross_entropy(z, y["y"], reduction="none") * y["weight"] ** 2).mean()

    assert_like_the_core(model, [*batch(5), *batch(7)], loss=loss)


@pytest.mark.parametrize("name", ["two", "dropout"])
def test_the_self_check_agrees(name: str) -> None:
    drawn = test_draws.made("dropout", torch.float32), test_draws.batch()
    model, batch = drawn if name == "dropout" else test_lookups.made(name, torch.float32)
    batch = cast(batch, torch.float32)
    maml = MAML(model, 0.1, backend="triton-wide", check="always", allow_unused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert all(v.isfinite().all() for v in structure.tensors(maml.adapt(*batch[:2])(batch[2])))
        assert maml.backward(*batch).isfinite()


@pytest.mark.parametrize(("width", "padding"), [(1, -1), (5, 2), (200, 2)])
def test_lookup(width: int, padding: int) -> None:
    """In several blocks of the table and of the indices; one of them has a row of its own, others share theirs."""
    tasks, count, rows = 2, 140, 20
    index = torch.randint(0, 5, (tasks, count)).float()
    index[:, 7], index[:, 60] = rows - 1, 2
    table, out = torch.randn(tasks, rows, width), torch.zeros(2, dtype=torch.int64)
    kernels = Lookup(launch.run, index, count, rows, width, padding)
    y, ty = (torch.full((tasks, count, width), math.nan) for _ in range(2))
    kernels.values(table.flatten(1), y.flatten(1), out)
    kernels.tangent(table.flatten(1), ty.flatten(1))
    wanted = torch.stack([t[i.long()] for t, i in zip(table, index, strict=True)])
    assert torch.equal(y, wanted)
    assert torch.equal(ty, torch.where((index == padding)[:, :, None], 0.0, wanted))
    assert out.tolist() == [0, 0]

    dy = torch.randn(tasks, count, width)
    dy[0, 7] = math.inf  # and nobody else's row
    sums = torch.zeros(tasks, rows, width, dtype=torch.float64)
    for t, k in ((t, k) for t in range(tasks) for k in range(count) if index[t, k] != padding):
        sums[t, int(index[t, k])] += dy[t, k].double()
    g = torch.ones(tasks, rows * width)
    for add in (True, False):
        kernels.gradient(g, dy.flatten(1), add=add)
        torch.testing.assert_close(g.double().view_as(sums), sums + add, rtol=1e-5, atol=1e-5)
    rates = torch.tensor([0.5, 0.25])
    step = Step(table.flatten(1).clone(), rates, torch.ones(rows * width, dtype=torch.int32), each=False)
    kernels.gradient(step.theta, dy.flatten(1), add=False, step=step)
    torch.testing.assert_close(step.theta.double().view_as(sums), table - 0.25 * sums, rtol=1e-5, atol=1e-5)


def refused(model: nn.Module, backend: str, batch: Any) -> Exception:
    """What a call raises, after which no parameter has a gradient."""
    with pytest.raises((IndexError, ValueError)) as error:
        MAML(model, 0.3, backend=backend, check="never", allow_unused=True).backward(*batch)
    assert all(p.grad is None for p in model.parameters())
    return error.value


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    ("index", "place"),
    [(test_lookups.WORDS, 0), (-1, 2), *(pytest.param(i, 0, marks=pytest.mark.exhaustive) for i in (2**40, -(2**63)))],
)
def test_an_index_out_of_range_raises_what_the_core_does(index: int, place: int) -> None:
    model, batch = test_lookups.made("mean", torch.float32)
    batch[place][1, 2, 3] = index
    core, own = (refused(model, backend, batch) for backend in ("cpu", "triton-wide"))
    assert isinstance(own, IndexError)
    assert str(own) == str(core)
    batch[place][1, 2, 3] = 0
    assert MAML(model, 0.3, backend="triton-wide", check="never", allow_unused=True).backward(*batch).isfinite()


@pytest.mark.usefixtures("core")
def test_what_pytorch_would_refuse_raises_what_the_core_does() -> None:
    model, batch = test_lookups.made("one-hot", torch.float32)
    batch[0][1, 2] = 6
    core, own = (refused(model, backend, batch) for backend in ("cpu", "triton-wide"))
    assert isinstance(own, ValueError)
    assert str(own) == str(core)


def test_the_resident_variant_declines_what_is_given_or_drawn() -> None:
    for (model, batch), kinds in (
        (test_lookups.made("two", torch.float32), ("input", "lookup")),
        ((test_draws.made("dropout", torch.float32), test_draws.batch(torch.float32)), ("draw",)),
    ):
        batch = cast(batch, torch.float32)
        with pytest.raises(RuntimeError) as error:
            MAML(model, 0.3, backend="triton-resident", allow_unused=True).explain(*batch)
        for kind in kinds:
            assert f"layer {kind} has no instruction in the resident kernel" in str(error.value)
        assert "variant wide" in MAML(model, 0.3, backend="triton", allow_unused=True).explain(*batch)
