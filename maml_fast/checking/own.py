"""`verify`: every backend against the float64 textbook on a person's own model and data."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..api.maml import MAML
from ..backends import dispatch
from ..backends.agreement import error_over, judge, order_of, roundings, sizes_of
from ..backends.randomness import states, undisturbed
from ..cached import cached_property
from ..graph import structure
from ..graph.copies import cast, functions_in
from ..graph.errors import first_line
from ..graph.snapshot import common_device, common_dtype
from ..graph.structure import Data
from .observe import observe_calls
from .report import Line, Report

Batch: TypeAlias = tuple[Data, Data, Data, Data]
Move: TypeAlias = Callable[[Tensor], Tensor]

Found: TypeAlias = Mapping[str, tuple[str, Sequence[Tensor]]]
"""Results by name: the class of which each is a part, and its tensors."""


def verify(model: nn.Module, x_s: Data, y_s: Data, x_q: Data, y_q: Data, **maml_kwargs: Any) -> Report:
    """Hold every backend that can run the model against the textbook in float64, on the person's own data.

    Every result of every call (loss, outputs, adapted parameters, the meta-gradient of each parameter, rate and input)
    may be off by at most twice what the textbook itself is off in the model's dtype, plus a floor of a few roundings.
    The error of a parameter is ‖a − r‖ / ‖R‖, where R is the whole gradient. A float32 model is verified in float64
    too, where much smaller mistakes show.

    Args:
        model: the network. It, its gradients and its buffers stay as they are: copies run.
        x_s, y_s, x_q, y_q: a meta-batch (shapes: see `MAML`).
        maml_kwargs: what `MAML` takes. Where none names the order, first and second order are verified. `backend`
            restricts the check to one backend.

    Returns:
        A report that prints as a table; `report.ok` tells whether all agree.

    Raises:
        RuntimeError: the model cannot be copied, or draws random numbers, so that no two calls agree.
        TypeError, ValueError: what `MAML` raises for these arguments.
    """
    problem = Problem(model, (x_s, y_s, x_q, y_q), maml_kwargs)
    problem.check()
    return examine(problem)


class Problem:
    """A person's model, meta-batch and settings, of which copies are made.

    Raises:
        ValueError: no backend of the name in the settings.
    """

    def __init__(self, model: nn.Module, batch: Batch, settings: Mapping[str, Any]) -> None:
        self._model, self._batch, self._settings = model, batch, dict(settings)
        self._settings.pop("check", None)
        self.backend = dispatch.known(self._settings.pop("backend", "auto"))
        self.steps = int(self._settings.get("steps", 1))
        parameters = list(model.parameters())
        self.dtype, self.device = common_dtype(parameters), common_device(parameters)

    @property
    def terms(self) -> int:
        """How many terms a task's loss sums."""
        return max(v[:1].numel() for y in (self._batch[1], self._batch[3]) for v in structure.tensors(y))

    @property
    def backends(self) -> list[str]:
        """Names of the backends to verify."""
        return [n for n in dispatch.COMPARED if n != "reference"] if self.backend == "auto" else [self.backend]

    @property
    def orders(self) -> tuple[bool, ...]:
        """The values of `first_order` to verify."""
        if "first_order" in self._settings:
            return (bool(self._settings["first_order"]),)
        return (False, True) if "gradient" not in self._settings else (False,)

    def check(self) -> None:
        """Raise what `MAML` raises for these arguments."""
        model, batch, settings = self._copy(self.dtype, None)
        MAML(model, backend="reference", check="never", **settings).explain(*batch)

    def observe(self, backend: str, dtype: torch.dtype, first_order: bool, move: Move | None = None) -> Found:
        """Everything that the calls return, computed by the backend with a copy in `dtype`.

        Args:
            move: what is done to every floating-point tensor first.

        Raises:
            Declined: the backend cannot run the model.
        """
        with nullcontext() if dtype == self.dtype else _default_dtype(dtype):
            return self._observe(backend, dtype, first_order, move)

    def _observe(self, backend: str, dtype: torch.dtype, first_order: bool, move: Move | None) -> Found:
        model, batch, settings = self._copy(dtype, move)
        if "gradient" not in settings:
            settings["first_order"] = first_order
        maml = MAML(model, backend=backend, check="never", **settings)
        _refuse(maml, batch)
        parameters: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        learned = maml._preparer.objective.learned
        parameters |= {f"loss.{n}": p for n, p in learned.named(learned.parameters()).items() if p.requires_grad}
        rates = _rates(settings.get("lr"))
        results = observe_calls(maml, batch, [*parameters.values()], [*rates.values()])
        return _named(results, list(parameters), list(rates))

    def _copy(self, dtype: torch.dtype, move: Move | None) -> tuple[nn.Module, Batch, dict[str, Any]]:
        """The model, the batch and the settings; as far as no cast is needed, the batch is the person's own memory."""
        loss = self._settings.get("loss")
        modules = [*self._model.modules(), *(loss.modules() if isinstance(loss, nn.Module) else ())]
        functions = [loss, self._settings.get("start"), *functions_in(modules)]
        model, settings = cast((self._model, self._settings), self.dtype, dtype, functions)
        x_s, y_s, x_q, y_q = (
            structure.mapped(v, partial(_as_dtype, source=self.dtype, target=dtype)) for v in self._batch
        )
        if move is not None:
            x_s, y_s, x_q, y_q = (structure.mapped(v, move) for v in (x_s, y_s, x_q, y_q))
            with torch.no_grad():
                for value in (*model.parameters(), *_rates(settings.get("lr")).values()):
                    value.copy_(move(value))
        return model, (x_s, y_s, x_q, y_q), settings


