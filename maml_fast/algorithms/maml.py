"""MAML and first-order MAML (Finn et al., arXiv 1703.03400) as a `Program`.

θ_{k+1} = θ_k − α ∘ g_k,  g_k = ∇L_s(θ_k)
λ_K = ∇L_q(θ_K),  λ_k = λ_{k+1} − H_k (α ∘ λ_{k+1})
dL/dθ_0 = λ_0,    dL/dα = − Σ_k g_k ∘ λ_{k+1}
"""

from __future__ import annotations

from .goal import Goal, Mode
from .program import (
    Accumulate,
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
        self.steps = goal.inner.steps if any(goal.adapts) else 0
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
            tape = self._tape(Batch.SUPPORT) if keep_tapes or k == 0 else self.support_tapes[0]
            gradient = self._slot() if self.rate_gradients or k == 0 else self.gradients[0]
            self._support_pass(k, thetas[k], tape, gradient)
            following = self._slot() if self.second_order or k == 0 else thetas[1]
            self.code.append(Update(following, thetas[k], gradient))
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
        goal, tape = self.goal, self._tape(Batch.QUERY)
        self.code.append(Forward(thetas[-1], Batch.QUERY, tape))
        if goal.mode is Mode.QUERY_OUTPUTS or goal.needs.outputs:
            self.code.append(StoreOutputs(tape))
        if goal.mode is Mode.VJP:
            self.code.append(Cotangent(tape))
        elif goal.mode is not Mode.QUERY_OUTPUTS:
            self.code.append(QueryLoss(tape, seed=self.reverse))
        if self.reverse:
            adjoint = self._slot()
            self.code.append(Backward(thetas[-1], Batch.QUERY, tape, adjoint, inputs=goal.needs.x_q))
            self._reverse_sweep(thetas, adjoint)
            self.code.append(Accumulate(adjoint))

    def _reverse_sweep(self, thetas: list[int], adjoint: int) -> None:
        if self.second_order and self.steps:
            vector, product = self._slot(), self._slot()
        for k in reversed(range(self.steps)):
            if self.rate_gradients:
                self.code.append(RateGradient(self.gradients[k], adjoint))
            if not self.second_order:
                continue
            if not self.save and k < self.steps - 1:
                self._support_pass(k, thetas[k], self.support_tapes[k], None)
            self.code += [
                Scale(vector, adjoint),
                Hvp(thetas[k], self.support_tapes[k], vector, product, inputs=self.goal.needs.x_s),
                Subtract(adjoint, product),
            ]
