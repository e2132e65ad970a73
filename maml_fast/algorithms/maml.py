"""MAML and first-order MAML (Finn et al., arXiv 1703.03400) as a `Program`; L = Σ_k w_k L_q(θ_k), with w_K = 1 alone or
all of them (MAML++, Antoniou et al., arXiv 1810.09502).

θ_{k+1} = θ_k − α ∘ g_k,  g_k = ∇L_s(θ_k)
λ_K = w_K ∇L_q(θ_K),  λ_k = λ_{k+1} − H_k (α ∘ λ_{k+1}) + w_k ∇L_q(θ_k)
dL/dθ_0 = λ_0,        dL/dα = − Σ_k g_k ∘ λ_{k+1}

With an inner rule θ_{k+1}, m_{k+1} = U_k(θ_k, g_k, m_k) the adjoint of U_k takes the place of −α ∘ λ; see `updates.py`.
"""

from __future__ import annotations

from typing import Any

from . import implicit
from .goal import Goal, Mode, weights_of
from .gradients import Displacement, Implicit
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
    StoreGradients,
    StoreOutputs,
    StoreParameters,
    Subtract,
    SupportLoss,
    Update,
)
from .updates import Updates, displacement


def emit(goal: Goal, save: bool = True, every: int | None = None) -> Program:
    """The goal as a program.

    Args:
        goal: what to compute.
        save: keep every inner step's tape; otherwise recompute it in the reverse sweep.
        every: keep the parameters and the rule's state of every so-manieth step alone; on the way back the steps
            between run again, and their tapes are kept until then. None keeps those of all steps.
    """
    return _Emitter(goal, save, every).program()