class Declined(Exception):
    """The backend cannot run the model; the message holds every reason."""


def _refuse(maml: MAML, batch: Batch) -> None:
    try:
        maml.explain(*batch)
    except RuntimeError as error:
        if not str(error).startswith("backend "):
            raise
        raise Declined("; ".join(str(error).split("\n  - ")[1:])) from None


def _rates(lr: Any) -> dict[str, Tensor]:
    """The learnable rates by name."""
    named = {f"lr[{name!r}]": v for name, v in lr.items()} if isinstance(lr, Mapping) else {"lr": lr}
    return {name: v for name, v in named.items() if isinstance(v, Tensor) and v.requires_grad}


def _as_dtype(value: Tensor, source: torch.dtype, target: torch.dtype) -> Tensor:
    return value.detach().to(target) if value.dtype == source else value.detach()


def _named(results: Mapping[str, tuple[Tensor, ...]], parameters: list[str], rates: list[str]) -> dict[str, Any]:
    """A name for every result of its own: each parameter's and each rate's gradient stands alone."""
    found: dict[str, Any] = {}
    for kind, values in results.items():
        names = {"parameters": parameters, "rates": rates}.get(kind)
        if names is None:
            found[_LABELS.get(kind, kind)] = (kind, values)
        else:
            found |= {f"gradient of {n}": (kind, (v,)) for n, v in zip(names, values, strict=True)}
    return found


_LABELS = {
    "logits": "outputs",
    "adapted": "adapted parameters",
    "adapted logits": "adapted outputs",
    "x_s": "gradient of x_s",
    "x_q": "gradient of x_q",
    "pullback": "gradient of outputs",
    "backward": "gradient by backward()",
}


def _errors(found: Found, reference: Found) -> dict[str, float]:
    """Relative errors by name; the error of a part is relative to its whole class."""
    wholes: dict[str, list[Tensor]] = {}
    for kind, values in reference.values():
        wholes.setdefault(kind, []).extend(values)
    sizes = sizes_of(wholes)
    return {name: error_over(values, reference[name][1], sizes[kind]) for name, (kind, values) in found.items()}


