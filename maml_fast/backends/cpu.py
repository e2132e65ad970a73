"""The C++ core: describes a plan to it once by name, then hands it tensors, which it checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..algorithms.goal import Mode
from ..algorithms.program import Load
from ..cached import cached_property
from ..graph import structure
from ..graph.expressions.language import PRIMITIVES
from ..graph.graph import ACTIVATIONS, Graph, Shape
from ..graph.inputs import Inputs
from ..graph.losses import NAMES
from ..lower.chains import MOST_OPERANDS
from ..lower.plan import Plan, Result, Tensors
from . import cpu_text
from . import cpu_vectors as vectors
from .base import Backend, Spent
from .cpu_spec import CLASSES, FAMILIES, INSTRUCTIONS, KINDS, Spec, constants_of, other_targets
from .shared import shared
from .starts import with_starts

try:
    from .. import _core
except ImportError as error:
    _core = None  # type: ignore[assignment]
    _WHY_NO_CORE = f"maml_fast._core is not built ({error})"

try:
    # what TorchInductor's code allocates with: half the cost of going through PyTorch's dispatcher
    from torch._C._dynamo.guards import _empty_strided_cpu as _empty_strided  # type: ignore[attr-defined]
except ImportError:

    def _empty_strided(size: Shape, stride: Shape, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cpu")


_DTYPES = (torch.float32, torch.float64)
MOST_THREADS, MOST_AXES = 1024, 8
"""The most that the core takes for a call, and of an operation's operands."""


def check_tables(core: Any) -> None:
    """Compare the names that the core was compiled with, and those of their fields, with this package's.

    Raises:
        ImportError: they differ; the message says where.
    """
    tables: dict[str, dict[str, tuple[str, ...] | None]] = {
        "OP_KINDS": dict.fromkeys(KINDS, ()),
        "ACTIVATIONS": dict(ACTIVATIONS),
        "PRIMITIVES": {name: tuple("abc"[:n]) for name, n in PRIMITIVES.items()},
        "LOSSES": dict.fromkeys((*NAMES, "value"), ()),
        # an operand is found by its name: in which order they stand is of no consequence
        "INSTRUCTIONS": {name: tuple(sorted(operands)) for name, operands in INSTRUCTIONS.values()},
    }
    for name, expected in tables.items():
        found = {k: tuple(sorted(v)) if name == "INSTRUCTIONS" else v for k, v in getattr(core, name, {}).items()}
        for key in sorted({*expected, *found}):
            if expected.get(key) != found.get(key):
                raise ImportError(
                    f"maml_fast._core was built from other sources than this package: {name}[{key!r}]: "
                    f"expected {expected.get(key)}, got {found.get(key)}; build it again"
                )
    for name, most in (("MOST_THREADS", MOST_THREADS), ("MOST_AXES", MOST_AXES), ("MOST_OPERANDS", MOST_OPERANDS)):
        if (got := getattr(core, name, None)) != most:
            raise ImportError(f"maml_fast._core: expected {name} {most}, got {got}")


if _core is not None:
    check_tables(_core)


def info() -> dict[str, Any]:
    """Whether the core is built, its instruction sets and the number of threads."""
    return {
        "built": _core is not None,
        "isa": None if _core is None else _core.choose(),
        "available": [] if _core is None else _core.available(),
        "threads": torch.get_num_threads(),
    }


