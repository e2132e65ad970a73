"""MAML and first-order MAML (Finn et al., arXiv 1703.03400) as a `Program`; L = Σ_k w_k L_q(θ_k), with w_K = 1 alone or
all of them (MAML++, Antoniou et al., arXiv 1810.09502).

θ_{k+1} = θ_k − α ∘ g_k,  g_k = ∇L_s(θ_k)
λ_K = w_K ∇L_q(θ_K),  λ_k = λ_{k+1} − H_k (α ∘ λ_{k+1}) + w_k ∇L_q(θ_k)
dL/dθ_0 = λ_0,        dL/dα = − Σ_k g_k ∘ λ_{k+1}

With an inner rule θ_{k+1}, m_{k+1} = U_k(θ_k, g_k, m_k) the adjoint of U_k takes the place of −α ∘ λ; see `updates.py`.
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
    Pointwise,
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
from .updates import Updates


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
        self.save = save or not self.second_order
        self.product: int | None = None
        self.mover = _Descent(self) if goal.updates is None else _Ruled(self, goal.updates)

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
            if self.weights[k]:
                self._score(k, thetas[k])
            tape = self._tape(Batch.SUPPORT) if keep_tapes or k == 0 else self.support_tapes[0]
            gradient = self._slot() if self.mover.reads_gradients or k == 0 else self.gradients[0]
            self._support_pass(k, thetas[k], tape, gradient)
            thetas.append(self.mover.step(k, thetas, gradient))
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
        for k in reversed(range(last)):
            vector = self.mover.pull_back(k, thetas[k], self.gradients[k], adjoint)
            if vector is not None:
                self._add_curvature(k, thetas[k], vector, adjoint)
            if k in self.pulled:
                self.code.append(Add(adjoint, self.pulled[k]))
        self.code.append(Accumulate(adjoint))

    def _add_curvature(self, k: int, theta: int, vector: int, adjoint: int) -> None:
        """λ ← λ − H_k v."""
        if not self.save and k < self.steps - 1:
            self._support_pass(k, theta, self.support_tapes[k], None)
        if self.product is None:
            self.product = self._slot()
        self.code += [
            Hvp(theta, self.support_tapes[k], vector, self.product, inputs=self.goal.needs.x_s),
            Subtract(adjoint, self.product),
        ]


class _Descent:
    """θ_{k+1} = θ_k − α ∘ g_k, v_k = α ∘ λ_{k+1}.

    Attributes:
        reads_gradients: whether the way back reads g_k.
    """

    def __init__(self, emitter: _Emitter) -> None:
        self._emitter = emitter
        self._vector: int | None = None
        self.reads_gradients = emitter.reverse and any(emitter.goal.needs.rates)

    def _rates(self, step: int) -> int:
        """The step's set of rates."""
        return step if self._emitter.goal.rate_sets > 1 else 0

    def step(self, k: int, thetas: list[int], gradient: int) -> int:
        """Emit step k; the slot of θ_{k+1}."""
        e = self._emitter
        following = e._slot() if e.second_order or k == 0 else thetas[1]
        e.code.append(Update(following, thetas[k], gradient, self._rates(k)))
        return following

    def pull_back(self, k: int, theta: int, gradient: int, adjoint: int) -> int | None:
        """Emit the step's way back; the slot of v_k, None where H_k v_k is not wanted."""
        e = self._emitter
        if self.reads_gradients:
            e.code.append(RateGradient(gradient, adjoint, self._rates(k)))
        if not e.second_order:
            return None
        if self._vector is None:
            self._vector = e._slot()
        e.code.append(Scale(self._vector, adjoint, self._rates(k)))
        return self._vector


class _Ruled:
    """θ_{k+1}, m_{k+1} = U_k(θ_k, g_k, m_k), v_k = −γ_k; see `updates.py`.

    The slots that the way back reads stay; of what it does not read the steps overwrite each other's.
    """

    def __init__(self, emitter: _Emitter, updates: Updates) -> None:
        self._emitter, self._updates = emitter, updates
        self._states: list[dict[str, int]] = [{}]  # per step
        self._live: dict[str, int] = {}  # the state's adjoint
        self._spare: dict[str, list[int]] = {}
        last = max((k for k, w in enumerate(emitter.weights) if w), default=0)
        learned = emitter.goal.needs.rates.__getitem__
        self._back = updates.way_back(last, emitter.steps, emitter.second_order, learned) if emitter.reverse else {}
        self._read_back = {name.replace("a", "s") for f in self._back.values() for name in f.reads}
        self.reads_gradients = "g" in self._read_back

    def step(self, k: int, thetas: list[int], gradient: int) -> int:
        """Emit step k; the slot of θ_{k+1}."""
        e = self._emitter
        function = self._updates.forward(k, e.steps)
        held = {"t": thetas[k], "g": gradient, **self._states[k]}
        outs = [self._following(name, held) for name in function.writes]
        e.code.append(Pointwise(function, tuple(outs), tuple(held[name] for name in function.reads)))
        written = dict(zip(function.writes, outs, strict=True))
        self._states.append({name: slot for name, slot in written.items() if name != "t"})
        return written["t"]

    def _following(self, name: str, held: dict[str, int]) -> int:
        """The slot for what comes after what is held under a name: a new one, or that of the step before the last."""
        kept = name in self._read_back or (name == "t" and self._emitter.second_order)
        spare = self._spare.setdefault(name, [])
        if kept or len(spare) < (1 if name == "v" else 2):
            spare.append(self._emitter._slot())
            return spare[-1]
        return next(slot for slot in spare if slot != held.get(name))

    def pull_back(self, k: int, theta: int, gradient: int, adjoint: int) -> int | None:
        """Emit the step's way back; the slot of v_k, None where H_k v_k is not wanted."""
        function = self._back[k]
        after = {name.replace("s", "a"): slot for name, slot in self._states[k + 1].items()}
        held = {"t": theta, "g": gradient, "l": adjoint, **self._states[k], **after, **self._live}
        written = {name: adjoint if name == "l" else self._following(name, held) for name in function.writes}
        if written or any(function.numbers.values()):
            ins = tuple(held[name] for name in function.reads)
            self._emitter.code.append(Pointwise(function, tuple(written.values()), ins))
        self._live = {name: slot for name, slot in written.items() if name[0] == "m"}
        return written.get("v")
