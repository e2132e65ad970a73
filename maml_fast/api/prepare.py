"""From a person's tensors to a plan: every check, the settings, and the plans made so far."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..algorithms.goal import Inner, Mode, Needs
from ..algorithms.gradients import Clip, Gradient
from ..algorithms.rules import OwnRule, Rule
from ..backends import dispatch, verbose
from ..backends.randomness import new_seed
from ..graph import losses, structure
from ..graph.conditions import check_storage
from ..graph.errors import warn
from ..graph.model import Adapts, Model
from ..graph.objective import Objective, Point
from ..graph.snapshot import common_device, common_dtype
from ..graph.stand_ins import lock, refuse_nested
from ..graph.starting import Start, trial
from ..graph.structure import Data
from ..lower.inputs import stand_in
from ..lower.plan import Plan, Rates, Result, Tensors
from . import batch as batches
from . import checks, reach
from .rates import LearningRates, RateLike
from .selfcheck import SelfCheck, when

try:
    from .._core import Guard, Situation
except ImportError:
    Guard = Situation = None  # type: ignore[assignment,misc]

MOST_PLANS, MOST_BYTES = 128, 1 << 31
"""Plans kept for one module, and the memory that they keep for their next calls; those not used lately go first."""


@dataclass(slots=True)
class Call:
    """What was decided for one set of shapes: the plan, and the backend that runs it.

    Attributes:
        used: since plans last had to go.
        seen: what the latest run found, where that can be compared at one look.
    """

    plan: Plan
    choice: dispatch.Choice
    used: bool = True
    seen: Seen | None = None

    def bytes(self) -> int:
        return self.choice.backend.held_bytes(self.plan)


@dataclass(slots=True)
class Seen:
    """What a call found that is known to be the same as long as all of this is.

    It stands in the call, so it does not hold the call: a plan that has to go goes at once.

    Attributes:
        situation: of the module, the loss and the batch; `parameters` are those that it has.
        guards: of model and loss. rates, state, learnable, outputs: see `Preparer`.
        constants: the rates' tensors, if none can change.
    """

    situation: Situation
    parameters: Sequence[Tensor]
    guards: tuple[Guard, Guard]
    rates: LearningRates
    constants: Sequence[Tensor] | None
    state: int
    learnable: tuple[bool, ...]
    outputs: bool


class StandIns(NamedTuple):
    """Tensors in place of those that model, rates and loss hold, and the settings of an earlier moment.

    Attributes:
        learned: in place of the loss's own parameters. state: what `Preparer.state` was then.
    """

    parameters: Sequence[Tensor]
    rates: Sequence[Tensor]
    learned: Sequence[Tensor]
    state: int


class Prepared(NamedTuple):
    """A checked call with its numbers, ready to run."""

    call: Call
    tensors: Tensors

    def leaves(self) -> Sequence[Tensor]:
        """What a gradient is taken with respect to: the parameters, and all else if the gradient of any is wanted."""
        return self.tensors.leaves() if self.call.plan.needs.beyond_parameters else self.tensors.parameters

    def gradients(self, result: Result) -> Sequence[Tensor | None]:
        """A result's, in the order of `leaves`."""
        return result.gradients() if self.call.plan.needs.beyond_parameters else result.parameters

    def run(self) -> Result:
        if torch.is_inference_mode_enabled():  # what is made now may be kept, and used outside
            with torch.inference_mode(False):
                return self.run()
        if verbose.RUNS:
            return verbose.timed(self.call.choice, self.tensors)
        return self.call.choice.backend.run(self.call.plan, self.tensors)


@dataclass(frozen=True)
class Settings:
    """What may be assigned on a `MAML` later; a plan is made for one set of them."""

    loss: losses.Loss
    steps: int
    step_weights: tuple[float, ...] | None
    first_order: bool
    allow_unused: bool | None
    backend: str
    tape_bytes: int
    threads: int | None
    precision: str
    check: str
    gradient: Gradient
    clip: Clip | None
    per_step: bool
    start: Start | None
    rule: Rule | OwnRule | None = None
    first: int = 0


