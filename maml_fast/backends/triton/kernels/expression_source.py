"""Triton source of a function of operands that are broadcast: one kernel for each form, made once.

The kernel of a form without sums computes every element of the output:

    out_r[t, i] (+)= f_r(x_0[t, …], …)

One with sums computes the elements of one operand, over the axes along which that is broadcast, in a fixed order:

    out[t, k] (+)= Σ_r f(x_0[t, …], …)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ....graph.expressions import Expression
from ....graph.expressions.language import in_order
from .generated import generated
from .written import number, primitive


@dataclass(frozen=True)
class Operand:
    """How an operand lies in memory beside the output.

    Attributes:
        sampled: whether it has a sample axis. axes: for each axis of the output whether it goes along it.
    """

    sampled: bool
    axes: tuple[bool, ...]

    @property
    def whole(self) -> bool:
        """Whether it has the output's elements, in the same order."""
        return self.sampled and all(self.axes)


@dataclass(frozen=True)
class Form:
    """What a kernel's source depends on.

    Attributes:
        outputs: functions of the variables `x0…`, `tx0…`, `dy` and `ey`.
        operands: x0 …; a tangent lies as its operand does, dy and ey as the output.
        summed: the operand over whose broadcast axes the one output is summed; None for no sums.
    """

    outputs: tuple[Expression, ...]
    operands: tuple[Operand, ...]
    summed: int | None = None

    @property
    def arrays(self) -> tuple[str, ...]:
        """The variables that are read, each of which is an argument."""
        return tuple(sorted({str(x.value) for x in in_order(list(self.outputs)) if x.name == "variable"}))

    @property
    def read(self) -> tuple[int, ...]:
        """The operands that are read at places of their own."""
        numbers = {int(name.lstrip("tx")) for name in self.arrays if name not in ("dy", "ey")}
        return tuple(j for j in sorted(numbers) if not self.operands[j].whole)

    @property
    def rank(self) -> int:
        return len(self.operands[0].axes)

    @property
    def integers(self) -> tuple[str, ...]:
        """Names of the sizes and strides that the kernel takes, after the arrays and the outputs."""
        names = ["size", "features", *(f"s{d}" for d in range(self.rank))]
        for j in self.read:
            own = self.operands[j]
            names += [f"x{j}_t", *([f"x{j}_n"] if own.sampled else [])]
            names += [f"x{j}_{d}" for d, along in enumerate(own.axes) if along]
        if self.summed is not None:
            names += ["kept", "terms", *(f"o{d}" for d in range(self.rank))]
        return tuple(names)

    @property
    def kept_last(self) -> bool:
        """Whether neighbours in memory are elements that stay, not terms of one sum."""
        return self.summed is not None and self.operands[self.summed].axes[-1]


_GENERAL = ("size", "features", "kept", "terms")
"""Arguments on which no kernel is specialised, and so are the sizes of axes."""


@lru_cache(maxsize=4096)
def kernel(form: Form) -> Any:
    """The form's kernel."""
    general = tuple(a for a in form.integers if a in _GENERAL or a[0] == "s")
    if form.summed is not None:
        return generated("sum_expression_kernel", tuple(_summing(form)), general)
    return generated("expression_kernel", tuple(_element_wise(form)), general)


def _element_wise(form: Form) -> list[str]:
    outs = [f"out{r}" for r in range(len(form.outputs))]
    adds = [f"ADD{r}: tl.constexpr" for r in range(len(outs))]
    arguments = [*form.arrays, *outs, *form.integers, *adds, "BLOCK: tl.constexpr"]
    return [
        f"def expression_kernel({', '.join(arguments)}):",
        "    across = tl.cdiv(size, BLOCK)",
        "    t = (tl.program_id(0) // across).to(tl.int64)",
        "    i = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)",
        "    inside = i < size",
        *(_axes_of_element(form) if form.read else []),
        *_loads(form, "    "),
        *_computed(form, "    "),
        *(
            line
            for r, out in enumerate(outs)
            for line in (
                f"    if ADD{r}:",
                f"        y{r} += tl.load({out} + t * size + i, mask=inside, other=0.0)",
                f"    tl.store({out} + t * size + i, y{r}, mask=inside)",
            )
        ),
    ]


