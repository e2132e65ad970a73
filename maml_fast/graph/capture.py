"""What PyTorch executes: the ATen calls of one forward pass at exact shapes, recorded below autograd.

The module itself runs, on tensors of the `meta` device that stand for its parameters, buffers and input: they have
shapes and types but no numbers. So Python's control flow, shape arithmetic, hooks and in-place writes are simply done,
and what would depend on a number cannot be.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import structure
from .draws import precise, replaced
from .graph import ReadsValues, Untraceable
from .inputs import META, Inputs, Leaf
from .lookups import is_library
from .losses import Loss
from .model import Model

_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True, eq=False)
class AtenCall:
    """One executed operation.

    Attributes:
        name: of the ATen operation, without namespace and overload; an in-place one ends in an underscore.
        function: the operation.
        args, kwargs: as the dispatcher got them; tensors stand for themselves.
        outputs: the tensors that it returned, in order.
        written: the arguments that it wrote.
        differentiated: whether autograd was on.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    differentiated: bool


@dataclass(frozen=True, eq=False)
class Captured:
    """One forward pass.

    Attributes:
        calls: in the order of execution. parameters, buffers: the tensors that stood for those of the module.
        inputs: the tensors that stood for its inputs, in order.
        output: what forward returned.
        constants: real tensors that the calls read beside these, by the `id` of their stand-ins.
        stand_ins: these.
        literals: stand-ins of tensors that were made of Python's numbers, and these.
        y, loss: the stand-ins of the targets, and what the loss returned, where it was captured too.
        numbers: what each of the targets is called.
        of_forward: how many of the calls are forward's; the others are the loss's.
        draws: how many times random numbers were drawn.
    """

    calls: tuple[AtenCall, ...]
    parameters: tuple[Tensor, ...]
    buffers: Mapping[str, Tensor]
    inputs: tuple[Tensor, ...]
    output: Any
    constants: Mapping[int, Tensor]
    stand_ins: tuple[Tensor, ...]
    literals: tuple[tuple[Tensor, Tensor], ...]
    y: tuple[Tensor, ...] = ()
    loss: Any = None
    of_forward: int = 0
    draws: int = 0
    numbers: tuple[int, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters; where there is none, of the inputs."""
        return (*self.parameters, *self.inputs)[0].dtype


@dataclass(frozen=True)
class Criterion:
    """A person's loss to be captured with the network.

    Attributes:
        loss: it. leaves: the targets of one sample, in order. form: what they stand in, with anything in their places.
    """

    loss: Loss
    leaves: tuple[Leaf, ...]
    form: Any = field(compare=False)
    kind: Hashable = None

    @staticmethod
    def of(loss: Loss, data: Any) -> Criterion:
        """For one task's targets (N, *shape)."""
        leaves = tuple(map(Leaf.of, structure.tensors(data)))
        return Criterion(loss, leaves, data, (type(data), *(place for place, _ in structure.named("", data))))

    @property
    def numbers(self) -> tuple[int, ...]:
        """What each of the targets is called in the graph: its place in the order of `structure.by_name`."""
        order = structure.by_name(self.form)
        return tuple(order.index(place) for place in range(len(order)))

    def stand_ins(self, samples: int) -> tuple[Tensor, ...]:
        """Tensors without elements for so many samples."""
        return tuple(leaf.stand_in(samples) for leaf in self.leaves)


@torch.inference_mode(False)  # a caller's inference mode would make stand-ins that autograd cannot follow
def capture(
    model: Model,
    samples: int,
    inputs: Inputs,
    criterion: Criterion | None = None,
) -> Captured:
    """Run the module once on stand-ins, and the loss of what it returns.

    Args:
        samples, inputs: what it takes.

    Raises:
        Untraceable: forward or loss needs numbers, or fails.
    """
    parameters = tuple(_stand_in(p).requires_grad_(p.requires_grad) for p in model.parameters())
    buffers = {name: _stand_in(b) for name, b in model.module.named_buffers()}
    given = inputs.stand_ins(samples)
    y = () if criterion is None else criterion.stand_ins(samples)
    recorder, loss = Recorder(model.named(parameters), buffers), None
    try:
        standing_in = model.standing_in(model.named(parameters), buffers)
        with plain_pytorch(), META, recorder, standing_in, Questions(recorder, inputs.device):
            output = _called(model.module, inputs, given)
            of_forward = len(recorder.calls)
            if criterion is not None:
                weights = structure.weights_of(inputs.structured(given))
                loss = criterion.loss(output, structure.replaced(criterion.form, y), weights)
    except Exception as error:  # whatever forward raises is the reason
        raise recorder.refusal or Untraceable(f"forward cannot be captured: {_first_line(error)}") from error
    if recorder.refusal:
        raise recorder.refusal
    _refuse_overwritten(recorder.calls, output if loss is None else loss)
    return Captured(
        calls=tuple(recorder.calls),
        parameters=parameters,
        buffers=buffers,
        inputs=given,
        output=output,
        constants=recorder.constants,
        stand_ins=recorder.stand_ins,
        literals=tuple(recorder.literals),
        y=y,
        loss=loss,
        of_forward=of_forward,
        draws=recorder.draws,
        numbers=() if criterion is None else criterion.numbers,
    )


def _called(module: nn.Module, inputs: Inputs, given: tuple[Tensor, ...]) -> Any:
    """What forward returns. In-place operations refuse leaves that require grad, which a person's input is none of."""
    if inputs.several or inputs.wanted:
        return structure.called(module, inputs.structured(given))
    return module(given[0])


def _refuse_overwritten(calls: list[AtenCall], result: Any) -> None:
    """Let autograd itself see whether a write in place has spoilt what it saved for a derivative.

    Raises:
        Untraceable: it has.
    """
    if not any(t.requires_grad for call in calls for t in call.written):
        return
    if any(custom_function(t) for call in calls for t in call.outputs):
        return  # refused where it is decoded, and no business of ours to run
    try:
        if ends := [v for v in structure.tensors(result) if v.requires_grad]:
            torch.autograd.backward(ends, [torch.empty_like(v) for v in ends])
    except RuntimeError as error:
        if "inplace" in str(error):
            raise Untraceable(f"autograd refuses a write in place: {_first_line(error)}") from error
    except TypeError:
        pass  # the result is no structure of tensors, which is refused later


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Autograd on, automatic casts off, forward's warnings left to the real run."""
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
        warnings.simplefilter("ignore")
        with torch.autocast("cpu", enabled=False):
            yield


def _stand_in(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['(no text)'])[0]}"