CHECKED: dict[str, Callable[[Any], Any]] = {
    "loss": losses.resolve,
    "steps": checks.steps,
    "step_weights": checks.step_weights,
    "first_order": bool,
    "allow_unused": lambda value: value,
    "backend": dispatch.known,
    "tape_bytes": int,
    "threads": checks.threads,
    "precision": checks.precision,
    "check": when,
    "gradient": checks.gradient,
    "clip": checks.clip,
    "per_step": bool,
    "start": checks.start,
}
"""What checks and normalises the value of every setting, but of the inner rule, which comes with its numbers."""


def _stand_in_of(name: str, sets: int) -> Callable[[Tensor], Tensor]:
    """What makes the stand-ins of a part of the batch: of the support set, those of one inner step."""
    if name not in ("x_s", "y_s") or sets == 1:
        return stand_in
    return lambda value: stand_in(value[:, : value.shape[1] // sets])


def _seed_of(plan: Plan, seed: int | None) -> int | None:
    """The given seed, or a new one where the plan is known to draw random numbers."""
    return new_seed() if seed is None and plan.draws else seed


class Preparer:
    """Checks the calls on one module and finds their plans.

    Args:
        module: the user's network. adapts, learns: see `Model`.
        settings: the algorithm and how to run it. lr: the learning rates, if the rule takes them.
        settled: see `LearningRates`.
    """

    def __init__(
        self,
        module: nn.Module,
        adapts: Adapts,
        settings: Settings,
        lr: RateLike | None,
        settled: bool = False,
        learns: Adapts = None,
    ) -> None:
        self.handle = -1
        self.module = module
        self.adapts, self.learns = adapts, learns
        self.model = self._snapshot()
        self.rates = LearningRates(lr, self.model, settled, settings.rule)
        self._objectives: dict[losses.Loss, Objective] = {}
        self.objective = self.objective_of(settings.loss)
        self._settings = settings
        self._states: dict[tuple[Settings, Rates, Hashable], int] = {}
        self._first_state = 0
        self._plans: dict[Any, Call] = {}
        self._latest: dict[Mode, Call] = {}
        self._warned = False
        self._said: set[str] = set()
        self._selfcheck = SelfCheck()
        self._enter_state()

    @property
    def gradient(self) -> Gradient:
        """What the meta-gradient is of."""
        return self._settings.gradient

    @property
    def settings(self) -> Settings:
        """Those that there are."""
        return self._settings

    def set(self, name: str, value: Any) -> None:
        """Change one setting; plans made for other values stay for when those come back."""
        self._settings = replace(self._settings, **{name: value})
        if name == "backend":
            self._warned = False
        if name == "loss":
            if len(self._objectives) >= MOST_PLANS:
                self._forget()
            self.objective = self.objective_of(value)
        self._enter_state()

    def set_rates(self, lr: RateLike | None, rule: Rule | OwnRule | None, settled: bool = False) -> None:
        """Take another inner rule with its numbers, for the module as it is now."""
        model = self._snapshot() if self.model.restructured() else self.model
        rates = LearningRates(lr, model, settled, rule)
        self._settings = replace(self._settings, rule=rule)
        self._follow(model, rates)

    def plans(self) -> Iterator[Call]:
        """The calls planned so far, the least recently used first."""
        return iter(list(self._plans.values()))

    def _enter_state(self) -> None:
        """Number the settings: a small int is hashed at every call instead of all of them. No number comes again."""
        self._now = (self._settings, self.rates.shapes, self.rates.picture)
        self.state = self._states.setdefault(self._now, self._first_state + len(self._states))

    def state_with(self, other: Mapping[str, Any]) -> int:
        """The number of the settings with others in the place of some."""
        now = (replace(self._settings, **other), *self._now[1:])
        return self._states.setdefault(now, self._first_state + len(self._states))

    def settings_of(self, state: int) -> tuple[Settings, Rates]:
        """The settings with this number, and the shapes of the rates.

        Raises:
            RuntimeError: they are of a model that is no more.
        """
        for (settings, rates, _), number in self._states.items():
            if number == state:
                return settings, rates
        raise RuntimeError("maml_fast: the model was changed between the forward and the backward pass")

    def _snapshot(self) -> Model:
        for name, parameter in self.module.named_parameters():
            if is_lazy(parameter):
                raise ValueError(f"model: expected initialised parameters, got a lazy {name!r}; call the model once")
            if parameter.is_neg():
                raise ValueError(
                    f"model: expected numbers in memory, got {name!r} yet to be negated; use resolve_neg()"
                )
        model = Model(self.module, self.adapts, self.learns)
        if not model.names:
            raise ValueError(f"model: expected a module with parameters, got {type(self.module).__name__} without any")
        parameters = model.parameters()
        checks.model_dtype(common_dtype(parameters))
        common_device(parameters)
        return model

    def _follow_model(self) -> None:
        """Take the module as it is now, or raise and stay as before."""
        if self.model.restructured():
            model = self._snapshot()
            self._follow(model, self.rates.following(model))
        elif self.objective.learned.restructured():
            self._forget()
            self._enter_state()
        else:
            self.model.guards.refresh()
            self._follow_loss()

    def _follow_loss(self) -> None:
        """Take the loss as it is now: a module's options may have changed."""
        self.objective.guards.refresh()
        loss = losses.resolve(self._settings.loss.function)
        if loss != self._settings.loss:
            self.set("loss", loss)

    def _follow(self, model: Model, rates: LearningRates) -> None:
        changed = model is not self.model
        self.model, self.rates = model, rates
        if changed:
            self._forget()
        self._enter_state()

    def _forget(self) -> None:
        self._objectives.clear()
        self.objective = self.objective_of(self._settings.loss)
        self._plans.clear()
        self._latest.clear()
        self._first_state += len(self._states)
        self._states.clear()
        self._selfcheck = SelfCheck()

    def prepare(
        self,
        mode: Mode,
        x_s: Data | None,
        y_s: Data | None,
        x_q: Data | None = None,
        y_q: Data | None = None,
        outputs: bool = False,
        given: StandIns | None = None,
        seed: int | None = None,
        other: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """Check everything and find the plan.

        What depends on shapes and types alone is checked once for each combination of them.

        Args:
            outputs: whether a meta-gradient returns the query outputs too.
            given: takes the place of the parameters, rates and settings that there are.
            seed: of the random numbers; None for a new one.
            other: settings in the place of those that there are.
        """
        if not self.rates.holds():
            self._follow(self.model, self.rates.following(self.model))
        if given is None and not other and (again := self._again(mode, x_s, y_s, x_q, y_q, outputs, seed)) is not None:
            return again
        parameters = self._current_parameters()
        batch: tuple[Any, Any, Any, Any] = (x_s, y_s, x_q, y_q)
        if checks.transformed():
            given_tensors = batches.tensors(batch)
            checks.no_transform((*parameters, *self.rates.values, *self.objective.learned.parameters(), *given_tensors))
        state, learnable = self.state_with(other) if other else self.state, self.rates.learnable()
        states = self.model.guards.state, self.objective.guards.state
        if given is not None:
            parameters, state = given.parameters, given.state
            learnable = tuple([r.requires_grad for r in given.rates])
        first = parameters[0]
        key: Any
        try:
            key = (
                mode,
                state,
                *[None if v is None else (v.shape, v.dtype, v.device, v.requires_grad) for v in batch],
                first.dtype,
                first.device,
                *states,
                learnable,
                outputs,
            )
        except AttributeError:
            key = None
        call = None if key is None else self._plans.get(key)
        if call is None and not batches.is_plain(batch):
            batch = x_s, y_s, x_q, y_q = batches.taken(*batch)
            about = batches.key(batch)
            key = (mode, state, about, first.dtype, first.device, *states, learnable, outputs)
            call = None if about is None else self._plans.get(key)
        new = call is None
        start = perf_counter() if new else 0.0
        if call is None:
            settings, rate_shapes = self._now[:2] if state == self.state else self.settings_of(state)
            self._check_batch(mode, settings, *batch)
            present = {n: v for n, v in zip(("x_s", "y_s", "x_q", "y_q"), batch, strict=True) if v is not None}
            with torch.inference_mode(False):  # what is made now is kept, and used outside
                call = self._make_call(mode, settings, rate_shapes, learnable, outputs, present)
        call.used = True
        self._check_labels(call, y_s, y_q)
        if given is None:
            rates: Sequence[Tensor] = self.rates.tensors(first.dtype, first.device)
            learned: Sequence[Tensor] = self.objective.learned.parameters()
        else:
            rates, learned = given.rates, given.learned
        seed = _seed_of(call.plan, seed)
        tensors = Tensors(parameters, rates, x_s, y_s, x_q, y_q, learned=learned, seed=seed)
        if new or self._settings.check == "always":
            with torch.inference_mode(False):
                call = Call(call.plan, self._selfcheck.settle(call.choice, tensors, self._settings.check))
            self._keep(key, call)
        if given is None and not other:
            self._remember(call, parameters, batch, (state, *states, learnable), outputs)
        if new and verbose.PLANS:
            verbose.planned(call.choice, start)
        return Prepared(call, tensors)

    def _again(
        self,
        mode: Mode,
        x_s: Data | None,
        y_s: Data | None,
        x_q: Data | None,
        y_q: Data | None,
        outputs: bool,
        seed: int | None,
    ) -> Prepared | None:
        """The latest call of this mode with other numbers; None if anything else may differ from what it found."""
        call = self._latest.get(mode)
        if call is None or (seen := call.seen) is None or not self._is_current(seen, outputs) or checks.transformed():
            return None
        with lock:
            refuse_nested(self.objective.modules)
            if not seen.situation.holds(x_s, y_s, x_q, y_q):
                return None
            self._settle()
        call.used = True
        self._check_labels(call, y_s, y_q)
        rates = seen.constants
        if rates is None:
            rates = self.rates.tensors(call.plan.dtype, call.plan.device)
        return Prepared(call, Tensors(seen.parameters, rates, x_s, y_s, x_q, y_q, seed=_seed_of(call.plan, seed)))

    def _is_current(self, seen: Seen, outputs: bool) -> bool:
        """Whether what was seen was of the present guards, rates and settings."""
        return (
            seen.state == self.state
            and seen.rates is self.rates
            and seen.guards[0] is self.model.guards.quick
            and seen.guards[1] is self.objective.guards.quick
            and seen.outputs == outputs
            and (seen.constants is not None or seen.learnable == self.rates.learnable())
        )

    def _remember(
        self, call: Call, parameters: Sequence[Tensor], batch: Sequence[Any], found: tuple[Any, ...], outputs: bool
    ) -> None:
        """Have the next call of this plan compared at one look, if everything can be.

        Args:
            found: the state, those of both guards, and the learnable rates by which the call was found.
        """
        if call.seen is None or not self._is_current(call.seen, outputs):
            call.seen = self._seen(call, parameters, batch, found, outputs)
        self._latest[call.plan.mode] = call

    def _seen(
        self, call: Call, parameters: Sequence[Tensor], batch: Sequence[Any], found: tuple[Any, ...], outputs: bool
    ) -> Seen | None:
        with lock:  # another thread's call may have met another state meanwhile
            rates, of_model, of_loss = self.rates, self.model.guards, self.objective.guards
            learnable = rates.learnable()
            if found != (self.state, of_model.state, of_loss.state, learnable):
                return None
            if of_model.quick is None or of_loss.quick is None or self.objective.learned.modules:
                return None
            if self._settings.check == "always" or not batches.is_plain(batch):
                return None
            try:
                situation = Situation(of_model.quick, of_loss.quick, list(parameters), list(batch))
            except (RuntimeError, TypeError, BufferError, ValueError):  # memory of no kind that the core knows
                return None
            constants = rates.tensors(call.plan.dtype, call.plan.device) if rates.all_constant else None
            guards = of_model.quick, of_loss.quick
            return Seen(situation, parameters, guards, rates, constants, self.state, learnable, outputs)

    def _current_parameters(self) -> Sequence[Tensor]:
        """The model's parameters, after a look at whether model and loss are what the plans were made for."""
        with lock:
            refuse_nested(self.objective.modules)
            guards, of_loss = self.model.guards, self.objective.guards
            parameters = self.model.as_they_were() if guards.hold() and of_loss.hold() else None
            if parameters is None or self.objective.learned.restructured():
                self._follow_model()
                return self.model.parameters()
            self._settle()
            return parameters

    def _settle(self) -> None:
        """A call found model and loss as the one before it did."""
        if self.model.guards.moving or self.objective.guards.moving:
            self.model.guards.settle()
            self.objective.guards.settle()

    def _keep(self, key: Any, call: Call) -> None:
        self._plans.pop(key, None)
        self._latest.clear()
        while self._plans and (len(self._plans) >= MOST_PLANS or self._bytes() > MOST_BYTES):
            self._forget_one()
        self._plans[key] = call

    def _bytes(self) -> int:
        return sum(call.bytes() for call in self._plans.values())

    def _forget_one(self) -> None:
        """Drop the oldest plan that was not used lately; those that were get behind the others once more."""
        for key, call in list(self._plans.items()):
            self._plans.pop(key, None)
            if not call.used:
                return
            call.used = False
            self._plans[key] = call
        self._plans.pop(next(iter(self._plans), None), None)

    def weights(self, plan: Plan, reduction: str) -> Tensor:
        """Weight of each task's loss in the reduced one; made once, never written."""
        key = f"weights {reduction}"
        weights = plan.state.get(key)
        if weights is None:
            value = 1.0 / plan.tasks if reduction == "mean" else 1.0
            with torch.inference_mode(False):  # they outlive the caller's modes
                weights = plan.state[key] = torch.full((plan.tasks,), value, dtype=plan.dtype, device=plan.device)
        assert isinstance(weights, Tensor)
        return weights

    def output_of(self, parameters: Sequence[Tensor], learned: Sequence[Tensor], x: Tensor) -> Any:
        """The model's output for the first task's samples; shapes are all that the caller wants."""
        buffers = [x.new_empty(b.shape, dtype=b.dtype) for b in self.objective.buffers()]
        return self.objective.outputs(Point(parameters, learned, buffers), x[0])

    def _check_batch(self, mode: Mode, settings: Settings, x_s: Any, y_s: Any, x_q: Any, y_q: Any) -> None:
        parameters = self.model.parameters()
        dtype, device, loss = common_dtype(parameters), common_device(parameters), settings.loss
        (of_s, of_q), (x_s, x_q) = (x_s, x_q), map(structure.unweighted, (x_s, x_q))
        if not mode.applies:
            self.rates.check_steps(settings.first + settings.steps, exactly=not mode.adapts)
            checks.data_fits(settings.gradient, settings.per_step, settings.start is not None, mode)
            checks.gradient_fits(settings.gradient, settings.step_weights, mode, self.rates.learnable())
            checks.inputs("x_s", x_s, dtype, device)
            checks.weights("weights_s", "x_s", of_s, dtype)
            checks.targets("y_s", y_s, "x_s", x_s, loss, dtype)
        if not mode.adapts:
            checks.inputs("x" if mode is Mode.APPLY else "x_q", x_q, dtype, device)
            checks.weights("weights_q", "x_q", of_q, dtype)
        if x_s is not None and x_q is not None:
            checks.same_tasks(x_s, x_q)
        if mode.scores:
            checks.targets("y_q", y_q, "x_q", x_q, loss, dtype)
        if mode.scores and not mode.applies:
            checks.one_weight_per_step(settings.step_weights, settings.steps)
            checks.same_structure("y_q", y_q, "y_s", y_s)

    def _check_labels(self, call: Call, y_s: Any, y_q: Any) -> None:
        """Fused kernels would index by labels; to PyTorch some of those out of range mean something."""
        classes = call.plan.classes
        if classes is not None and (call.plan.inner.loss.takes_labels or call.choice.backend.fused):
            plan = call.plan
            checks.all_labels_in_range(classes, plan.ignored, y_s=plan.labels_in(y_s), y_q=plan.labels_in(y_q))

    def _make_call(
        self,
        mode: Mode,
        settings: Settings,
        rates: Rates,
        learnable: tuple[bool, ...],
        outputs: bool,
        batch: Mapping[str, Data],
    ) -> Call:
        x_s, x_q = (tuple(v.requires_grad for v in structure.tensors(batch.get(name))) for name in ("x_s", "x_q"))
        learned = self.objective_of(settings.loss).learned.trainable
        needs = Needs(self.model.learns, learnable, any(x_s), any(x_q), learned, outputs, x_s, x_q)
        plan = self._make_plan(mode, settings, rates, needs, batch)
        self._look(plan, settings, batch)
        choice = dispatch.choose(plan, settings.backend)
        if settings.backend == "auto" and not self._warned and not choice.backend.fused:
            dispatch.warn_of_fallback(choice)
            self._warned = True
        return Call(plan, choice)

    def _look(self, plan: Plan, settings: Settings, batch: Mapping[str, Data]) -> None:
        """Refuse what no backend could do, and what would be computed but not learned; keep what `explain` says."""
        for name, data in batch.items():
            for leaf, tensor in structure.named(name, data):
                check_storage(leaf, tensor)
        if plan.out_shape is not None:
            for name in [name for name in ("y_s", "y_q") if name in batch]:
                checks.target_shape(name, structure.first(batch[name]), plan.out_shape, settings.loss)
        if plan.inner.loss.takes_labels and plan.classes is not None:
            given = {name: plan.labels_in(batch.get(name)) for name in ("y_s", "y_q")}
            checks.all_labels_in_range(plan.classes, plan.ignored, **given)
        found = reach.look(plan, batch)
        reach.check(plan, found, settings.allow_unused)
        plan.state["notes"] = reach.notes(found)
        if (said := reach.stale(found)) and said not in self._said:
            self._said.add(said)
            warn(said)

    def objective_of(self, loss: losses.Loss) -> Objective:
        """Made once for each loss: the numbers of its guards' states must not come again."""
        found = self._objectives.get(loss)
        return found or self._objectives.setdefault(loss, Objective(self.model, loss))

    def _make_plan(self, mode: Mode, settings: Settings, rates: Rates, needs: Needs, batch: Mapping[str, Data]) -> Plan:
        x_s, x_q = (structure.tensors(batch.get(name)) for name in ("x_s", "x_q"))
        x = (x_s or x_q)[0]
        sets = settings.steps if settings.per_step and x_s else 1
        starts = self._starts(mode, settings, batch, sets)
        return Plan(
            mode=mode,
            model=self.model,
            objective=self.objective_of(settings.loss),
            inner=Inner(
                settings.loss,
                settings.steps,
                settings.first_order,
                settings.step_weights,
                settings.rule,
                settings.gradient,
                settings.clip,
                settings.start if starts else None,
                settings.first,
            ),
            rates=rates,
            needs=needs,
            tasks=x.shape[0],
            support=x_s[0].shape[1] // sets if x_s else 0,
            query=x_q[0].shape[1] if x_q else 0,
            data={name: structure.mapped(value, _stand_in_of(name, sets)) for name, value in batch.items()},
            dtype=common_dtype(self.model.parameters()),
            device=x.device,
            tape_bytes=settings.tape_bytes,
            threads=settings.threads,
            precision=settings.precision,
            sets=sets,
            starts=starts,
        )

    def _starts(self, mode: Mode, settings: Settings, batch: Mapping[str, Data], sets: int) -> tuple[bool, ...]:
        """Which parameters start from the data, as the first task's show; empty for none."""
        if settings.start is None or mode.applies or mode is Mode.STEP:
            return ()
        x, y = (structure.mapped(batch[name], lambda v: v[0, : v.shape[1] // sets].detach()) for name in ("x_s", "y_s"))
        found = trial(self.objective_of(settings.loss), settings.start, x, y)
        return found if any(found) else ()