class Oracle:
    """The textbook's results for one order of derivative, and what it is off itself in each dtype."""

    def __init__(self, problem: Problem, first_order: bool) -> None:
        self._problem, self._first_order = problem, first_order
        self.note = ""

    @cached_property
    def exact(self) -> Found:
        """The results in float64, or in the model's dtype where the model cannot run in float64."""
        problem = self._problem
        try:
            return self._observe(torch.float64)
        except Exception as error:  # the person's forward may raise anything
            if problem.dtype == torch.float64:
                raise
            own = self._observe(problem.dtype)
            self.note = (
                f"compared with the textbook in {problem.dtype}: the model cannot run in float64 ({first_line(error)})"
            )
            return own

    def own_errors(self, dtype: torch.dtype) -> Iterator[Mapping[str, float]]:
        """What the textbook is off in `dtype`: on the problem, then on the problem moved by roundings."""
        if dtype == torch.float64:
            peer = self._peer()
            if peer is not None:
                scale = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
                yield {name: scale * error for name, error in peer.items()}
        elif not self.note:
            yield _errors(self._observe(dtype), self.exact)
        for rounding in roundings(dtype):
            yield _errors(self._observe(dtype, rounding), self.exact)

    def _peer(self) -> Mapping[str, float] | None:
        """The errors in float32, which stand for those of float64, above which there is no oracle."""
        try:
            return _errors(self._observe(torch.float32), self.exact)
        except Exception:  # a model made for float64 alone
            return None

    def _observe(self, dtype: torch.dtype, move: Move | None = None) -> Found:
        return self._problem.observe("reference", dtype, self._first_order, move)

    def refuse_randomness(self) -> None:
        """Raise RuntimeError if two calls of the textbook differ."""
        before = states(self._problem.device)
        reference = self.exact
        if states(self._problem.device) == before:
            return
        again = self._observe(self._problem.dtype if self.note else torch.float64)
        if any(_errors(again, reference).values()):
            raise RuntimeError(
                "verify: the model draws random numbers, so that no two calls agree; call eval() or set dropout to 0"
            )


def examine(
    problem: Problem,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    quick: bool = False,
) -> Report:
    """Compare the backends, by default all, in the dtypes, by default the model's and float64.

    Args:
        quick: what is within the floor is not measured against PyTorch's own error, which costs as much again.
    """
    backends = backends or problem.backends
    dtypes = dtypes or tuple(dict.fromkeys((problem.dtype, torch.float64)))
    lines: list[Line] = []
    notes: list[str] = []
    with undisturbed(problem.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for first_order in problem.orders:
            oracle = Oracle(problem, first_order)
            oracle.refuse_randomness()
            usable = [dtype for dtype in dtypes if not oracle.note or dtype == problem.dtype]
            for backend, dtype in itertools.product(backends, usable):
                lines += _compare(problem, oracle, backend, dtype, first_order, quick)
            notes += [oracle.note] if oracle.note else []
    return Report(tuple(lines), tuple(dict.fromkeys(notes)))


def _compare(
    problem: Problem, oracle: Oracle, backend: str, dtype: torch.dtype, first_order: bool, quick: bool
) -> list[Line]:
    labels = backend, _short(dtype), "first" if first_order else "second"
    try:
        found = problem.observe(backend, dtype, first_order)
    except Declined as reasons:
        return [Line(*labels, "", declined=str(reasons))]
    except Exception as error:  # a crash of one backend is a line of the report, not its end
        return [Line(*labels, f"raised {type(error).__name__}: {first_line(error)}", math.inf)]
    orders = {name: order_of(kind, problem.steps, first_order) for name, (kind, _) in found.items()}
    floor: list[Mapping[str, float]] = [dict.fromkeys(found, 0.0)] if quick else []
    own = itertools.chain(floor, oracle.own_errors(dtype))
    errors = judge(_errors(found, oracle.exact), own, orders, dtype, problem.terms)
    return [Line(*labels, error.kind, error.value, error.limit) for error in errors]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors that a forward makes without naming a dtype have the model's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
