"""Pointwise instructions as launches: one for the parameters that share a function, then the sums.

What one launch finds to be summed up are *parts*, side by side for each task: of every sum one for each block of all
launches of the instruction; then of every launch its slopes, in the order of their region (see `numbers.py`): one for
each block of those of scalar numbers, all elements of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ....algorithms.program import Pointwise, Program
from ....algorithms.updates import Elementwise
from ....lower.plan import Plan
from ....lower.slot_functions import OfParameter, of_parameters
from ..kernels import slots, vectors
from ..kernels.launch import Launch
from ..kernels.slot_source import SlotForm
from ..layers.network import Network
from .numbers import Numbers, Owners, Region


@dataclass(frozen=True)
class Block:
    """Elements of one parameter that a program works on; `place` is where they are among the launch's."""

    parameter: int
    begin: int
    end: int
    place: int


class Group:
    """The parameters that share a function.

    Attributes:
        first: how many blocks of the instruction come before its own. own: where its slopes begin among the parts.
        elements: how many it works on.
    """

    def __init__(self, form: SlotForm, network: Network, members: dict[int, OfParameter], first: int) -> None:
        self.form, self.members, self.first, self.own = form, members, first, 0
        self.blocks: list[Block] = []
        self.elements = 0
        for p in members:
            where = network.flat.slice(p)
            for begin in range(where.start, where.stop, slots.BLOCK):
                end = min(begin + slots.BLOCK, where.stop)
                self.blocks.append(Block(p, begin, end, self.elements))
                self.elements += end - begin

    @property
    def owners(self) -> dict[int, Owners]:
        """Of the numbers with elements, whose they are."""
        return {n: tuple((p, of.numbers[n]) for p, of in self.members.items()) for n in self.form.each}

    @property
    def key(self) -> Hashable:
        """What decides its region."""
        return self.form.wide, tuple((p, of.learned) for p, of in self.members.items())

    @property
    def region(self) -> Region:
        """Where its slopes add up."""
        blocks, wide = len(self.blocks), self.form.wide
        found = Region(wide.count(False) * blocks + wide.count(True) * self.elements)
        scalars, wides = 0, wide.count(False) * blocks
        for i, is_wide in enumerate(wide):
            for b, block in enumerate(self.blocks):
                number = self.members[block.parameter].learned[i]
                if not is_wide:
                    found.ranges.append((number, scalars + b, scalars + b + 1))
                elif b == 0 or self.blocks[b - 1].parameter != block.parameter:
                    found.pieces.append((number, wides + block.place, block.parameter))
            scalars, wides = (scalars, wides + self.elements) if is_wide else (scalars + blocks, wides)
        return found

    def table(self, numbers: Numbers) -> Tensor:
        """What the kernel reads of its blocks."""
        rows = []
        for block in self.blocks:
            of = self.members[block.parameter].numbers
            rows.append([block.begin, block.end, block.place, *(numbers.starts[of[n]] for n in self.form.uniform)])
        return torch.tensor(rows, dtype=torch.int32)


class Layout:
    """An instruction's launches, and the parts that they leave.

    Attributes:
        blocks: of all launches. parts: for each task.
    """

    def __init__(self, plan: Plan, network: Network, function: Elementwise) -> None:
        self.groups: list[Group] = []
        self.blocks = 0
        members: dict[SlotForm, dict[int, OfParameter]] = {}
        shapes = plan.rates.shapes
        for p, of in sorted(of_parameters(function, shapes).items()):
            if p in network.flat.active_set:
                wide = tuple(torch.Size(shapes[n]).numel() != 1 for n in of.learned)
                members.setdefault(SlotForm(of.function, wide), {})[p] = of
        for form, own in members.items():
            if (group := Group(form, network, own, self.blocks)).blocks:
                self.groups.append(group)
                self.blocks += len(group.blocks)
        self.parts = self.blocks * max((len(g.form.function.sums) for g in self.groups), default=0)
        for group in self.groups:
            group.own = self.parts
            self.parts += group.region.size


