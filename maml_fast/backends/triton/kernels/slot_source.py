"""Triton source of a function of slots: one kernel for each form, made once.

A program has a task and a block of one parameter's elements, a row of the table:

    begin, end        of the elements, in the slots' rows
    place             of the first of them in the gradient of a number with elements
    n0, …             where in `rates` the numbers are that are the same for all elements

What is the same for all elements is computed once, in float64, as PyTorch's optimizers compute with Python's numbers.
The constants in it are operands: Adam's steps differ in an exponent, and share a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ....cached import cached_property
from ....graph.expressions import Expression
from ....graph.expressions.language import in_order
from ....lower.slot_functions import SlotFunction
from ....lower.uniform import gathered, of_uniform
from .generated import generated
from .written import number, primitive

PLACES = 3
"""Words of a row of the table before the places of numbers."""


@dataclass(frozen=True)
class SlotForm:
    """What a kernel's source depends on.

    Attributes:
        wide: for each slope whether its number has an element for each of the parameter's.
    """

    function: SlotFunction
    wide: tuple[bool, ...]

    @cached_property
    def roots(self) -> tuple[Expression, ...]:
        """What is computed: contents of slots, sums, slopes."""
        found = [e for e in self.function.outputs if e is not None]
        return tuple(gathered(found, self.function.uniform))

    @cached_property
    def stored(self) -> tuple[int, ...]:
        """Which of the slots are written."""
        return tuple(i for i, e in enumerate(self.function.stores) if e is not None)

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """The slots that are read."""
        return tuple(v for v in self._read if v[0] not in "nc")

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        """The task's numbers that are read."""
        return tuple(v for v in self._read if v[0] == "c")

    @cached_property
    def uniform(self) -> tuple[int, ...]:
        """The rule's numbers that are the same for all elements: their places are in the table."""
        return tuple(int(v[1:]) for v in self._read if v[0] == "n" and v in self.function.uniform)

    @cached_property
    def each(self) -> tuple[int, ...]:
        """Those that are not, whose places are in arrays."""
        return tuple(int(v[1:]) for v in self._read if v[0] == "n" and v not in self.function.uniform)

    @cached_property
    def constants(self) -> tuple[Expression, ...]:
        """Those that are read where all elements have the same."""
        order = in_order(list(self.roots))
        alike = of_uniform(order, self.function.uniform)
        return tuple(dict.fromkeys(a for x in order if x in alike for a in x.arguments if a.name == "constant"))

    @cached_property
    def _read(self) -> list[str]:
        read = {str(x.value) for x in in_order(list(self.roots)) if x.name == "variable"}
        return [v for v in self.function.given if v in read]

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """Names of arrays, of distances between tasks, and of sizes."""
        arrays = [*(f"p_{v}" for v in (*self.slots, *self.scalars)), *(f"at{i}" for i in self.each)]
        arrays += ["rates"] if self.uniform or self.each else []
        arrays += [*(["constants"] if self.constants else []), *(f"out{i}" for i in self.stored)]
        steps = [*(f"p_{v}_t" for v in self.slots), *(["c_t"] if self.scalars else [])]
        steps += [f"out{i}_t" for i in self.stored]
        sums = [*(["first", "total"] if self.function.sums else []), *(["own"] if self.wide else [])]
        if self.function.sums or self.wide:
            arrays, steps = [*arrays, "parts"], [*steps, "parts_t"]
        sizes = ["blocks", *sums, *(["elements"] if any(self.wide) else [])]
        return (*arrays, "table", *steps, *sizes)


_GENERAL = frozenset(("c_t", "parts_t", "blocks", "first", "total", "own", "elements"))
"""Arguments on which no kernel is specialised."""


