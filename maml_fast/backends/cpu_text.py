"""What the core made of a plan, as text: operations, instructions after fusion, and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from operator import itemgetter
from textwrap import wrap
from typing import Any

from ..algorithms.program import Backward, Batch, Hvp, Instruction, Pointwise, Printer, Program

Described = Mapping[str, Any]
"""What `_core.Plan.describe` returns."""


def text(
    described: Described,
    names: Sequence[str],
    kinds: Mapping[str, type[Instruction]],
    program: Program,
    itemsize: int,
) -> str:
    """The whole description.

    Args:
        names: of the parameters. kinds: classes of instructions by their name in the core.
        program: what was described to the core. itemsize: bytes per element.
    """
    lines = ["kernels:", *_operations(described, names), "instructions after fusion:"]
    for number, (_, line) in enumerate(instructions(described, kinds, program)):
        lines.append(f"{number:4}  {line}")
    return "\n".join([*lines, *_memory(described, itemsize)])


def _operations(described: Described, names: Sequence[str]) -> Iterator[str]:
    yield f"  b0 {described['features'][0]}"
    for op in described["ops"]:
        out, inputs = op["out"], ", ".join(f"b{i}" for i in op["inputs"])
        given = ", ".join(names[p] for p in op["parameters"] if p >= 0)
        notes = ["adapted weight kept as factors"] if op["low_rank"] else []
        notes += ["with the convolution before it"] if op["behind_conv"] else []
        notes += ["once for all inner steps"] if op["steady"] else []
        operands = "; ".join(filter(None, (inputs, given)))
        yield ", ".join([f"  b{out} {described['features'][out]} = {op['kind']}({operands})", *notes])


def instructions(
    described: Described, kinds: Mapping[str, type[Instruction]], program: Program
) -> Iterator[tuple[str, str]]:
    """The kind of work that each instruction is, and the instruction as text."""
    printer = Printer()
    functions = [i for i in program.instructions if isinstance(i, Pointwise)]
    for d in described["code"]:
        own = functions[d["function"]] if d["function"] >= 0 else None
        instruction = own or _instruction(d, kinds[d["code"]])
        batch = "" if d["tape"] < 0 else f" {Batch(described['tapes'][d['tape']]['batch'])}"
        tiles = f", by {d['sample_tiles']} sample tiles" if d["sample_tiles"] > 1 else ""
        yield f"{d['code']}{'' if 'loss' in d['code'] else batch}", _line(d, instruction, printer) + tiles


def _line(d: Mapping[str, Any], instruction: Instruction, printer: Printer) -> str:
    if d["step"] >= 0 and isinstance(instruction, Backward):
        theta = printer.read(instruction.theta)
        gradient = printer.text(instruction)
        return f"{printer.write(d['step'], 'θ')} = {theta} − α∘{gradient}"
    if d["in_place"] and isinstance(instruction, Hvp):
        to = printer.read(d["out"]) if d["out"] >= 0 else "gradient"
        return f"{to} −= {'α∘' if d['scaled'] else ''}{printer.text(instruction)}"
    return printer.line(instruction)


def _instruction(d: Mapping[str, Any], kind: type[Instruction]) -> Instruction:
    operands = {f.name: d[f.name] for f in fields(kind)}
    if "batch" in operands:
        operands["batch"] = Batch(operands["batch"])
    for name in ("out", "draws"):
        if operands.get(name) == -1:
            operands[name] = None
    return kind(**operands)


# ---- memory --------------------------------------------------------------------------------------

Part = tuple[str, int]
"""A piece of memory and its elements."""


def _memory(described: Described, itemsize: int) -> Iterator[str]:
    def size(elements: int) -> str:
        return f"{elements * itemsize / 1024:.1f} KiB"

    sums = described["sums"]
    yield (
        f"memory: {size(described['workspace'] + sums)} per thread, for {described['lockstep']} tasks at a time of"
        f" {described['blocks']} blocks, {size(described['packed'] + sums)} for all; what shares a place is named once"
    )
    for names, parts in _groups(described):
        each = f" and {len(names) - 1} more, each" if len(names) > 1 else ""
        inside = ", ".join(f"{part} {size(elements)}" for part, elements in parts)
        line = f"{names[0]}{each} {size(sum(elements for _, elements in parts))}: {inside}"
        yield from wrap(line, 118, initial_indent="  ", subsequent_indent="    ")


def _groups(described: Described) -> Iterator[tuple[list[str], list[Part]]]:
    """What a thread's memory holds, in order; pieces that are divided alike together."""
    pieces = [
        (name, [(part, elements) for _, part, elements in group])
        for name, group in groupby(_places(described), key=itemgetter(0))
    ]
    for parts, alike in groupby(pieces, key=itemgetter(1)):
        yield [name for name, _ in alike], parts


def _places(described: Described) -> Iterator[tuple[str, str, int]]:
    """Piece, part and elements of everything in a thread's memory, in order."""
    names: dict[int, tuple[str, str]] = {}
    for t, tape in enumerate(described["tapes"]):
        for part, offset in _parts(tape, described["ops"]):
            names.setdefault(offset, (f"tape{t} {Batch(tape['batch'])}", part))
    for h, tangents in enumerate(described["tangents"]):
        for part, offset in _parts(tangents, described["ops"]):
            names.setdefault(offset, (f"tangents{h}", part))
    for buffer, offset in enumerate(described["gathered"]):
        names.setdefault(offset, ("sums over inner steps", f"delta b{buffer}"))
    for op in described["ops"]:
        names.setdefault(op["own_panels"], ("weights in panels", f"b{op['out']}"))
    # from the last on: what takes nothing has the place of what follows
    for part, offset in zip(("panels", "norms", "products"), reversed(described["scratch"]), strict=True):
        names.setdefault(offset, ("scratch", part))
    for slot, offset in enumerate(described["slots"]):
        names.setdefault(offset, (f"slot{slot}", "parameters"))
    names.pop(-1, None)
    offsets = sorted(names)
    ends = [*offsets[1:], described["workspace"]]
    for begin, end in zip(offsets, ends, strict=True):
        yield *names[begin], end - begin


def _parts(view: Mapping[str, Any], ops: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    for name in ("value", "delta"):
        yield from ((f"{name} b{buffer}", offset) for buffer, offset in enumerate(view[name]))
    for name in ("aux1", "aux2"):
        yield from ((f"{name} b{op['out']}", offset) for op, offset in zip(ops, view[name], strict=True))
    if "loss" in view:
        yield "probabilities", view["loss"]