def _axes_of_element(form: Form) -> list[str]:
    """n and a0 … of element i of a task."""
    lines = ["    n = i // features", "    e = i % features"]
    for d in reversed(range(form.rank)):
        lines += [f"    a{d} = e % s{d}", f"    e = e // s{d}"]
    return lines


def _summing(form: Form) -> list[str]:
    assert form.summed is not None
    own = form.operands[form.summed]
    k, r, axis = ("k[None, :]", "r[:, None]", 0) if form.kept_last else ("k[:, None]", "r[None, :]", 1)
    arguments = [*form.arrays, "out0", *form.integers, "ADD0: tl.constexpr", "BK: tl.constexpr", "BR: tl.constexpr"]
    shape = "(BR, BK)" if form.kept_last else "(BK, BR)"
    return [
        f"def sum_expression_kernel({', '.join(arguments)}):",
        "    across = tl.cdiv(kept, BK)",
        "    t = (tl.program_id(0) // across).to(tl.int64)",
        "    k = (tl.program_id(0) % across) * BK + tl.arange(0, BK)",
        f"    total = tl.zeros({shape}, tl.float32)",
        "    for start in range(0, terms, BR):",
        "        r = start + tl.arange(0, BR)",
        f"        inside = ({k} < kept) & ({r} < terms)",
        f"        stays = {k}",
        *_split("stays", [d for d in range(form.rank) if own.axes[d]], own.sampled),
        f"        goes = {r}",
        *_split("goes", [d for d in range(form.rank) if not own.axes[d]], not own.sampled),
        f"        i = n * features + {' + '.join(f'a{d} * o{d}' for d in range(form.rank))}",
        *_loads(form, "        "),
        *_computed(form, "        "),
        "        total += y0",
        f"    y = tl.sum(total, axis={axis})",
        "    if ADD0:",
        "        y += tl.load(out0 + t * kept + k, mask=k < kept, other=0.0)",
        "    tl.store(out0 + t * kept + k, y, mask=k < kept)",
    ]


def _split(index: str, axes: list[int], sampled: bool) -> list[str]:
    """The places along these axes of a row-major index, and the sample if it comes before them."""
    lines = []
    for d in reversed(axes):
        lines += [f"        a{d} = {index} % s{d}", f"        {index} = {index} // s{d}"]
    return [*lines, f"        n = {index}"] if sampled else lines


def _loads(form: Form, indent: str) -> list[str]:
    lines = []
    for name in form.arrays:
        at, masked = "t * size + i", ", mask=inside, other=0.0"
        if name not in ("dy", "ey") and not (own := form.operands[j := int(name.lstrip("tx"))]).whole:
            terms = [f"t * x{j}_t", *([f"n * x{j}_n"] if own.sampled else [])]
            at = " + ".join([*terms, *(f"a{d} * x{j}_{d}" for d, along in enumerate(own.axes) if along)])
            masked = masked if own.sampled or any(own.axes) else ""  # one number for all
        lines.append(f"{indent}v_{name} = tl.load({name} + ({at}){masked})")
    return lines


def _computed(form: Form, indent: str) -> list[str]:
    """y0 … from what was loaded."""
    lines, names = [], dict[Expression, str]()
    for x in in_order(list(form.outputs)):
        if x.name == "variable":
            names[x] = f"v_{x.value}"
            continue
        names[x] = f"u{len(names)}"
        text = number(x.value) if x.name == "constant" else primitive(x, [names[a] for a in x.arguments])
        lines.append(f"{indent}{names[x]} = {text}")
    ends = [f"{indent}y{r} = tl.where(inside, {names[y]}, 0.0)" for r, y in enumerate(form.outputs)]
    return [*lines, *ends]
