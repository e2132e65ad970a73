"""Compiles the kernels of whole plans without a GPU, and says what they take of one.

`python -m maml_fast.checking.triton_aot` prints the table of the shipped networks.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..algorithms.goal import Mode
from ..algorithms.gradients import Clip, Displacement, Implicit
from ..algorithms.rules import SGD, Adam, AdamW, RMSprop
from ..api.maml import MAML
from ..api.rates import per_step
from ..backends.triton import TritonBackend
from ..backends.triton.kernels import tiles
from ..backends.triton.kernels.launch import OPTIONS
from ..backends.triton.kernels.resident_interpreter import resident_kernel
from ..backends.triton.kernels.tiles import Product
from ..backends.triton.runtime import tuning
from ..backends.triton.runtime.call import PRECISIONS
from ..backends.triton.runtime.launches import launches, start
from ..backends.triton.support import why_not_network
from ..cases import BENCH, Problem, select
from ..graph import structure
from ..graph.structure import Data
from ..lower.plan import Plan

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that one program may have, by compute capability × 10."""

_TILES = ("BM", "BN", "BK", "BC", "BR", "BW", "BT", "BI", "BLOCK")
_OPERANDS = ("a2", "sums", "STRIDE_H", "PRECISION")
_LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}


@dataclass(frozen=True)
class Instance:
    """A kernel as one launch specialises it.

    Attributes:
        signature: argument name and Triton type. constants: values known when compiling.
        aligned: positions of arguments that are multiples of 16. options: warps, stages and the most registers.
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def module(self) -> str:
        return str(self.kernel.fn.__module__).rsplit(".", 1)[-1]

    @property
    def name(self) -> str:
        chosen = [f"{k}={v}" for k, v in self.constants if k.isupper() or v is None]
        return " ".join([f"{self.module}.{self.kernel.fn.__name__.removesuffix('_kernel')}", *chosen])

    @property
    def variant(self) -> object:
        """What it shares with instances that differ in tile and alignment only."""
        kept = [(k, v) for k, v in self.constants if v is None or (k.isupper() and k not in _TILES)]
        if self.rounded:
            kept = [(k, v) for k, v in kept if k in _OPERANDS]
        return self.kernel.fn.__name__, self.module, tuple(kept)

    @property
    def rounded(self) -> bool:
        """Whether it rounds its operands."""
        return dict(self.constants).get("PRECISION", "ieee") != "ieee"

    @property
    def tile(self) -> int:
        """Numbers in its tile."""
        return math.prod(v for k, v in self.constants if k in _TILES)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: bytes of shared memory, registers a thread, bytes of spills a thread."""

    shared: int
    registers: int
    spills: int


def instances(plan: Plan, variant: str = "wide") -> list[Instance]:
    """The different kernels that a plan's launches need."""
    found = launches(plan, variant)
    return list(dict.fromkeys(_instance(k, arguments, constants) for k, _, arguments, constants in found))


def products(plan: Plan) -> list[Product]:
    """One of every kind of product that the plan needs."""
    return list(tuning.products(partial(start, plan, "wide")).values())


def candidates(one: Product) -> list[Instance]:
    """A product with every tile that tuning would try."""
    found = []

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        found.append(_instance(kernel, arguments, constants))

    for tile in tiles.candidates(one):
        one.start(record, tile)
    return found