class _Emitter:
    """Emits instructions. What a slot or tape is for has a key, and what has the same key has the same place.

    Attributes:
        theta, gradient, tape: by inner step, where they are now.
    """

    def __init__(self, goal: Goal, save: bool, every: int | None) -> None:
        self.goal = goal
        self.code: list[Instruction] = []
        self.slots = 1
        self.scalars = 0
        self.tapes: list[Batch] = []
        self.weights = weights_of(goal)
        self.steps = len(self.weights) - 1
        self.pulled: dict[int, int] = {}  # by step: the slot of w_k ∇L_q(θ_k)
        self.scored = False
        self.query_tape = -1
        self.reverse = goal.mode.differentiates and goal.inner.unrolls
        self.curved_from = min(goal.inner.curved_from, self.steps) if self.reverse else self.steps
        self.save = save
        self.every = every if every is not None and every < self.steps else max(self.steps, 1)
        self.theta, self.gradient, self.tape = {0: 0}, dict[int, int](), dict[int, int]()
        self._places: dict[Any, int] = {}
        if goal.starts:
            self.theta[0] = self.slot("θ", "started")
            self.code.append(Load(self.theta[0]))
        self.mover = _Descent(self) if goal.updates is None else _Ruled(self, goal.updates)

    def program(self) -> Program:
        if self.goal.mode is Mode.APPLY:
            self._apply()
        elif self.goal.mode.adapts:
            if self.goal.mode is Mode.STEP:
                self._load()
                self.mover.load(self)
            self._inner_loop()
            self.code.append(StoreParameters(self.theta[self.steps]))
            self.mover.store(self)
        else:
            if self.goal.mode is Mode.SCORE:
                self._load()
            self._inner_loop()
            self._query()
        return Program(tuple(self.code), self.slots, tuple(self.tapes), self.scalars)

    def slot(self, *key: Any) -> int:
        """The slot of this key, a new one at first."""
        if key not in self._places:
            self._places[key] = self.slots
            self.slots += 1
        return self._places[key]

    def scalar(self) -> int:
        """A new number of each task."""
        self.scalars += 1
        return self.scalars - 1

    def _tape(self, batch: Batch, place: int = 0) -> int:
        key = batch, place
        if key not in self._places:
            self._places[key] = len(self.tapes)
            self.tapes.append(batch)
        return self._places[key]

    def _load(self) -> None:
        self.theta[0] = self.slot("given")
        self.code.append(Load(self.theta[0]))

    def _apply(self) -> None:
        self._load()
        self._forward(self.theta[0])
        self.code.append(StoreOutputs(self.query_tape))

    # ---- forward ---------------------------------------------------------------------------------

    def segment(self, k: int) -> int:
        """The first of the steps that run again together with step k."""
        return k - k % self.every

    @property
    def last_segment(self) -> int:
        """The first of the last such steps, which the way back finds as the inner loop left them."""
        return self.segment(max(self.steps - 1, 0))

    def begins(self, step: int) -> bool:
        """Whether steps that run again begin here."""
        inside = 0 < step < self.steps and step == self.segment(step)
        return self.reverse and inside and (self.mover.reads_back or self.curved_from < step + self.every)

    def is_curved(self, k: int) -> bool:
        """Whether the second derivatives of step k count."""
        return k >= self.curved_from

    def _inner_loop(self) -> None:
        """θ_0 … θ_K; of the last segment all stays that the way back reads."""
        for k in range(self.steps):
            if self.weights[k]:
                self._score(k)
            kept = self.reverse and k >= self.last_segment
            self._step(k, kept)
            self.mover.step(self, k, kept)

    def _step(self, k: int, kept: bool, moves: bool = True) -> None:
        """The support pass and the gradient of an inner step, or only its deltas where nobody reads that."""
        stays = kept and self.save and self.is_curved(k)
        place = k % self.every
        self.tape[k] = self._tape(Batch.SUPPORT, place if stays else self._passing())
        self.gradient[k] = self.slot("g", place if kept and self.mover.reads_gradients else 0)
        read = moves or self.mover.reads_gradient(k)
        self.support_pass(k, self.theta[k], self.tape[k], self.gradient[k] if read else None)

    def _passing(self) -> int:
        """The place of a tape that nobody reads later: that of the first one to stay."""
        return max(self.curved_from, self.last_segment) % self.every if self.save else 0

    def support_pass(self, step: int, theta: int, tape: int, gradient: int | None) -> None:
        """Forward and backward on the support set."""
        self.code += [
            Forward(theta, Batch.SUPPORT, tape, step),
            SupportLoss(tape),
            Backward(theta, Batch.SUPPORT, tape, gradient),
        ]

    # ---- the query set ---------------------------------------------------------------------------

    def _query(self) -> None:
        goal, last = self.goal, self.theta[self.steps]
        if goal.mode.scores:
            if self.weights[-1] or not self.scored:
                self._score(self.steps)
            elif goal.needs.outputs:
                self._forward(last)
        else:
            self._forward(last)
        if goal.mode is Mode.QUERY_OUTPUTS or goal.needs.outputs:
            self.code.append(StoreOutputs(self.query_tape))
        if goal.mode is Mode.VJP:
            self.code.append(Cotangent(self.query_tape))
            self._pull(self.steps)
        if goal.mode.differentiates:
            self._meta_gradient()

    def _forward(self, theta: int) -> None:
        self.query_tape = self._tape(Batch.QUERY)
        self.code.append(Forward(theta, Batch.QUERY, self.query_tape))

    def _score(self, step: int) -> None:
        """The query loss at θ_k, and its gradient."""
        self._forward(self.theta[step])
        pulls = self.goal.mode.differentiates and not isinstance(self.goal.inner.gradient, Displacement)
        self.code.append(QueryLoss(self.query_tape, pulls, self.weights[step], add=self.scored))
        self.scored = True
        if pulls:
            self._pull(step)

    def _pull(self, step: int) -> None:
        slot = self.pulled[step] = self.slot("pulled", step)
        inputs = self.goal.needs.x_q
        self.code.append(Backward(self.theta[step], Batch.QUERY, self.query_tape, slot, inputs=inputs))

    # ---- the meta-gradient -----------------------------------------------------------------------

    def _meta_gradient(self) -> None:
        gradient = self.goal.inner.gradient
        if isinstance(gradient, Displacement):
            way, function = self.slot("way"), displacement(self.goal.adapts, self.goal.active)
            held = {"b": 0, "t": self.theta[self.steps]}
            self.code.append(Pointwise(function, (way,), function.slots(held)))
            self.code.append(Accumulate(way, weighted=True))
        elif isinstance(gradient, Implicit):
            self.code.append(Accumulate(implicit.solve(self, gradient, self.pulled[self.steps])))
        else:
            self._reverse_sweep()

    def _reverse_sweep(self) -> None:
        last = max(self.pulled)
        adjoint, held = self.pulled[last], self.last_segment
        for k in reversed(range(last)):
            if self.segment(k) != held and (self.is_curved(k) or self.mover.reads_back):
                held = self.segment(k)
                self._run_again(held, k + 1)
            if self.mover.curves(self, k) and not self.save and k < self.steps - 1:
                self.support_pass(k, self.theta[k], self.tape[k], None)
            vector = self.mover.pull_back(self, k, adjoint)
            if vector is not None:
                self._add_curvature(k, vector, adjoint)
            if k in self.pulled:
                self.code.append(Add(adjoint, self.pulled[k]))
        if self.goal.starts:
            self.code.append(StoreGradients(adjoint))
        self.code.append(Accumulate(adjoint))

    def _run_again(self, first: int, end: int) -> None:
        """Steps first … end − 1, of which all stays that the way back reads, as far as it does."""
        last = max(
            (k for k in range(first, end) if self.mover.curves(self, k) or self.mover.reads_at(k)), default=first
        )
        for k in range(first, last):
            self._step(k, kept=True)
            self.mover.step(self, k, kept=True)
        if self.mover.curves(self, last) or self.mover.reads_gradient(last):
            self._step(last, kept=True, moves=False)

    def _add_curvature(self, k: int, vector: int, adjoint: int) -> None:
        """λ ← λ − H_k v."""
        theta, product = self.theta[k], self.slot("product")
        self.code += [
            Hvp(theta, self.tape[k], vector, product, inputs=self.goal.needs.x_s),
            Subtract(adjoint, product),
        ]


