"""What of a task's path a result depends on, and the same as a loss that `mf.MAML` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .structure import Event, Node, Several, Slot, Structure, Value, parts_of


class Program(NamedTuple):
    """A function of the output of one forward pass and of the task's tensors.

    Attributes:
        steps: the calls, with node 0 for the output, further nodes for their results, and slots in order of first use:
            equal for losses that do the same.
        result: the node that is the function's value.
        forward: the output's own number. slots: the tensors' own numbers.
    """

    steps: tuple[Event, ...]
    result: int
    forward: int
    slots: tuple[int, ...]

    @property
    def key(self) -> Any:
        """Equal for equal functions."""
        return self.steps, self.result


def needed(path: Sequence[Structure], indices: Iterable[int]) -> list[Structure]:
    """The forward passes and calls that results depend on, in order."""
    wanted, found = set(indices), list[Structure]()
    for place in reversed(path):
        assert place.event is not None
        if place.event.kind != "adapt" and any(i in wanted for i in range(place.first, place.count)):
            found.append(place)
            wanted |= {p.index for p in parts_of(place.event) if type(p) is Node}
    return found[::-1]


def program(path: Sequence[Structure], index: int) -> Program | str:
    """The function that a result is; a str says why it is none of one forward pass."""
    places = needed(path, [index])
    forwards = [p for p in places if p.event is not None and p.event.kind == "forward"]
    if len(forwards) != 1:
        return f"a loss depends on {len(forwards)} outputs of the learner"
    numbers, slots = {forwards[0].first: 0}, dict[int, int]()

    def canonical(description: Any) -> Any:
        if type(description) is Node:
            return Node(numbers[description.index])
        if type(description) is Slot:
            return Slot(slots.setdefault(description.index, len(slots)), None, description.dtype)  # type: ignore[arg-type]
        if type(description) is Several:
            return Several(description.kind, tuple(map(canonical, description.items)))
        return description

    steps = []
    for place in places:
        event = place.event
        assert event is not None
        if not event.grad:
            return "a loss is computed without gradients in part"
        if event.kind == "call":
            args, kwargs = canonical(event.args), tuple([(k, canonical(v)) for k, v in event.kwargs])
            steps.append(event._replace(args=args, kwargs=kwargs))
            for i in range(place.first, place.count):
                numbers[i] = 1 + sum(len(p.metas) for p in places[1 : places.index(place)]) + i - place.first
    return Program(tuple(steps), numbers[index], forwards[0].first, tuple(slots))


_PLAIN_OPTIONS = {
    "weight": (None,),
    "size_average": (None,),
    "reduce": (None,),
    "reduction": ("mean",),
    "ignore_index": (-100,),
    "label_smoothing": (0.0,),
}


def loss_of(found: Program) -> str | Callable[[Any, Any], Tensor]:
    """The program as `mf.MAML` takes it: by name, or as a function `(outputs, targets) -> scalar`."""
    names = {F.mse_loss: "mse", F.cross_entropy: "cross_entropy"}
    if len(found.steps) == 1 and (step := found.steps[0]).what in names and len(found.slots) == 1:
        given = step.args.items
        output_and_target = len(given) == 2 and type(given[0]) is Node and type(given[1]) is Slot
        if output_and_target and all(type(v) is Value and v.value in _PLAIN_OPTIONS.get(k, ()) for k, v in step.kwargs):
            return names[step.what]
    return _function(found)


def _function(found: Program) -> Callable[[Any, Any], Tensor]:
    """A Python function of the program, whose code can be looked through like a person's."""
    names: dict[str, Any] = {}

    def text(description: Any) -> str:
        if type(description) is Node:
            return f"r{description.index}" if description.index else "outputs"
        if type(description) is Slot:
            return "targets" if len(found.slots) == 1 else f"targets[{description.index}]"
        if type(description) is Several:
            items = ", ".join(map(text, description.items))
            if description.kind is slice:
                return f"slice({items})"
            return f"[{items}]" if description.kind is list else f"({items}{',' if description.items else ''})"
        name = f"constant{len(names)}"
        names[name] = description.value
        return name

    lines, number = ["def loss(outputs, targets):"], 1
    for step in found.steps:
        name = f"function{len(names)}"
        names[name] = step.what
        arguments = [text(a) for a in step.args.items] + [f"{k}={text(v)}" for k, v in step.kwargs]
        lines.append(f"    r{number} = {name}({', '.join(arguments)})")
        number += 1
    lines.append(f"    return {f'r{found.result}' if found.result else 'outputs'}")
    exec(compile("\n".join(lines), "<recorded loss>", "exec"), names)
    function: Callable[[Any, Any], Tensor] = names["loss"]
    return function