def _instance(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Instance:
    options = {k: v for k, v in constants.items() if k in _LAUNCH_OPTIONS}
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {k: v for k, v in constants.items() if k not in _LAUNCH_OPTIONS}
    general = {p.name for p in kernel.params if p.do_not_specialize}
    signature = {n: _type(values[n], n in constants, n not in general) for n in kernel.arg_names}
    return Instance(
        kernel,
        tuple(signature.items()),
        tuple((n, values[n]) for n in kernel.arg_names if signature[n] == "constexpr"),
        tuple(
            i
            for i, n in enumerate(kernel.arg_names)
            if signature[n] != "constexpr" and n not in general and _aligned(values[n])
        ),
        tuple(options.items()),
    )


def _type(value: Any, constant: bool, specialised: bool) -> str:
    if constant or value is None or (specialised and isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 1 << 31 else "i64"


def _aligned(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def compile(instance: Instance, capability: int) -> Usage:
    """Compile for a compute capability × 10.

    Raises:
        whatever Triton raises where the kernel does not compile.
    """
    source = ASTSource(
        instance.kernel,
        dict(instance.signature),
        dict(instance.constants),
        {(i,): [["tt.divisibility", 16]] for i in instance.aligned},
    )
    options = {**OPTIONS, **dict(instance.options)}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _resources(compiled.asm["cubin"])
    return Usage(compiled.metadata.shared, registers, spills)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and local memory of a thread, as the compiler's own tool prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


NETWORKS = ("batchnorm-deep", "layernorm", "groupnorm", "maxpool", "branches")
"""Cases with layers that the benchmark's networks lack."""


def plans() -> dict[str, Plan]:
    """Meta-gradient plans of the benchmark's cases and of `NETWORKS`."""
    found = {}
    for case in (*BENCH, *select([*NETWORKS])):
        problem = case.build(torch.float32)
        found[case.name] = problem.maml("reference")._prepare(Mode.META_GRADIENT, *problem.batch).call.plan
    return found


@cache
def work(every: bool = False, tuned: bool = True) -> tuple[tuple[int, Instance], ...]:
    """Pairs of capability and instance to compile: all that the plans need in every precision, or the tests' part.

    The tests leave out, for 9.0 in float32, instances that differ in strides and alignment only, and otherwise
    those that differ in the tile too, of which the largest takes most; and products with rounded operands that
    differ in their epilogue only, which does not round. Of the tiles that tuning would try, they take those of
    the largest product of each kernel, at the end, or none unless `tuned`; of the resident kernel with rounded
    operands, that for 9.0.
    """
    chosen = {p: [replace(plan, precision=p) for plan in plans().values()] for p in PRECISIONS}
    found = {p: dict.fromkeys(i for plan in of for i in instances(plan)) for p, of in chosen.items()}
    found = {p: {i: None for i in of if p == "float32" or i.rounded} for p, of in found.items()}
    resident = [i for p in PRECISIONS for i in resident_instances(p)]
    to_tile = [one for of in chosen.values() for plan in of for one in products(plan)]
    if every:
        tried = [i for one in to_tile for i in candidates(one)]
        all_of = (*(i for of in found.values() for i in of), *tried, *resident)
        return tuple({(c, i): None for i in all_of for c in SHARED_LIMIT})
    named: dict[str, Instance] = {}
    for i in found["float32"]:
        named[i.name] = max(i, named.get(i.name, i), key=lambda i: len(i.aligned))
    largest: dict[object, Instance] = {}
    for i in (i for of in found.values() for i in of):
        largest[i.variant] = max(i, largest.get(i.variant, i), key=lambda i: (i.tile, len(i.aligned)))
    hardest: dict[object, Product] = {}
    for one in to_tile if tuned else []:
        hardest[one.kernel, one.precision] = max(one, hardest.get((one.kernel, one.precision), one), key=_hardness)
    pairs = {(90, i): None for i in (*named.values(), *resident)}
    pairs |= {(c, i): None for i in (*largest.values(), *resident[:1]) for c in SHARED_LIMIT}
    return tuple(pairs | {(90, i): None for one in hardest.values() for i in candidates(one)})


Call = tuple[MAML, tuple[Data, Data, Data, Data]]


@cache
def family_work() -> tuple[tuple[int, Instance], ...]:
    """Pairs of capability and instance: what the cases with operations of families need and `work` has nothing like."""
    problems = [case.build(torch.float32) for case in select(tag="families")]
    calls: list[Call] = [(problem.maml("reference"), problem.batch) for problem in problems]
    return _new_in([*calls, _with_loss_of_labels(problems[0]), _with_tables_and_random_numbers()])


@cache
def algorithm_work() -> tuple[tuple[int, Instance], ...]:
    """The same of inner rules, clipping, modes of the gradient, and losses at several steps."""
    return _new_in([_small(**settings) for settings in _algorithms()])


WORK = {"families": family_work, "algorithms": algorithm_work}


def _new_in(calls: Sequence[Call]) -> tuple[tuple[int, Instance], ...]:
    """Of the calls' kernels those that `work` has nothing like."""
    known = {_kind(i) for plan in plans().values() for i in instances(plan)}
    found: dict[object, Instance] = {}
    for maml, batch in calls:
        plan = maml._prepare(Mode.META_GRADIENT, *batch).call.plan
        graph = plan.trace[0]
        if graph is not None and not why_not_network(plan, graph):
            for i in (i for i in instances(plan) if _kind(i) not in known):
                found[_kind(i)] = max(i, found.get(_kind(i), i), key=lambda i: (i.tile, len(i.aligned)))
    return tuple((c, i) for i in found.values() for c in SHARED_LIMIT)


def _kind(i: Instance) -> object:
    """What it shares with instances for arrays of the same types, but for tile and alignment."""
    return i.variant, tuple(t for _, t in i.signature if t.startswith("*"))


def _with_loss_of_labels(problem: Problem) -> Call:
    """A loss of no name that reads labels."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return -z.log_softmax(-1).gather(1, y[:, None]).mean()

    x = structure.first(problem.x_s), structure.first(problem.x_q)
    labels = [torch.zeros(v.shape[:2], dtype=torch.int64) for v in x]
    batch = problem.x_s, labels[0], problem.x_q, labels[1]
    return MAML(problem.model, 0.1, loss=loss, backend="reference", check="never"), batch


class _Words(nn.Module):
    """Rows of a parameter and of a computed table, a further input, random numbers, and a mask that is checked."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.others = nn.Embedding(11, 12, padding_idx=0), nn.Embedding(11, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        h = F.dropout(self.words(tokens).mean(1)) + F.embedding(tokens[:, 0], torch.tanh(self.others.weight))
        return self.head(h * x) + F.one_hot(tokens[:, 1], 3)


def _with_tables_and_random_numbers() -> Call:
    tokens, x, y = torch.zeros(3, 5, 6, dtype=torch.int64), torch.zeros(3, 5, 12), torch.zeros(3, 5, 3)
    maml = MAML(_Words(), 0.1, loss="mse", backend="reference", check="never")
    return maml, ((tokens, x), y, (tokens, x), y)


class _Own(nn.Module):
    """A rule with functions of elements, and of what is the same for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.power = nn.Parameter(torch.tensor(-2.0)), nn.Parameter(torch.tensor(0.5))

    def init(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(theta)

    def update(self, theta: Any, gradient: Any, state: Any, step: int) -> tuple[Any, Any]:
        rate = self.rate.sigmoid() * torch.tanh(self.power).exp() ** self.power / (1 + self.power.erf() ** 2).sqrt()
        return {n: p - rate * torch.tanh(gradient[n]) * torch.erf(p - state[n]) for n, p in theta.items()}, state


def _algorithms() -> Iterator[dict[str, Any]]:
    """Settings whose kernels differ."""
    learned = [nn.Parameter(torch.tensor(v)) for v in (0.1, 0.9, 0.8, 1e-3)]
    elements = [
        {n: nn.Parameter(0.1 * torch.rand_like(p)) for n, p in _small_network().named_parameters()} for _ in range(2)
    ]
    lr, a, b, eps = learned
    yield {"inner": SGD(0.1, momentum=0.9, dampening=0.1, weight_decay=0.1), "step_weights": (0.2, 0.3, 0.5)}
    yield {"inner": SGD(lr, momentum=a, nesterov=True)}
    yield {"inner": Adam(0.1)}
    yield {"inner": Adam(lr, betas=(a, b), eps=eps, weight_decay=0.1), "clip": Clip(norm=0.1)}
    yield {"inner": AdamW(elements[0], betas=(elements[1], b)), "clip": Clip(value=0.1)}
    yield {"inner": RMSprop(lr, alpha=a, centered=True, momentum=b, weight_decay=0.1)}
    yield {"inner": _Own()}
    yield {"lr": per_step([elements[0], lr])}
    yield {"lr": 0.1, "gradient": Implicit(1.0, iterations=2)}
    yield {"lr": 0.1, "gradient": Implicit(1.0, "neumann", iterations=2)}
    yield {"lr": 0.1, "gradient": Displacement()}


def _small_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def _small(lr: Any = None, **settings: Any) -> Call:
    data = [torch.zeros(3, 5, size) for size in (4, 2, 4, 2)]
    maml = MAML(_small_network(), lr, steps=2, loss="mse", backend="reference", check="never", **settings)
    return maml, (data[0], data[1], data[2], data[3])


def compile_of(kind: str, n: int) -> tuple[str, int, Usage]:
    """The same as `compile_nth` of one piece of `WORK`."""
    capability, instance = WORK[kind]()[n]
    return instance.name, capability, compile(instance, capability)


def _hardness(one: Product) -> tuple[int, int]:
    return sum(a is not None for a in one.arguments), one.m * one.n * one.k


def resident_instances(precision: str) -> list[Instance]:
    """The resident kernel, which is the same for every plan."""
    found = instances(replace(plans()["sinusoid-k1"], precision=precision), "resident")
    return [i for i in found if i.kernel is resident_kernel]


def compile_nth(n: int, every: bool = False) -> tuple[str, int, Usage]:
    """The name, capability and usage of one piece of `work`; for processes that share nothing."""
    capability, instance = work(every)[n]
    return instance.name, capability, compile(instance, capability)


def main() -> None:
    for name, plan in plans().items():
        print(f"{name}: {len(launches(plan))} launches a call")
        if TritonBackend().variant(plan) == "resident":
            print(f"{name}, resident: {len(launches(plan, 'resident'))} launches a call")
    rows = (compile_nth(n, every=True) for n in range(len(work(every=True))))
    others = (compile_of(kind, n) for kind, pieces in WORK.items() for n in range(len(pieces())))
    for name, capability, usage in chain(rows, others):
        print(f"{capability:4d} {usage.shared:6d} B {usage.registers:3d} regs {usage.spills:4d} B spilt  {name}")


if __name__ == "__main__":
    main()