class CpuBackend(Backend):
    """Fused kernels for many tasks on the CPU, float32 and float64."""

    name = "cpu"
    fused = True

    def why_not(self, plan: Plan) -> list[str]:
        reasons = [] if _core is not None else [_WHY_NO_CORE]
        if plan.device.type != "cpu":
            reasons.append(f"the tensors are on {plan.device}")
        if plan.dtype not in _DTYPES:
            reasons.append(f"dtype {plan.dtype} is neither float32 nor float64")
        graph, untraceable = plan.trace
        reasons += untraceable
        reasons += filter(None, [plan.traced_rule[1]])
        if graph is not None:
            reasons += _unsupported(plan, graph)
        return reasons or _refused(plan)

    def run(self, plan: Plan, tensors: Tensors) -> Result:
        if plan.starts:
            return with_starts(plan, tensors, _call_of(plan))
        return _call_of(plan)(plan, tensors)

    def into(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        return _core.existing_gradients(list(parameters))

    def held_bytes(self, plan: Plan) -> int:
        return int(_call_of(plan).core.bytes(_threads(plan))) if "cpu" in plan.state else 0

    def describe(self, plan: Plan) -> str:
        described = _call_of(plan).core.describe()
        return cpu_text.text(described, plan.model.names, CLASSES, plan.program, plan.dtype.itemsize)

    def profile(self, plan: Plan, tensors: Tensors) -> tuple[Result, list[Spent]]:
        call, spent = _call_of(plan), dict[str, Any]()
        timed = partial(call, spent=spent)
        result = with_starts(plan, tensors, timed) if plan.starts else timed(plan, tensors)
        instructions = zip(call.labels, spent.pop("instructions"), strict=True)
        rest = [Spent(name, name, 1e-9 * ns) for name, ns in spent.items()]
        return result, [*(Spent(*label, 1e-9 * ns) for label, ns in instructions), *rest]


def _call_of(plan: Plan) -> _Call:
    call = plan.state.get("cpu")
    if call is None:
        call = plan.state["cpu"] = _Call(plan)
    assert isinstance(call, _Call)
    return call


def _refused(plan: Plan) -> list[str]:
    """What the core says of a plan with operations of families that it does not take: there are slower backends."""
    graph = plan.kernel_graph
    if graph is None or not any(op.kind in FAMILIES for op in graph.live_ops()):
        return []
    try:
        _call_of(plan)
    except (ValueError, LookupError) as error:
        return [f"the core does not take its plan ({error})"]
    return []


def _threads(plan: Plan) -> int:
    return plan.threads or min(torch.get_num_threads(), MOST_THREADS)


def _unsupported(plan: Plan, graph: Graph) -> list[str]:
    reasons = []
    if plan.inner.step_weights and plan.needs.x_q and plan.mode.differentiates:
        reasons.append("gradients with respect to query inputs of losses at several steps")
    apart = [i for i, starts in enumerate(plan.starts) if starts and not plan.adapts[i]]
    reasons += [f"parameter {plan.model.names[i]!r} starts from the task's data and does not adapt" for i in apart]
    reasons += [f"the inner rule moves parameter {n!r}, which the loss does not use" for n in plan.moved_in_vain]
    for op in graph.live_ops():
        if op.kind not in KINDS and op.kind not in ACTIVATIONS and op.kind not in ("reshape", "spatial_mean"):
            reasons.append(f"layer {op.kind} has no kernel")
        if any(graph.features(v) == 0 for v in (*op.inputs, op.output)):
            names = ", ".join(plan.model.names[p] for p in op.parameters if p is not None)
            reasons.append(f"layer {op.kind}{names and f' of {names}'} has width zero: no elements to work on")
        if any(len(box.sizes) > MOST_AXES for box in op.attributes.get("boxes", ())) or (
            op.kind == "pointwise" and len(graph.shapes[op.output]) > MOST_AXES
        ):
            reasons.append(f"{op.attributes['name']} over more than {MOST_AXES} axes")
        if op.kind == "batch_norm":
            positions = math.prod(graph.shapes[op.output][1:])
            if 1 in [n * positions for n in (plan.support, plan.query)]:
                reasons.append("BatchNorm in training mode over a single value per channel")
    reasons += [
        f"parameter {plan.model.names[p]!r} is a weight of convolutions and of other layers" for p in _mixed(graph)
    ]
    labels = plan.loss.takes_labels and plan.mode is not Mode.APPLY
    if graph.loss is None and labels and len(graph.shapes[graph.output]) != 1:
        reasons.append(f"cross_entropy over outputs of shape {graph.shapes[graph.output]}, not (classes,)")
    return reasons


def _mixed(graph: Graph) -> list[int]:
    """Parameters that convolutions share with other layers, for which they would stand in another order."""
    conv = {op.parameters[0] for op in graph.live_ops() if op.kind == "conv"}
    other = {p for op in graph.live_ops() for p in op.parameters[int(op.kind == "conv") :]}
    return sorted(p for p in conv & other if p is not None)


class _Call:
    """A plan in the core, and the tensors each run of it needs.

    It stands in the plan's state, so it does not hold the plan: the workspace goes with the last reference.
    """

    def __init__(self, plan: Plan) -> None:
        graph = plan.kernel_graph
        assert graph is not None
        self.constants = constants_of(graph)
        self.literals = [
            None if isinstance(c, str) else torch.frombuffer(bytearray(c.data), dtype=torch.float64).to(plan.dtype)
            for c in self.constants
        ]
        self.constant_shapes = [plan.objective.tensor(c).shape if isinstance(c, str) else None for c in self.constants]
        own = graph.loss is not None and graph.loss.name == "value"
        self.targets = {op.attributes["number"] for op in graph.live_ops() if op.kind == "target"} if own else {0}
        self.inputs, self.sets = plan.inputs, plan.sets
        self.one_input = not plan.inputs.several and plan.inputs.primary is not None
        self.read = _read_inputs(graph, plan.inputs)
        self.other_targets = other_targets(plan)
        self.draws = any(op.kind == "draw" for op in graph.live_ops())
        self.new_objective = _new((), plan.dtype)
        self.new_outputs = _new((plan.tasks, plan.query, *(graph.returned or ())), plan.dtype)
        self.new_gradients = self._gradient_makers(plan, graph.used_parameters())
        self.new_own_gradients = self._own_gradient_makers(plan, graph.used_parameters()) if plan.starts else []
        self.program = plan.program
        spec = Spec(plan, graph).as_dict()
        self.core = _core.Plan(spec, plan.dtype == torch.float64, _core.choose())
        self.reverse, self.adapts = plan.mode.differentiates, plan.mode.adapts
        self.rates_wanted = self.reverse and any(plan.needs.rates)
        self.rate_sizes = [math.prod(s) for s in plan.rates.shapes]
        self.places = 1 + max((i.place for i in self.program.instructions if isinstance(i, Load)), default=0)

    @cached_property
    def labels(self) -> list[tuple[str, str]]:
        """The kind and the text of every instruction."""
        return list(cpu_text.instructions(self.core.describe(), CLASSES, self.program))

    def __call__(self, plan: Plan, t: Tensors, spent: dict[str, Any] | None = None) -> Result:
        if self.draws and t.seed is None:
            raise RuntimeError("maml_fast: a call that draws random numbers has no seed")
        result = Result()
        like = t.parameters[0]
        if plan.mode is Mode.META_GRADIENT:
            result.objective = self.new_objective()
        elif plan.mode in (Mode.LOSS, Mode.SCORE):
            result.losses = like.new_empty(plan.tasks)
        left: Sequence[Tensor | None] = ()
        if self.adapts:
            result.adapted = [like.new_empty(plan.tasks, *s) for s in plan.model.shapes]
            left, result.state = vectors.made(plan, like)
        given, parameters = (t.adapted, t.parameters) if plan.mode is not Mode.STEP else self._left_before(plan, t)
        if plan.needs.outputs or plan.mode in (Mode.QUERY_OUTPUTS, Mode.APPLY):
            result.outputs = self.new_outputs()
        rate_gradient = None
        if self.reverse:
            self._allocate_gradients(plan, result, t)
            if self.new_own_gradients:
                result.adapted = [make() for make in self.new_own_gradients]
            if self.rates_wanted:
                rate_gradient = like.new_zeros(sum(self.rate_sizes))
        of_s = (t.x_s, t.y_s) if self.sets == 1 else self._by_set(t.x_s, t.y_s)
        x_s, more_s = self._inputs(of_s[0])
        x_q, more_q = self._inputs(t.x_q)
        y_s, others_s = self._targets(of_s[1])
        y_q, others_q = self._targets(t.y_q)
        dx_s, dmore_s = self._gradients_of_inputs(result.x_s, t.x_s)
        dx_q, dmore_q = self._gradients_of_inputs(result.x_q, t.x_q)
        self.core.run(
            x_s,
            y_s,
            x_q,
            y_q,
            t.weights,
            t.cotangent,
            result.losses,
            result.objective,
            result.outputs,
            rate_gradient,
            dx_s,
            dx_q,
            parameters,
            self._buffers(plan) if self.constants else (),
            t.rates,
            given,
            t.into or result.parameters,
            [*result.adapted, *left] if left else result.adapted,
            more_s,
            more_q,
            dmore_s,
            dmore_q,
            others_s,
            others_q,
            t.seed or 0,
            bool(t.into),
            _threads(plan),
            spent,
        )
        if self.sets > 1:
            result.x_s = structure.mapped(result.x_s, partial(_by_task, self.sets))
        if rate_gradient is not None:
            pieces = zip(rate_gradient.split(self.rate_sizes), plan.rates.shapes, plan.needs.rates, strict=True)
            result.rates = [g.view(s) if need else None for g, s, need in pieces]
        return result

    def _by_set(self, *data: Any) -> tuple[Any, ...]:
        """(T, sets · N, …) as the core takes it: those of all tasks, then the next set."""
        return tuple(structure.mapped(part, partial(_by_set, self.sets)) for part in data)

    def _left_before(self, plan: Plan, t: Tensors) -> tuple[Sequence[Tensor | None], Sequence[Tensor]]:
        """What a program that goes on loads, and the parameters that all tasks share."""
        return vectors.given(plan, self.places, t), shared(plan, t)

    def _inputs(self, x: Any) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """The tensor of buffer 0, and those that operations `input` read."""
        if x is None or self.one_input:
            return x, ()
        given = structure.tensors_by_name(x)
        others = [None if leaf is None else _as_given(given[leaf]) for leaf in self.read]
        return None if self.inputs.primary is None else given[self.inputs.primary], others

    def _targets(self, y: Any) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """The targets that the core reads: the first, and the others."""
        if y is None:
            return None, (None,) * self.other_targets
        if isinstance(y, Tensor):
            return _as_given(y) if 0 in self.targets else None, ()
        first, *others = [
            _as_given(v) if i in self.targets else None for i, v in enumerate(structure.tensors_by_name(y))
        ]
        return first, others

    def _gradients_of_inputs(self, found: Any, x: Any) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """What the core writes: the gradient of buffer 0, and those of the other inputs."""
        if self.one_input:
            return found, ()
        if x is None:
            return None, ()
        made: list[Tensor | None] = [None] * len(self.inputs.leaves)
        if found is not None and any(g is not None for g in found):  # the core writes either all or none
            pairs = zip(structure.by_name(x), structure.tensors_by_name(x), strict=True)
            made = [_zeros(v) if found[at] is None and v.is_floating_point() else found[at] for at, v in pairs]
        first = None if self.inputs.primary is None else made[self.inputs.primary]
        return first, [None if leaf is None else made[leaf] for leaf in self.read]

    def _buffers(self, plan: Plan) -> list[Tensor]:
        """The buffers that layers read as constants, in the core's type."""
        found = []
        for constant, literal, shape in zip(self.constants, self.literals, self.constant_shapes, strict=True):
            if literal is not None:
                found.append(literal)
                continue
            assert isinstance(constant, str) and shape is not None
            buffer = plan.objective.tensor(constant)
            if buffer.shape != shape:
                expected, got = tuple(shape), tuple(buffer.shape)
                raise ValueError(f"model: expected buffer {constant!r} of shape {expected}, got {got}")
            found.append(buffer.to(plan.device, plan.dtype).resolve_neg())
        return found

    def _gradient_makers(self, plan: Plan, used: set[int]) -> list[Callable[[], Tensor | None]]:
        """For every parameter what makes its gradient: zeros where the core has nothing to write."""
        made: list[Callable[[], Tensor | None]] = []
        for i, (shape, need) in enumerate(zip(plan.model.shapes, plan.needs.parameters, strict=True)):
            zeros = partial(torch.zeros, shape, dtype=plan.dtype, device=plan.device)
            made.append(_nothing if not need else _new(shape, plan.dtype) if i in used else zeros)
        return made

    def _own_gradient_makers(self, plan: Plan, used: set[int]) -> list[Callable[[], Tensor | None]]:
        """For every parameter what makes the tasks' own gradients, which the core writes of those that adapt."""
        made: list[Callable[[], Tensor | None]] = []
        for i, (shape, adapts) in enumerate(zip(plan.model.shapes, plan.adapts, strict=True)):
            whole = (plan.tasks, *shape)
            zeros = partial(torch.zeros, whole, dtype=plan.dtype)
            made.append(_nothing if not adapts else _new(whole, plan.dtype) if i in used else zeros)
        return made

    def _allocate_gradients(self, plan: Plan, result: Result, t: Tensors) -> None:
        assert t.x_s is not None and t.x_q is not None
        needs = plan.needs
        result.parameters = [None] * len(t.parameters) if t.into else [make() for make in self.new_gradients]
        result.rates = [None] * len(needs.rates)
        result.x_s = _input_gradients(t.x_s, needs.x_s, needs.x_s_each)
        result.x_q = _input_gradients(t.x_q, needs.x_q, needs.x_q_each)


def _by_set(sets: int, x: Tensor) -> Tensor:
    """(T, sets · N, …) with the sets in front."""
    return x.unflatten(1, (sets, -1)).transpose(0, 1).contiguous()


def _by_task(sets: int, g: Tensor) -> Tensor:
    """(T, sets · N, …) of memory with the sets in front."""
    tasks, samples = g.shape[0], g.shape[1] // sets
    return g.view(sets, tasks, samples, *g.shape[2:]).transpose(0, 1).reshape(g.shape)


def _read_inputs(graph: Graph, inputs: Inputs) -> list[int | None]:
    """The leaf that each of the other inputs is; None for what nothing reads."""
    read = {op.attributes["number"] for op in graph.live_ops() if op.kind == "input"}
    return [leaf if number in read else None for number, leaf in enumerate(inputs.others)]


def _as_given(x: Tensor) -> Tensor:
    """Whole numbers of any type as int64."""
    return x if x.is_floating_point() else x.to(torch.int64)


def _input_gradients(x: Any, needed: bool, each: Sequence[bool]) -> Any:
    """Zeros for the gradient, or a list of one for each of several inputs."""
    if isinstance(x, Tensor) or x is None:
        return _zeros(x) if needed and x is not None else None
    return [
        _zeros(v) if wanted else None for v, wanted in zip(structure.tensors(x), each or (False,) * len(x), strict=True)
    ]


def _new(shape: Shape, dtype: torch.dtype) -> Callable[[], Tensor]:
    """What makes contiguous tensors of this shape, with anything in them."""
    return partial(_empty_strided, shape, torch.empty(shape, device="meta").stride(), dtype)


def _nothing() -> None:
    return None


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, memory_format=torch.contiguous_format)