@lru_cache(maxsize=4096)
def kernel(form: SlotForm) -> Any:
    """The form's kernel."""
    arguments = form.arguments
    lines = [
        f"def slots_kernel({', '.join(arguments)}, BLOCK: tl.constexpr):",
        *(f"    {line}" for line in _body(form)),
    ]
    return generated("slots_kernel", tuple(lines), tuple(a for a in arguments if a in _GENERAL))


def _body(form: SlotForm) -> Iterator[str]:
    roots = list(form.roots)
    yield from (
        "t = (tl.program_id(0) // blocks).to(tl.int64)",
        "b = tl.program_id(0) % blocks",
        f"row = table + b * {PLACES + len(form.uniform)}",
        "i = tl.multiple_of(tl.load(row), 16) + tl.arange(0, BLOCK)",
        "inside = i < tl.load(row + 1)",
    )
    yield from (f"w_{c} = tl.load(p_{c} + t * c_t).to(tl.float64)" for c in form.scalars)
    for word, n in enumerate(form.uniform, PLACES):
        yield f"w_n{n} = tl.load(rates + tl.load(row + {word})).to(tl.float64)"
    yield from (f"v_{s} = tl.load(p_{s} + t * p_{s}_t + i, mask=inside, other=0.0)" for s in form.slots)
    for n in form.each:
        yield f"v_n{n} = tl.load(rates + tl.load(at{n} + i, mask=inside, other=0), mask=inside, other=0.0)"
    yield from (f"w_k{i} = tl.load(constants + {i})" for i in range(len(form.constants)))
    names, lines = _computed(roots, form)
    yield from lines
    yield from (f"y{r} = tl.where(inside, {names[e]}, 0.0)" for r, e in enumerate(roots))
    if form.stored:
        yield "tl.debug_barrier()"  # one slot may be read and written, and threads need not store what they loaded
    yield from (f"tl.store(out{i} + t * out{i}_t + i, y{r}, mask=inside)" for r, i in enumerate(form.stored))
    yield from _parts(form)


def _parts(form: SlotForm) -> Iterator[str]:
    """Sums over the block, and slopes, to where another kernel adds them up."""
    if form.function.sums or form.wide:
        yield "parts += t * parts_t"
    sums, root = len(form.function.sums), len(form.stored)
    for s in range(sums):
        yield f"tl.store(parts + {s} * total + first + b, tl.sum(y{root + s}, axis=0))"
    scalars = wides = 0
    for r, wide in enumerate(form.wide, root + sums):
        if wide:
            at = f"own + {form.wide.count(False)} * blocks + {wides} * elements.to(tl.int64)"
            yield f"tl.store(parts + ({at} + tl.load(row + 2) + tl.arange(0, BLOCK)), y{r}, mask=inside)"
            wides += 1
        else:
            yield f"tl.store(parts + own + {scalars} * blocks + b, tl.sum(y{r}, axis=0))"
            scalars += 1


def _computed(roots: list[Expression], form: SlotForm) -> tuple[dict[Expression, str], list[str]]:
    """What each root is called, in float32, and the lines that compute it."""
    order = in_order(roots)
    alike = of_uniform(order, form.function.uniform)
    single, lines = dict[Expression, str](), list[str]()
    double = {x: f"w_k{i}" for i, x in enumerate(form.constants)}

    def name_of(x: Expression) -> str:
        if x not in single:
            text = number(x.value) if x.name == "constant" else f"{double[x]}.to(tl.float32)"
            single[x] = f"u{len(lines)}"
            lines.append(f"{single[x]} = {text}")
        return single[x]

    for x in order:
        if x.name == "variable":
            (double if x in alike else single)[x] = f"{'w' if x in alike else 'v'}_{x.value}"
        elif x.arguments:
            arguments = [double[a] if x in alike else name_of(a) for a in x.arguments]
            text = primitive(x, arguments, double=x in alike)
            (double if x in alike else single)[x] = name = f"{'w' if x in alike else 'u'}{len(lines)}"
            lines.append(f"{name} = {text}")
    return {x: name_of(x) for x in roots}, lines