class _Descent:
    """θ_{k+1} = θ_k − α ∘ g_k, v_k = α ∘ λ_{k+1}.

    Attributes:
        reads_gradients: whether the way back reads any g_k. reads_back: whether it reads anything of a step.
    """

    def __init__(self, emitter: _Emitter) -> None:
        self.reads_gradients = emitter.reverse and any(emitter.goal.needs.rates)
        self.reads_back = self.reads_gradients

    def curves(self, e: _Emitter, k: int) -> bool:
        """Whether the way back of step k has a product with its Hessian."""
        return e.is_curved(k)

    def reads_gradient(self, k: int) -> bool:
        """Whether the way back of step k reads its gradient."""
        return self.reads_gradients

    def reads_at(self, k: int) -> bool:
        """Whether the way back reads θ_k, g_k or m_k."""
        return self.reads_gradients

    def step(self, e: _Emitter, k: int, kept: bool) -> None:
        """Emit step k."""
        key: tuple[Any, ...] = ("passing",)
        if e.begins(k + 1) or (kept and e.is_curved(k + 1)):
            key = _key(e, k + 1)
        e.theta[k + 1] = e.slot("θ", *key)
        e.code.append(Update(e.theta[k + 1], e.theta[k], e.gradient[k], _rates(e, k)))

    def load(self, e: _Emitter) -> None:
        """Emit what brings the state of earlier calls; here there is none."""

    def store(self, e: _Emitter) -> None:
        """Emit what keeps the state for later calls; here there is none."""

    def pull_back(self, e: _Emitter, k: int, adjoint: int) -> int | None:
        """Emit the step's way back; the slot of v_k, None where H_k v_k is not wanted."""
        if self.reads_gradients:
            e.code.append(RateGradient(e.gradient[k], adjoint, _rates(e, k)))
        if not e.is_curved(k):
            return None
        vector = e.slot("v")
        e.code.append(Scale(vector, adjoint, _rates(e, k)))
        return vector


def _rates(e: _Emitter, step: int) -> int:
    """The step's set of rates."""
    return e.goal.inner.first + step if e.goal.rate_sets > 1 else 0


def _key(e: _Emitter, step: int) -> tuple[Any, ...]:
    """Of what stays behind a step: by its number at the head of a segment, by its place within one."""
    return ("head", step) if e.begins(step) else ("kept", (step - 1) % e.every)


