"""MAML and first-order MAML (Finn et al., arXiv 1703.03400) as a `Program`; L = Σ_k w_k L_q(θ_k), with w_K = 1 alone or
all of them (MAML++, Antoniou et al., arXiv 1810.09502).

θ_{k+1} = θ_k − α ∘ g_k,  g_k = ∇L_s(θ_k)
λ_K = w_K ∇L_q(θ_K),  λ_k = λ_{k+1} − H_k (α ∘ λ_{k+1}) + w_k ∇L_q(θ_k)
dL/dθ_0 = λ_0,        dL/dα = − Σ_k g_k ∘ λ_{k+1}
"""

from __future__ import annotations

from .goal import Goal, Mode, weights_of
from .program import (
    Accumulate,
    Add,
    Backward,
    Batch,
    Cotangent,
    Forward,
    Hvp,
    Instruction,
    Load,
    Program,
    QueryLoss,
    RateGradient,
    Scale,
    StoreOutputs,
    StoreParameters,
    Subtract,
    SupportLoss,
    Update,
)


def emit(goal: Goal, save: bool = True) -> Program:
    """The goal as a program.

    Args:
        goal: what to compute.
        save: keep every inner step's tape; otherwise recompute it in the reverse sweep.
    """
    return _Emitter(goal, save).program()


class _Emitter:
    def __init__(self, goal: Goal, save: bool) -> None:
        self.goal = goal
        self.code: list[Instruction] = []
        self.slots = 1
        self.tapes: list[Batch] = []
        self.weights = weights_of(goal)
        self.steps = len(self.weights) - 1
        self.pulled: dict[int, int] = {}  # by step: the slot of w_k ∇L_q(θ_k)
        self.scored = False
        self.query_tape = -1
        self.reverse = goal.mode in (Mode.META_GRADIENT, Mode.VJP)
        self.second_order = self.reverse and not goal.inner.first_order
        self.rate_gradients = self.reverse and any(goal.needs.rates)
        self.save = save or not self.second_order

    def program(self) -> Program:
        if self.goal.mode is Mode.APPLY:
            self._apply()
        elif self.goal.mode is Mode.ADAPT:
            self.code.append(StoreParameters(self._inner_loop()[-1]))
        else:
            self._query(self._inner_loop())
        return Program(tuple(self.code), self.slots, tuple(self.tapes))

    def _slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def _tape(self, batch: Batch) -> int:
        self.tapes.append(batch)
        return len(self.tapes) - 1

    def _rates(self, step: int) -> int:
        """The step's set of rates."""
        return step if self.goal.rate_sets > 1 else 0

    def _apply(self) -> None:
        theta, tape = self._slot(), self._tape(Batch.QUERY)
        self.code += [Load(theta), Forward(theta, Batch.QUERY, tape), StoreOutputs(tape)]

    def _inner_loop(self) -> list[int]:
        """θ_0 … θ_K; fills `self.support_tapes` and `self.gradients`, one a step."""
        thetas = [0]
        self.support_tapes: list[int] = []
        self.gradients: list[int] = []
        keep_tapes = self.second_order and self.save
        for k in range(self.steps):
            if self.weights[k]:
                self._score(k, thetas[k])
            tape = self._tape(Batch.SUPPORT) if keep_tapes or k == 0 else self.support_tapes[0]
            gradient = self._slot() if self.rate_gradients or k == 0 else self.gradients[0]
            self._support_pass(k, thetas[k], tape, gradient)
            following = self._slot() if self.second_order or k == 0 else thetas[1]
            self.code.append(Update(following, thetas[k], gradient, self._rates(k)))
            thetas.append(following)
            self.support_tapes.append(tape)
            self.gradients.append(gradient)
        return thetas

    def _support_pass(self, step: int, theta: int, tape: int, gradient: int | None) -> None:
        self.code += [
            Forward(theta, Batch.SUPPORT, tape, step),
            SupportLoss(tape),
            Backward(theta, Batch.SUPPORT, tape, gradient),
        ]

    def _query(self, thetas: list[int]) -> None:
        goal, last = self.goal, thetas[-1]
        if goal.mode in (Mode.LOSS, Mode.META_GRADIENT):
            if self.weights[-1] or not self.scored:
                self._score(self.steps, last)
            elif goal.needs.outputs:
                self._forward(last)
        else:
            self._forward(last)
        if goal.mode is Mode.QUERY_OUTPUTS or goal.needs.outputs:
            self.code.append(StoreOutputs(self.query_tape))
        if goal.mode is Mode.VJP:
            self.code.append(Cotangent(self.query_tape))
            self._pull(self.steps, last)
        if self.reverse:
            self._reverse_sweep(thetas)

    def _forward(self, theta: int) -> None:
        if self.query_tape < 0:
            self.query_tape = self._tape(Batch.QUERY)
        self.code.append(Forward(theta, Batch.QUERY, self.query_tape))

    def _score(self, step: int, theta: int) -> None:
        """The query loss at θ_k, and its gradient."""
        self._forward(theta)
        self.code.append(QueryLoss(self.query_tape, self.reverse, self.weights[step], add=self.scored))
        self.scored = True
        if self.reverse:
            self._pull(step, theta)

    def _pull(self, step: int, theta: int) -> None:
        slot = self.pulled[step] = self._slot()
        self.code.append(Backward(theta, Batch.QUERY, self.query_tape, slot, inputs=self.goal.needs.x_q))

    def _reverse_sweep(self, thetas: list[int]) -> None:
        last = max(self.pulled)
        adjoint = self.pulled[last]
        if self.second_order and last:
            vector, product = self._slot(), self._slot()
        for k in reversed(range(last)):
            if self.rate_gradients:
                self.code.append(RateGradient(self.gradients[k], adjoint, self._rates(k)))
            if self.second_order:
                if not self.save and k < self.steps - 1:
                    self._support_pass(k, thetas[k], self.support_tapes[k], None)
                self.code += [
                    Scale(vector, adjoint, self._rates(k)),
                    Hvp(thetas[k], self.support_tapes[k], vector, product, inputs=self.goal.needs.x_s),
                    Subtract(adjoint, product),
                ]
            if k in self.pulled:
                self.code.append(Add(adjoint, self.pulled[k]))
        self.code.append(Accumulate(adjoint))
