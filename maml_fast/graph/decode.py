"""From the ATen calls of a forward pass to a `Graph`, and every reason why they have none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cached import cached_property
from .capture import AtenCall, Captured, custom_function, node_of, tensors_in
from .expressions import call as expression
from .graph import Graph, LossOp, Shape, Untraceable
from .inputs import Inputs
from .literals import filled, on_cpu
from .losses import NAMES
from .operations import COMPARED, MASKS, OF_LABELS, OF_WHOLE_NUMBERS, OPERATIONS, PLACES
from .operations.builder import (
    Constant,
    Everywhere,
    GraphBuilder,
    Literal,
    LogProbabilities,
    Losses,
    Nowhere,
    Residual,
    Target,
    Unset,
    Value,
    Weight,
    by_sample,
)
from .operations.overwrites import overwritten, part
from .operations.pointwise import pointwise
from .operations.shapes import reshaped
from .overlaps import are_views, is_whole, memory, region, share_elements

_DRAWS = ("bernoulli", "native_dropout", "rand", "normal", "uniform", "multinomial", "exponential", "random", "cauchy")


_UNSET = ("empty", "new_empty", "lift_fresh", "_local_scalar")  # their elements are not in their arguments
_EXACT = 1 << 24  # below this float32 tells whole numbers apart
_LARGEST = 1 << 20  # elements of a literal


_OF_LABELS = Target | Nowhere | Everywhere  # whole numbers and masks; no activation comes of them alone


@dataclass(frozen=True)
class Unknown:
    """What no fused kernel computes: a reason only where something that matters reads it."""

    reason: str


@dataclass
class _Bound:
    """What a tensor stands for, and whether its memory has been written since."""

    tensor: Tensor  # held, so that its id stays its own
    meaning: Any
    stale: bool = False


def decode(captured: Captured, samples: int, inputs: Inputs, name_of: Callable[[Tensor], str]) -> Graph:
    """The graph of a captured pass.

    Args:
        name_of: the name of a constant that is no buffer, or raises Untraceable.

    Raises:
        Untraceable: the output needs something that no fused kernel computes.
    """
    return Decoder(captured, samples, inputs, name_of).graph()


class Decoder:
    """What the tensors of a captured pass stand for, and the graph under construction; see `decode`."""

    def __init__(self, captured: Captured, samples: int, inputs: Inputs, name_of: Callable[[Tensor], str]) -> None:
        self.captured, self.name_of = captured, name_of
        self.builder = GraphBuilder(samples, inputs.primary_shape, captured.dtype)
        self.bound: dict[int, _Bound] = {}
        self.in_memory: dict[int, list[int]] = {}
        self.made_by: dict[int, AtenCall] = {}
        self.kept = {memory(t) for t in captured.stand_ins}
        for place, tensor in enumerate(captured.inputs):
            self._bind(tensor, self._given(inputs, place))
        for index, p in enumerate(captured.parameters):
            self._bind(p, Weight(index, tuple(p.shape)))
        for name, b in captured.buffers.items():
            self._bind(b, Constant(name, tuple(b.shape), b.dtype == torch.bool))
        for tensor, real in captured.literals:
            self._bind(tensor, Literal(real))
        self.builder.several_targets = len(captured.y) > 1
        for number, y in zip(captured.numbers, captured.y, strict=True):
            self._bind(y, Target(tuple(y.shape), y.dtype, number))

    def _given(self, inputs: Inputs, place: int) -> Value:
        """One of the tensors that the model takes."""
        shape, dtype = inputs.leaves[place]
        if place == inputs.primary:
            return by_sample(0, shape)
        number, whole = inputs.others.index(place), not dtype.is_floating_point
        x = self.builder.emit("input", [], shape, once=False, number=number, whole=whole, per_task=False)
        return replace(x, mask=dtype == torch.bool)

    def follow(self) -> None:
        """Find out what the tensors of forward's calls stand for."""
        for call in self.captured.calls[: self.captured.of_forward]:
            self._call(call)

    def graph(self) -> Graph:
        """The graph of the pass."""
        self.follow()
        if self.captured.loss is not None:
            return self._graph_with_loss()
        self._refuse_tensor_hooks()
        value = self._returned()
        return self._graph(value, value.shape, None)

    def _graph(self, output: Value, returned: Shape | None, loss: LossOp | None) -> Graph:
        if self._elements(output) == 0:  # the input itself, which backends compute nothing of
            output = self.builder.emit("affine", [output], output.shape, dims=output.dims, factor=1.0, shift=0.0)
        ops, shapes = tuple(self.builder.ops), tuple(self.builder.shapes)
        return Graph(ops, shapes, output.index, returned, loss, checks=tuple(self.builder.checks))

    def _returned(self) -> Value:
        """The activation that forward returns."""
        output = self.captured.output
        if not isinstance(output, Tensor):
            raise Untraceable(f"forward returns a {type(output).__name__}, not a single tensor")
        meaning = self.meaning(output)
        if isinstance(meaning, LogProbabilities):
            meaning = self.builder.lifted(meaning, "what forward returns")
        if not isinstance(meaning, Value) or meaning.mask:
            raise Untraceable("forward does not return an activation with the samples first")
        return self.builder.standard(meaning, "what forward returns")

    def _graph_with_loss(self) -> Graph:
        loss, returned = self.captured.loss, None
        with suppress(Untraceable):
            returned = self._returned()  # before the loss writes it
        for call in self.captured.calls[self.captured.of_forward :]:
            self._call(call)
        self._refuse_tensor_hooks()
        meaning = self.meaning(loss) if isinstance(loss, Tensor) else None
        if not isinstance(meaning, Losses) or meaning.shape != ():
            return self._graph_of_value(meaning, returned)
        factor = meaning.factor * (self.builder.samples if meaning.of_sum else 1)
        taken, found = meaning.of, replace(meaning.loss, factors=(factor,))
        if returned is not None and self._elements(returned) == self._elements(taken):
            return self._graph(returned, returned.shape, found)
        return self._graph(taken, None, found)

    def _graph_of_value(self, meaning: Any, returned: Value | None) -> Graph:
        """Of a loss that is none of the named ones: the graph computes it."""
        t = self.builder
        if not isinstance(meaning, Value | Losses):
            raise Untraceable(
                f"it is no number made of outputs and targets, nor a factor times one of {', '.join(NAMES)}"
            )
        value = t.lifted(meaning, "a loss")
        if not value.once or t.full_shape(value) != ():
            raise Untraceable("it is not one number for each task")
        if t.assumes_labels and not t.classes:
            raise Untraceable("it compares labels with a negative number")
        factor = 1.0
        while (op := t.maker(value)) is not None and op.kind == "affine" and op.attributes["shift"] == 0.0:
            factor *= op.attributes["factor"]
            value = replace(value, index=op.inputs[0])
        graph = self._graph(
            value, None, LossOp("value", factors=(factor,), classes=t.classes, ignored=t.ignored, labels=t.labels)
        )
        return graph if returned is None else replace(graph, returned=returned.shape, network=returned.index)

    def _elements(self, value: Value) -> int:
        """The activation of which this one is a reshape, or itself."""
        return (self.builder.unreshaped(value) or value).index

    def _bind(self, tensor: Tensor, meaning: Any) -> None:
        self.bound[id(tensor)] = _Bound(tensor, meaning)
        self.in_memory.setdefault(memory(tensor), []).append(id(tensor))

    def _call(self, call: AtenCall) -> None:
        if call.name == "check":
            self._check(self.meaning(call.args[0]))
            return
        if call.name == "native_batch_norm" and call.written:
            call = replace(call, args=(*call.args[:3], None, None, *call.args[5:]))
        if any(memory(t) in self.kept for t in call.written):
            raise Untraceable("forward writes a tensor that is neither a parameter nor a buffer, and lasts")
        if call.written and call.written[0] is call.args[0]:
            if not self._is_restrided(call):
                self._write(call)
            return
        if call.name == "detach" and node_of(call.outputs[0]) is not None and not self._is_written(call.outputs[0]):
            try:
                meaning = self._saved(call.outputs[0])
            except Untraceable as error:
                meaning = Unknown(str(error))
            self._bind(call.outputs[0], meaning)
            return
        meaning = self._literal(call) or self._meaning(call, call.name)
        for tensor in call.written:
            self._out_of_date(tensor)
            self._bind(tensor, Unknown(f"forward reads a tensor that {call.name} has written"))
        if not all(id(o) in self.bound for o in call.outputs):
            self._bind_outputs(call, meaning)

    def _is_restrided(self, call: AtenCall) -> bool:
        """Whether it is how ATen's pools give their mean the strides of channels that come last: no element moves."""
        if call.name != "as_strided_":
            return False
        mean, size = call.args[:2]
        made = self.made_by.get(id(mean))
        return made is not None and made.name == "mean" and tuple(size[2:]) == (1, 1) and tuple(size) == mean.shape

    def _saved(self, tensor: Tensor) -> Any:
        """What autograd has kept of an operation's result for its derivative, and gives out with its history."""
        made = self._results.get((node_of(tensor), tensor.output_nr))
        if made is not None:
            return self.meaning(made)
        raise Untraceable("forward takes a derivative through something that the capture has not seen")

    def _is_written(self, tensor: Tensor) -> bool:
        """Whether a write has given the tensor its history."""
        return (node_of(tensor), tensor.output_nr) not in self._results and memory(tensor) in self._rewritten

    @cached_property
    def _rewritten(self) -> set[int]:
        return {memory(t) for call in self.captured.calls for t in call.written}

    @cached_property
    def _results(self) -> dict[Any, Tensor]:
        """By its node in autograd's graph what an operation has made; autograd's copies have their originals' nodes."""
        found: dict[Any, Tensor] = {}
        calls = [call for call in self.captured.calls if call.name != "detach"]
        for made in (t for call in calls for t in call.outputs if node_of(t) is not None):
            found.setdefault((made.grad_fn, made.output_nr), made)
        return found

    def _check(self, mask: Any) -> None:
        """Have every call check that a mask is set."""
        if isinstance(mask, Literal) and bool(mask.tensor.all()):
            return
        self.builder.check(self.builder.lifted(mask, "a check"))

    def _write(self, call: AtenCall) -> None:
        """The written tensor stands for the result; what else shares its memory is out of date."""
        target = call.written[0]
        value = {"zero_": 0, "fill_": call.args[-1]}.get(call.name)
        if isinstance(value, int | float):
            meaning: Any = Literal(torch.full(target.shape, value, dtype=target.dtype, device="cpu"))
        elif call.name == "copy_":  # whatever was there
            meaning = self._meaning(replace(call, args=(Unset(tuple(target.shape)), *call.args[1:])), "copy")
        else:
            meaning = self._meaning(call, call.name.removesuffix("_"))
        if isinstance(meaning, Value) and target.is_floating_point():
            meaning = replace(meaning, mask=False)
        if target.requires_grad and not call.differentiated:
            meaning = self._grafted(target, meaning)
        whole = self._written_through(call, target, meaning)
        self._out_of_date(target)
        for tensor, changed in ((target, meaning), *whole):
            self.made_by[id(tensor)] = call
            self._bind(tensor, changed)

    def _written_through(self, call: AtenCall, target: Tensor, meaning: Any) -> tuple[tuple[Tensor, Any], ...]:
        """A tensor of which a view has been written, and what it stands for now, with the derivative that autograd has.

        Nothing where none is known; what else shares the elements is read anew from it.
        """
        for key in self.in_memory.get(memory(target), ()):
            bound = self.bound[key]
            if bound.stale or bound.tensor is target or not are_views(bound.tensor, target):
                continue
            if (bound.tensor.requires_grad and not call.differentiated) or not (place := region(bound.tensor, target)):
                continue
            with suppress(Untraceable):
                value = self.builder.lifted(meaning, "a write")
                old = self.meaning(bound.tensor)
                changed = overwritten(self.builder, old, value, place, tuple(bound.tensor.shape))
                return ((bound.tensor, changed),)
        return ()

    def _grafted(self, target: Tensor, meaning: Any) -> Any:
        """What a write under `no_grad` leaves: new elements, with the derivative that the old ones had."""
        try:
            if not isinstance(meaning, Value):
                return meaning
            old = self.meaning(target)
            return pointwise(self.builder, "graft", lambda v, s: expression("graft", v, s), meaning, old)
        except Untraceable as error:
            return Unknown(str(error))

    def _out_of_date(self, written: Tensor) -> None:
        """Whatever shares elements with a written tensor no longer stands for what it did."""
        for key in self.in_memory.get(memory(written), ()):
            bound = self.bound[key]
            bound.stale = bound.stale or share_elements(bound.tensor, written)

    def _bind_outputs(self, call: AtenCall, meaning: Any) -> None:
        meanings = meaning if isinstance(meaning, tuple) else (meaning,) * len(call.outputs)
        for tensor, one in zip(call.outputs, meanings, strict=False):
            one = Unknown(f"forward reads a further output of {call.name}") if one is None else one
            self.made_by[id(tensor)] = call
            self._bind(tensor, one)

    def _meaning(self, call: AtenCall, name: str) -> Any:
        """What the operation's outputs stand for."""
        if name.startswith(_DRAWS):
            return Unknown(f"forward draws random numbers by {call.name}, or from a generator of its own")
        emit = OPERATIONS.get(name)
        try:
            args, kwargs = self._resolve(call.args), self._resolve(call.kwargs)
            if emit is None:
                return Unknown(f"forward calls {name}, which has no fused kernel")
            self._check_dtype(call, name, of_labels=any(isinstance(a, _OF_LABELS) for a in args))
            return emit(self.builder, *args, **kwargs)
        except Untraceable as error:
            return Unknown(str(error))
        except Exception as error:  # the model has slower backends, which do not ask us
            return Unknown(f"forward calls {name} with unsupported arguments ({type(error).__name__}: {error})")

    def _literal(self, call: AtenCall) -> Literal | tuple[Literal, ...] | None:
        """What an operation gives that reads no tensors but literals."""
        if call.written or call.name.startswith((*_DRAWS, *_UNSET, "draw")) or not call.outputs:
            return None
        if sum(o.numel() for o in call.outputs) > _LARGEST:
            return None
        if (made := filled(call)) is not None:
            return Literal(made)
        known = [self.bound.get(id(t)) for t in tensors_in((call.args, call.kwargs))]
        if any(b is None or b.stale or not isinstance(b.meaning, Literal) for b in known):
            return None
        args, kwargs = (on_cpu(self._resolve(a)) for a in (call.args, call.kwargs))
        with torch.no_grad():
            made = call.function(*args, **kwargs)
        return tuple(map(Literal, made)) if isinstance(made, tuple | list) else Literal(made)

    def _check_dtype(self, call: AtenCall, name: str, of_labels: bool) -> None:
        dtype = self.captured.dtype
        for tensor in call.outputs[:1]:
            if tensor.dtype == torch.bool and name in MASKS:
                if name in COMPARED and not self._tells_apart(call):
                    raise Untraceable("whole numbers are compared that floating point numbers may not tell apart")
                continue
            if name in PLACES or (not of_labels and _is_whole(tensor) and _keeps_whole(call, name)):
                continue
            if of_labels and not tensor.is_floating_point() and name not in OF_LABELS:
                raise Untraceable(f"{name} of whole-number targets has no fused kernel")
            if tensor.dtype != dtype and (tensor.is_floating_point() or not of_labels):
                raise Untraceable(f"forward computes {name} in {tensor.dtype}, not in the parameters' {dtype}")

    def _tells_apart(self, call: AtenCall) -> bool:
        """Whether a comparison of whole numbers comes out the same with floating point numbers in their place."""
        unknown = 0
        for tensor in filter(_is_whole, tensors_in((call.args, call.kwargs))):
            meaning = self.meaning(tensor)
            if not isinstance(meaning, Literal) or bool((meaning.tensor.abs() >= _EXACT).any()):
                unknown += 1
        return unknown == 0 or (unknown == 1 and _is_small((call.args, call.kwargs)))

    def _resolve(self, argument: Any) -> Any:
        """The argument with meanings for tensors."""
        if isinstance(argument, Tensor):
            return self.meaning(argument)
        if isinstance(argument, tuple | list):
            return [self._resolve(a) for a in argument]
        if isinstance(argument, dict):
            return {k: self._resolve(v) for k, v in argument.items()}
        return argument

    def meaning(self, tensor: Tensor) -> Any:
        """What a tensor stands for.

        Raises:
            Untraceable: it is out of date, its derivative is a person's own, or no kernel computes it.
        """
        bound = self.bound.get(id(tensor))
        if bound is None:
            self._bind(tensor, self._constant(tensor))
            bound = self.bound[id(tensor)]
        if isinstance(bound.meaning, Unknown):
            raise Untraceable(bound.meaning.reason)
        if bound.stale:
            bound = self._read_anew(bound)
        if self._is_cut(tensor):
            self._cut(bound)
        return bound.meaning

    def _read_anew(self, bound: _Bound) -> _Bound:
        """A view of a tensor that has been written since: its elements as they are now.

        Raises:
            Untraceable: no tensor that the view is a regular part of is known.
        """
        tensor = bound.tensor
        for key in self.in_memory[memory(tensor)]:
            whole = self.bound[key]
            if whole.stale or isinstance(whole.meaning, Unknown) or not are_views(whole.tensor, tensor):
                continue
            if is_whole(whole.tensor) and is_whole(tensor):
                meaning = reshaped(self.builder, self.meaning(whole.tensor), tensor.shape)
            elif (place := region(whole.tensor, tensor)) is not None:
                meaning = part(self.builder, self.meaning(whole.tensor), place)
                meaning = reshaped(self.builder, meaning, tensor.shape)
            else:
                continue
            self.made_by[id(tensor)] = self.made_by[key]
            self._bind(tensor, meaning)
            return self.bound[id(tensor)]
        raise Untraceable("forward reads a view of a tensor that it has written in place since")

    def _cut(self, bound: _Bound) -> None:
        """From now on the tensor stands for the same without a derivative."""
        if not isinstance(bound.meaning, Value | Weight | LogProbabilities | Residual | Losses):
            raise Untraceable("forward or loss cuts the gradient of something that is not an activation")
        cut = pointwise(self.builder, "detach", lambda v: expression("stop", v), bound.meaning)
        bound.meaning = replace(cut, folded=getattr(bound.meaning, "folded", False))
        self.made_by.pop(id(bound.tensor))

    def _constant(self, tensor: Tensor) -> Constant:
        """A tensor that forward reads beside the model's own."""
        real = self.captured.constants.get(id(tensor))
        if real is None:
            raise Untraceable("forward makes a tensor of its own")
        if real.requires_grad:
            raise Untraceable(
                f"forward reads a parameter-like tensor that requires grad of shape {tuple(real.shape)} that is not "
                "registered in the model"
            )
        return Constant(self.name_of(real), tuple(real.shape), real.dtype == torch.bool)

    def _is_cut(self, tensor: Tensor) -> bool:
        """Whether no derivative leads from the tensor to what it was made of, which has one (no_grad, detach).

        Raises:
            Untraceable: its derivative is a person's own.
        """
        call = self.made_by.get(id(tensor))
        if call is None or isinstance(self.bound[id(tensor)].meaning, Unset | Literal | Constant):
            return False
        if (function := custom_function(tensor)) is not None:
            raise Untraceable(f"forward calls the autograd.Function {function}, whose backward is its own")
        if not tensor.is_floating_point() or not _requires_grad((call.args, call.kwargs)):
            return False
        written = bool(call.written) and call.written[0] is tensor
        return node_of(tensor) is None or not (call.differentiated or written)

    def _refuse_tensor_hooks(self) -> None:
        for bound in self.bound.values():
            if bound.tensor._backward_hooks:
                raise Untraceable("forward registers a hook on a tensor, which fused kernels would not call")


def _is_whole(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


def _keeps_whole(call: AtenCall, name: str) -> bool:
    """Whether an operation of whole numbers gives such that floating point numbers can stand for."""
    given = [t.dtype.is_floating_point for t in tensors_in((call.args, call.kwargs))]
    of_table = name in ("embedding", "index", "index_select")
    return name in OF_WHOLE_NUMBERS and not of_table and not any(given) and _is_small((call.args, call.kwargs))


def _is_small(arguments: Any) -> bool:
    """Whether float32 tells all whole numbers among the arguments apart."""
    if isinstance(arguments, tuple | list):
        return all(map(_is_small, arguments))
    if isinstance(arguments, dict):
        return _is_small(list(arguments.values()))
    return not isinstance(arguments, int | float) or abs(arguments) < _EXACT


def _requires_grad(arguments: Any) -> bool:
    return any(t.requires_grad for t in tensors_in(arguments))