_READS = frozenset(("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_unique2", "unique_dim"))


class Recorder(TorchDispatchMode):
    """Records every call; real tensors among the arguments are replaced by stand-ins.

    Attributes:
        refusal: why the pass cannot be captured, also where forward swallowed the exception.
    """

    def __init__(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.calls: list[AtenCall] = []
        self.constants: dict[int, Tensor] = {}
        self.literals: list[tuple[Tensor, Tensor]] = []
        self.refusal: Untraceable | None = None
        self.draws = 0
        self._silent = False
        self._forward_modes = _forward_modes()  # of the caller, who is told elsewhere
        self._stand_ins: dict[int, Tensor] = {}
        self._buffers = {id(t) for t in buffers.values()}
        self._names = {id(t): f"parameter {n!r}" for n, t in parameters.items()}
        self._names |= {id(t): f"buffer {n!r}" for n, t in buffers.items()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what says yes imports PyTorch's compiler, which takes a second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "prim" or self._silent:
            return func(*args, **(kwargs or {}))
        if name in _READS:
            if _called_by(nn.modules.batchnorm._BatchNorm.forward):
                return 1.0  # it counts its batches (momentum=None); only running statistics, thrown away, depend on it
            if self.calls[-1].name == "any" and _called_by(F.gaussian_nll_loss):
                with self:
                    self.check(torch.logical_not(self.calls[-1].args[0]))
                return False
            what = self._names.get(id(args[0]), "a tensor")
            self.refusal = self.read_of(args[0])(f"forward reads the value of {what} ({name})")
            raise self.refusal
        if self.refusal is None and _forward_modes() > self._forward_modes:
            self.refusal = Untraceable("forward takes derivatives in forward mode (torch.func.jvp, dual numbers)")
        if self.refusal is None and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            self.refusal = Untraceable("forward sets saved_tensors_hooks, which fused kernels would not call")
        args, kwargs = self._abstract(args), self._abstract(kwargs or {})
        if (draw := replaced(func, kwargs)) is not None:
            with self:
                return draw(self._uniform, *args, **kwargs)
        if isinstance(kwargs.get("device"), torch.device):
            kwargs["device"] = META  # which forward knows by the name of the real one
        output = func(*args, **kwargs)
        outputs = tuple(output) if isinstance(output, tuple | list) else (output,)
        outputs = tuple(t for t in outputs if isinstance(t, Tensor))
        self.calls.append(
            AtenCall(name, func, args, kwargs, outputs, _written(func, args, kwargs), torch.is_grad_enabled())
        )
        return output

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    @property
    def stand_ins(self) -> tuple[Tensor, ...]:
        """Those of real tensors."""
        return tuple(self._stand_ins.values())

    def check(self, mask: Tensor) -> None:
        """Writes down that every call is to find the mask set."""
        self.calls.append(AtenCall("check", torch._is_all_true, (mask,), {}, (), (), True))

    def literal(self, numbers: Any, dtype: torch.dtype | None) -> Tensor:
        """What stands for a tensor made of Python's numbers."""
        with self._unrecorded():
            real = torch.tensor(numbers, dtype=dtype, device="cpu")
        self.literals.append((_stand_in(real), real))
        return self.literals[-1][0]

    def places(self, mask: Tensor) -> Tensor:
        """Where a mask is set, if it was made of Python's booleans; else the mask."""
        real = next((real for stand_in, real in self.literals if stand_in is mask), None)
        if real is None:
            return mask
        with self._unrecorded():
            found = real.nonzero().flatten().tolist()
        return self.literal(found, torch.int64)

    def _uniform(self, like: Tensor) -> Tensor:
        """Writes a draw down; see `draws.Uniform`."""
        with self._unrecorded():
            u = torch.empty_like(like, dtype=precise(like.dtype))
        arguments = self.draws, like, tuple(like.shape)
        self.calls.append(AtenCall("draw", torch.empty_like, arguments, {}, (u,), (), True))
        self.draws += 1
        return u

    def is_no_parameter(self, tensor: Tensor) -> bool:
        """Whether it is none of the model's own, which are leaves only before they have adapted."""
        return id(tensor) not in self._names

    def read_of(self, tensor: Tensor) -> type[Untraceable]:
        """What it is to read the elements of this tensor: those of buffers are the same for all tasks."""
        return Untraceable if id(tensor) in self._buffers else ReadsValues

    def _abstract(self, value: Any) -> Any:
        """The same arguments with a stand-in for each real tensor."""
        if isinstance(value, Tensor):
            return value if value.device == META else self._constant(value)
        if isinstance(value, tuple | list):
            return type(value)(map(self._abstract, value)) if not hasattr(value, "_fields") else value
        if isinstance(value, dict):
            return {k: self._abstract(v) for k, v in value.items()}
        return value

    def _constant(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._stand_ins:
            stand_in = self._stand_ins[id(tensor)] = _stand_in(tensor)
            self.constants[id(stand_in)] = tensor
        return self._stand_ins[id(tensor)]


class Questions(TorchFunctionMode):
    """Answers for stand-ins where a tensor is, as the real one would.

    Refuses code that asks for anything else that stand-ins answer differently, also where it swallows the exception.
    """

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        super().__init__()
        self._recorder = recorder
        self._places = {
            "device": device,
            "is_cpu": device.type == "cpu",
            "is_cuda": device.type == "cuda",
            "is_meta": device.type == "meta",
            "get_device": -1 if device.index is None else device.index,
        }

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and _is_made_of_numbers(args, kwargs):
            return self._recorder.literal(args[0], (kwargs or {}).get("dtype"))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            nested = isinstance(args[1], list) and any(isinstance(i, list) for i in args[1])  # PyTorch takes a tuple
            args = args if nested else (args[0], self._index(args[1]), *args[2:])
        if func is torch._is_all_true and _called_by_distributions():
            self._recorder.check(args[0])
            return True
        if func is F.one_hot:
            _check_classes(self._recorder, *args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name in self._places:
            if not is_library(sys._getframe(1).f_globals.get("__name__")):
                return self._places[name]
            return func(*args, **(kwargs or {}))
        if name == "is_leaf" and self._recorder.is_no_parameter(args[0]):
            return func(*args, **(kwargs or {}))
        asked = name in _ANSWERS and not is_library(sys._getframe(1).f_globals.get("__name__"))
        if (asked or name in _ELEMENTS or name in _PLACE_AND_TEXT) and self._recorder.refusal is None:
            kind = self._recorder.read_of(args[0]) if name in _ELEMENTS else Untraceable
            self._recorder.refusal = kind(f"forward asks a tensor for {name}, of which a stand-in has another")
        return func(*args, **(kwargs or {}))

    def _index(self, index: Any) -> Any:
        """With literals in place of lists, as PyTorch makes tensors of them, and places in place of their masks."""
        if isinstance(index, tuple):
            return tuple(map(self._index, index))
        if isinstance(index, list) and index and _are_numbers(index):
            index = self._recorder.literal(index, None)
        if isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim == 1:
            return self._recorder.places(index)
        return index


def _check_classes(recorder: Recorder, labels: Tensor, num_classes: int = -1) -> None:
    """Where one_hot is told the number of classes, it raises for labels out of range; of stand-ins it cannot."""
    if num_classes >= 0:
        recorder.check((labels >= 0) & (labels < num_classes))


def _called_by_distributions() -> bool:
    """Whether torch.distributions checks its arguments, which the plan then does at every call."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("torch.distributions.")


def _is_made_of_numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> bool:
    """Whether a call of torch.tensor depends on nothing but Python's numbers, which guards know."""
    return len(args) == 1 and not {*(kwargs or {})} - {"dtype", "device"} and _are_numbers(args[0])


def _are_numbers(data: Any) -> bool:
    if isinstance(data, list | tuple):
        return all(map(_are_numbers, data))
    return isinstance(data, bool | int | float)


_ELEMENTS = frozenset(("tolist", "numpy", "__array__"))
_PLACE_AND_TEXT = frozenset(("data_ptr", "__repr__", "__format__"))
_ANSWERS = frozenset(
    ("is_leaf", "untyped_storage", "storage", "is_contiguous", "stride",
     "grad", "grad_fn", "_version", "type")
)  # fmt: skip


def _forward_modes() -> int:
    """How deep in forward mode this is: tangents show as calls like any others, whose derivatives nobody sees."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    jvps = sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels)
    return forward_ad._current_level + 1 + jvps


def _called_by(function: Callable[..., Any]) -> bool:
    """Whether a function of PyTorch's is at work, as far down as PyTorch's own code goes."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH, __file__)):
        if frame.f_code is function.__code__:
            return True
        frame = frame.f_back
    return False


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    schema = func._schema
    if schema.name.startswith("aten::native_batch_norm") and len(args) > 5 and args[5]:
        return tuple(t for t in args[3:5] if t is not None)  # running statistics, of which the schema says nothing
    if not schema.is_mutable:
        return ()
    given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    marked = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tuple(t for name in marked for t in tensors_in(given.get(name)))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def node_of(tensor: Tensor) -> Any:
    """The tensor's node in autograd's graph; None for a view made under `no_grad` of what has been written since."""
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None


def custom_function(tensor: Tensor) -> str | None:
    """The name of the `autograd.Function` that made the tensor."""
    node = node_of(tensor)
    return type(node).__name__.removesuffix("Backward") if isinstance(node, BackwardCFunction) else None