def _layouts(plan: Plan, network: Network, program: Program) -> dict[Elementwise, Layout]:
    functions = dict.fromkeys(i.function for i in program.instructions if isinstance(i, Pointwise))
    return {function: Layout(plan, network, function) for function in functions}


def parts(plan: Plan, network: Network, program: Program) -> int:
    """The most parts that an instruction leaves for each task."""
    return max((layout.parts for layout in _layouts(plan, network, program).values()), default=0)


def regions(plan: Plan, network: Network) -> dict[Hashable, Region]:
    """Where the gradients of the rule's numbers add up: steps whose parameters have the same ones share a region."""
    return {group.key: group.region for group in _groups(plan, network) if group.form.wide}


def owners(plan: Plan, network: Network) -> set[Owners]:
    """Of all numbers with elements, whose they are."""
    return {of for group in _groups(plan, network) for of in group.owners.values()}


def _groups(plan: Plan, network: Network) -> Iterator[Group]:
    for layout in _layouts(plan, network, plan.program).values():
        yield from layout.groups


class SlotFunctions:
    """All pointwise instructions of a program.

    Args:
        slot, scalar: the contents of a slot, and a number, of the tasks at hand. parts: memory for parts.
    """

    def __init__(
        self,
        plan: Plan,
        network: Network,
        program: Program,
        numbers: Numbers,
        launch: Launch,
        slot: Callable[[int], Tensor],
        scalar: Callable[[int], Tensor],
        parts: Callable[[], Tensor | None],
    ) -> None:
        self._numbers, self._launch = numbers, launch
        self._slot, self._scalar, self._parts = slot, scalar, parts
        self._layouts = _layouts(plan, network, program)
        device = numbers.values.device
        groups = [group for layout in self._layouts.values() for group in layout.groups]
        self._tables = {group: group.table(numbers).to(device) for group in groups}
        of_forms = {group.form: [x.value for x in group.form.constants] for group in groups}
        self._constants = {f: torch.tensor(of, dtype=torch.float64, device=device) for f, of in of_forms.items()}

    def run(self, i: Pointwise, tasks: int) -> None:
        """One instruction for the tasks at hand."""
        layout = self._layouts[i.function]
        parts = self._parts()
        for group in layout.groups:
            slots.apply(self._launch, group.form, tasks, len(group.blocks), self._given(i, layout, group, parts))
        for s, number in enumerate(i.sums):
            assert parts is not None
            slots.sum_blocks(self._launch, self._scalar(number), parts[:, s * layout.blocks : (s + 1) * layout.blocks])
        for group in layout.groups:
            self._add_slopes(group, parts)

    def _given(self, i: Pointwise, layout: Layout, group: Group, parts: Tensor | None) -> dict[str, Tensor | int]:
        """What a launch takes, by name."""
        form = group.form
        given: dict[str, Tensor | int] = {"table": self._tables[group], "rates": self._numbers.values}
        given |= {"constants": self._constants[form]}
        given |= {f"at{n}": self._numbers.places(owners) for n, owners in group.owners.items()}
        ins = dict(zip(i.function.reads, i.ins, strict=True))
        outs = {f"out{place}": self._slot(i.outs[place]) for place in form.stored}
        read = {f"p_{name}": self._slot(ins[name]) for name in form.slots} | outs
        given |= read | {f"{name}_t": slot.stride(0) for name, slot in read.items()}
        scalars = dict(zip(i.function.scalars, i.scalars, strict=True))
        for name in form.scalars:
            one = self._scalar(scalars[name])
            given |= {f"p_{name}": one, "c_t": one.stride(0)}
        if parts is not None:
            given |= {"parts": parts, "parts_t": parts.stride(0)}
        return given | {"first": group.first, "total": layout.blocks, "own": group.own, "elements": group.elements}

    def _add_slopes(self, group: Group, parts: Tensor | None) -> None:
        if group.form.wide and (total := self._numbers.region(group.key)) is not None:
            assert parts is not None
            vectors.sum_tasks(self._launch, total, parts[:, group.own : group.own + total.numel()])