class _Ruled:
    """θ_{k+1}, m_{k+1} = U_k(θ_k, g_k, m_k), v_k = −γ_k; see `updates.py`.

    The slots that the way back reads stay; of what it does not read the steps overwrite each other's.
    """

    def __init__(self, emitter: _Emitter, updates: Updates) -> None:
        self._updates = updates
        self._states: dict[int, dict[str, int]] = {0: {}}  # per step
        self._scalars: dict[int, tuple[int, ...]] = {}
        self._live: dict[str, int] = {}  # the state's adjoint
        e = emitter
        last = max((k for k, w in enumerate(e.weights) if w), default=0)
        learned = e.goal.needs.rates.__getitem__
        self._back = updates.way_back(last, e.steps, e.is_curved, learned) if e.reverse else {}
        read = {name for f in self._back.values() for name in f.reads}
        self._read_back = {name.replace("a", "s") for name in read}
        self.reads_gradients = "g" in read or (e.reverse and updates.clips_norms)
        self.reads_back = bool(self._read_back & {"g", "t", *(f"s{i}" for i in range(updates.states))})

    def step(self, e: _Emitter, k: int, kept: bool) -> None:
        """Emit step k."""
        function = self._updates.forward(k, e.steps)
        held = {"b": 0, "t": e.theta[k], "g": e.gradient[k], **self._states[k]}
        norm = self._norm(e, k)
        outs = [self._following(e, name, k + 1, kept) for name in function.writes]
        e.code.append(Pointwise(function, tuple(outs), function.slots(held), norm))
        written = dict(zip(function.writes, outs, strict=True))
        e.theta[k + 1] = written.pop("t")
        self._states[k + 1] = written

    def load(self, e: _Emitter) -> None:
        """Emit what brings the state of earlier calls, as far as it is read."""
        if not e.steps:
            return
        function = self._updates.forward(0, e.steps)
        for name in (name for name in function.reads if name[0] == "s"):
            slot = self._states[0][name] = e.slot("given", name)
            e.code.append(Load(slot, _place(name)))

    def store(self, e: _Emitter) -> None:
        """Emit what keeps the state for later calls."""
        e.code += [StoreParameters(slot, _place(name)) for name, slot in self._states[e.steps].items()]

    def curves(self, e: _Emitter, k: int) -> bool:
        """Whether the way back of step k has a product with its Hessian; a step by signs has none."""
        return e.is_curved(k) and "v" in self._back[k].writes

    def reads_gradient(self, k: int) -> bool:
        """Whether the way back of step k reads its gradient."""
        function = self._back[k]
        return "g" in function.reads or (self._updates.clips_norms and "v" in function.writes)

    def reads_at(self, k: int) -> bool:
        """Whether the way back reads θ_k, g_k or m_k, which that of step k − 1 may do too."""
        own = any(name[0] in "ts" for name in self._back[k].reads) or self.reads_gradient(k)
        return own or any(name[0] == "a" for name in (self._back[k - 1].reads if k else ()))

    def _norm(self, e: _Emitter, k: int) -> tuple[int, ...]:
        """Emit ‖g_k‖² if it clips the step; its number."""
        if not self._updates.clips_norms:
            return ()
        if k not in self._scalars:
            self._scalars[k] = (e.scalar(),)
        function, held = self._updates.norm(k), {"b": 0, "t": e.theta[k], "g": e.gradient[k]}
        ins = function.slots(held)
        e.code.append(Pointwise(function, (), ins, (), self._scalars[k]))
        return self._scalars[k]

    def _following(self, e: _Emitter, name: str, step: int, kept: bool) -> int:
        """The slot for what is held under a name behind a step: one that stays, or that of the step before the last."""
        stays = name in self._read_back or (name == "t" and e.is_curved(step))
        key = _key(e, step) if e.begins(step) or (kept and stays) else ("passing", step % 2)
        return e.slot(name, *key)

    def pull_back(self, e: _Emitter, k: int, adjoint: int) -> int | None:
        """Emit the step's way back; the slot of v_k, None where H_k v_k is not wanted."""
        function = self._back[k]
        after = {name.replace("s", "a"): slot for name, slot in self._states.get(k + 1, {}).items()}
        held = {"b": 0, "t": e.theta[k], "g": e.gradient[k], "l": adjoint, **self._states[k], **after, **self._live}
        norm = self._scalars.get(k, ())
        written = {name: _adjoint_slot(e, name, k, adjoint) for name in function.writes}
        change = (e.scalar(),) if function.sums else ()
        if written or any(function.numbers.values()) or function.sums:
            ins = function.slots(held)
            e.code.append(Pointwise(function, tuple(written.values()), ins, norm if function.scalars else (), change))
        self._live = {name: slot for name, slot in written.items() if name[0] == "m"}
        if "v" not in written:
            return None
        return self._clipped_back(e, k, written["v"], norm, change) if change else written["v"]

    def _clipped_back(self, e: _Emitter, k: int, vector: int, norm: tuple[int, ...], change: tuple[int, ...]) -> int:
        """Emit the way back through the clipping of g_k."""
        function = self._updates.unclipped(k)
        held = {"g": e.gradient[k], "v": vector}
        clipped = e.slot("v", "clipped")
        e.code.append(Pointwise(function, (clipped,), function.slots(held), (*norm, *change)))
        return clipped


def _place(name: str) -> int:
    """Where a tensor of the state stands among the vectors of a task, behind the parameters."""
    return 1 + int(name[1:])


def _adjoint_slot(e: _Emitter, name: str, k: int, adjoint: int) -> int:
    if name == "l":
        return adjoint
    return e.slot(name) if name == "v" else e.slot(name, k % 2)
