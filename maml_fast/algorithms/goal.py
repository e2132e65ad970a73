"""What a call must compute, before anything is known of how."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from ..cached import cached_property
from ..graph.losses import Loss
from ..graph.starting import Start
from .gradients import UNROLLED, Clip, Gradient, Implicit, Unrolled
from .rules import SGD, OwnRule, Rule
from .updates import Updates


class Mode(enum.Enum):
    """What a call computes."""

    LOSS = "loss"  # query losses (T,)
    META_GRADIENT = "meta_gradient"  # Σ_t w_t L_t and its gradient
    QUERY_OUTPUTS = "query_outputs"  # query outputs (T, Nq, *out)
    VJP = "vjp"  # the gradient of ⟨c, query outputs⟩ for a given cotangent c
    ADAPT = "adapt"  # adapted parameters, each (T, *shape)
    APPLY = "apply"  # outputs of given per-task parameters
    STEP = "step"  # adapted parameters, going on from given ones with the rule's state
    SCORE = "score"  # query losses (T,) of given per-task parameters

    @property
    def differentiates(self) -> bool:
        """Whether a gradient is wanted."""
        return self in (Mode.META_GRADIENT, Mode.VJP)

    @property
    def applies(self) -> bool:
        """Whether all parameters are given for each task, and none adapts."""
        return self in (Mode.APPLY, Mode.SCORE)

    @property
    def adapts(self) -> bool:
        """Whether adapted parameters and the rule's state are what it returns."""
        return self in (Mode.ADAPT, Mode.STEP)

    @property
    def scores(self) -> bool:
        """Whether it computes query losses."""
        return self in (Mode.LOSS, Mode.META_GRADIENT, Mode.SCORE)

    __hash__ = object.__hash__  # Enum's own is Python, and hashed in every call


@dataclass(frozen=True)
class Inner:
    """The inner loop: θ_{k+1} = θ_k − α ∘ ∇L(θ_k) for k = 0 … steps − 1.

    Attributes:
        step_weights: w_k of the query loss at θ_k, for k = 0 … steps; None for that at the last alone.
        rule: how a step moves the parameters; None for the above.
        gradient: what the meta-gradient is of. clip: of every inner gradient.
        start: from θ and the task's support set to parameters that do not start from θ; None where there are none.
        first: how many inner steps came before, in earlier calls.
    """

    loss: Loss
    steps: int
    first_order: bool
    step_weights: tuple[float, ...] | None = None
    rule: Rule | OwnRule | None = None
    gradient: Gradient = UNROLLED
    clip: Clip | None = None
    start: Start | None = None
    first: int = 0

    @property
    def whole_rule(self) -> Rule | OwnRule | None:
        """The rule, also where plain gradient descent descends something else than the loss's gradient."""
        if self.rule is None and (self.clip is not None or isinstance(self.gradient, Implicit)):
            return SGD(lr=None)  # its number comes with the call
        return self.rule

    @property
    def unrolls(self) -> bool:
        """Whether the meta-gradient goes back through the inner steps."""
        return isinstance(self.gradient, Unrolled)

    @property
    def curved_from(self) -> int:
        """The first of the inner steps whose second derivatives count; their number for none."""
        if self.first_order or not isinstance(self.gradient, Unrolled):
            return self.steps
        return self.gradient.curved_from(self.steps)

    def weights(self, steps: int) -> tuple[float, ...]:
        """w_k for k = 0 … steps: `self.steps`, or 0 where nothing adapts and all θ_k are θ_0."""
        if self.step_weights is None:
            return (*(0.0,) * steps, 1.0)
        return self.step_weights if steps == self.steps else (sum(self.step_weights),)


@dataclass(frozen=True)
class Needs:
    """Which gradients a call must return, and whether it returns the query outputs beside them.

    Attributes:
        x_s, x_q: whether any of inputs is among them. x_s_each, x_q_each: which, where there are several.
        learned: those of the loss's own parameters.
    """

    parameters: tuple[bool, ...]
    rates: tuple[bool, ...]
    x_s: bool
    x_q: bool
    learned: tuple[bool, ...] = ()
    outputs: bool = False
    x_s_each: tuple[bool, ...] = ()
    x_q_each: tuple[bool, ...] = ()

    @cached_property
    def beyond_parameters(self) -> bool:
        """Whether any gradient is wanted but those of the model's parameters."""
        return any(self.rates) or self.x_s or self.x_q or any(self.learned)

    @cached_property
    def gradients(self) -> bool:
        """Whether any gradient is wanted."""
        return any(self.parameters) or self.beyond_parameters


class Goal(Protocol):
    """What an algorithm reads of a plan.

    Attributes:
        adapts: which parameters the inner loop updates, in `Model.names` order.
        active: which of them have a gradient.
        rate_sets: how many sets of rates there are: one for all steps, or one for each.
        starts: which parameters start from the task's data; empty for none, as in modes that are given them.
        updates: the steps of an inner rule; None for those of plain gradient descent.
    """

    @property
    def mode(self) -> Mode: ...
    @property
    def inner(self) -> Inner: ...
    @property
    def needs(self) -> Needs: ...
    @property
    def adapts(self) -> tuple[bool, ...]: ...
    @property
    def active(self) -> tuple[bool, ...]: ...
    @property
    def rate_sets(self) -> int: ...
    @property
    def starts(self) -> tuple[bool, ...]: ...
    @property
    def updates(self) -> Updates | None: ...


def weights_of(goal: Goal) -> tuple[float, ...]:
    """w_k of the query loss at every θ_k that the call needs, up to its last; without losses 1 at the last alone."""
    steps = goal.inner.steps if any(goal.adapts) and not goal.mode.applies else 0
    if goal.mode not in (Mode.LOSS, Mode.META_GRADIENT):
        return (*(0.0,) * steps, 1.0)
    weights = goal.inner.weights(steps)
    last = max((k for k, w in enumerate(weights) if w), default=0)
    return weights if goal.needs.outputs else weights[: last + 1]
