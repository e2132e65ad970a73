"""The calls as operators, which is what graphs of `torch.compile`, `torch.export` and `make_fx` hold of them.

An operator is a function of the tensors that it is given. What else its result depends on (settings, the module's
Python state, generators of random numbers) it names by a number, or hands from its forward to its backward pass as
a *witness*: bytes that tell whether the module is still as it was, and the state of the generators.
"""

from __future__ import annotations

import functools
import itertools
import random
import secrets
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

from ..algorithms.goal import Mode
from ..lower.plan import Result
from .batch import is_plain
from .once import first_derivative_only
from .prepare import Prepared, Preparer, StandIns
from .reductions import reduced

_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
_PREPARERS: weakref.WeakValueDictionary[int, Preparer] = weakref.WeakValueDictionary()
# PyTorch keeps compiled graphs on disk, with the shapes that a model returned: another process has other numbers.
_HANDLES = itertools.count(secrets.randbits(40) << 20)


def register(preparer: Preparer) -> int:
    """A number by which a compiled graph can name the preparer."""
    handle = preparer.handle = next(_HANDLES)
    _PREPARERS[handle] = preparer
    return handle


def traced() -> bool:
    """Whether a call becomes part of a graph: of `torch.compile`, or of what records or imitates operators.

    Not inside forward mode (`torch.func.linearize` records it too), which the ordinary call refuses.
    """
    return torch.compiler.is_compiling() or (
        torch._C._len_torch_dispatch_stack() > 0
        and forward_ad._current_level < 0
        and any(map(torch._C._get_dispatch_mode, _TRACERS))
    )


@_disable_dynamo
def outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the function between graphs: `torch.compile` ends one before it, and raises where it must not."""
    return function(*args, **kwargs)


def within(operator: Callable[..., Any], call: Callable[..., Any], *batch: Any) -> Callable[..., Any]:
    """What takes the batch into a graph: the operator, or for several tensors the ordinary call between graphs.

    Raises:
        RuntimeError: there is no graph of `torch.compile` to end, but a recording that would hold a constant.
    """
    if is_plain(batch):
        return operator
    if not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "maml_fast: inputs or targets of several tensors cannot be recorded (make_fx, torch.export); pass one each"
        )
    return functools.partial(outside, call)


def meta_loss(preparer: Preparer, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor, reduction: str) -> Tensor:
    """The reduced query loss; see `MAML.meta_loss`."""
    leaves, needs = _leaves(preparer, x_s, x_q)
    names = needs, preparer.handle, preparer.state
    if reduction != "none" and any(needs):
        return _meta_loss(leaves, y_s, y_q, _own(), *names, reduction)[0]
    return reduced(_task_losses(leaves, y_s, y_q, _own(), *names)[0], reduction)


def query_outputs(preparer: Preparer, x_s: Tensor, y_s: Tensor, x_q: Tensor) -> Tensor:
    """The query outputs; see `MAML.forward`."""
    leaves, needs = _leaves(preparer, x_s, x_q)
    return _query_outputs(leaves, y_s, _own(), needs, preparer.handle, preparer.state)[0]


def _own() -> Tensor:
    """Each call's own tensor, of no elements: lest compilers take two calls, which may draw random numbers, for one."""
    return torch.empty(0)


def _leaves(preparer: Preparer, x_s: Tensor, x_q: Tensor) -> tuple[list[Tensor], list[bool]]:
    parameters = list(preparer.module.parameters())
    first = parameters[0]
    learned = [table[key] for table, key in preparer.objective.learned.slots]
    leaves = [*parameters, *preparer.rates.tensors(first.dtype, first.device), *learned, x_s, x_q]
    wanted = [*preparer.model.learns, *(True,) * (len(leaves) - len(parameters))]
    return leaves, [
        torch.is_grad_enabled() and leaf.requires_grad and w for leaf, w in zip(leaves, wanted, strict=True)
    ]


# ---- from an operator's arguments to a call and back -------------------------------------------

Function = TypeVar("Function", bound=Callable[..., Any])


def _surfaced(implementation: Function) -> Function:
    """An operator's implementation with autograd and torch.func at work, below which PyTorch calls it."""

    @functools.wraps(implementation)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ForceDispatchKeyGuard(*_surface()):
            return implementation(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


@functools.cache
def _surface() -> tuple[Any, Any]:
    """The dispatcher's state in a thread that is inside nothing."""
    with ThreadPoolExecutor(1) as pool:
        state = pool.submit(
            lambda: (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())
        )
        return state.result()


def _prepare(
    mode: Mode,
    leaves: list[Tensor],
    y_s: Tensor,
    y_q: Tensor | None,
    needs: list[bool],
    handle: int,
    state: int,
    seed: int | None = None,
) -> Prepared:
    """The call for tensors that have lost their `requires_grad` on the way through a graph.

    Args:
        seed: see `Preparer.prepare`.

    Raises:
        ValueError: another number of tensors, or of another shape, dtype or device, than the model has.
    """
    preparer = _preparer(handle)
    settings, rates = preparer.settings_of(state)
    model, learned, rate_shapes = preparer.model, preparer.objective_of(settings.loss).learned, rates.shapes
    expected = [(f"parameter {n!r}", s) for n, s in zip(model.names, model.shapes, strict=True)]
    expected += [(f"rate {i}", s) for i, s in enumerate(rate_shapes)]
    expected += [(f"parameter {n!r} of the loss", s) for n, s in zip(learned.names, learned.shapes, strict=True)]
    if len(leaves) != len(expected) + 2 or len(needs) != len(leaves):
        raise ValueError(
            f"leaves: expected {len(expected) + 2} tensors and as many flags, got {len(leaves)} and {len(needs)}"
        )
    for i, ((name, shape), leaf) in enumerate(zip(expected, leaves, strict=False)):
        if tuple(leaf.shape) != shape or leaf.dtype != leaves[0].dtype or leaf.device != leaves[0].device:
            raise ValueError(
                f"leaves[{i}]: expected shape {shape}, {leaves[0].dtype} and {leaves[0].device} for {name}, "
                f"got {tuple(leaf.shape)}, {leaf.dtype} and {leaf.device}"
            )
    *rest, x_s, x_q = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
    first, last = len(model.names), len(model.names) + len(rate_shapes)
    given = StandIns(rest[:first], rest[first:last], rest[last:], state)
    return preparer.prepare(mode, x_s, y_s, x_q, y_q, given=given, seed=seed)


def _refuse_forward_mode() -> None:
    if forward_ad._current_level >= 0:
        raise RuntimeError("maml_fast: derivatives by forward mode (dual tensors, jvp) are not computed")


def _preparer(handle: int) -> Preparer:
    try:
        return _PREPARERS[handle]
    except KeyError:
        raise ValueError(f"handle: expected the number of a MAML in this process, got {handle}") from None


def _gradients(result: Result, leaves: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for every leaf: an operator can return neither None nor tensors that share memory."""
    gradients = [leaf.new_empty(0) if g is None else g for g, leaf in zip(result.gradients(), leaves, strict=True)]
    return [g.clone(memory_format=torch.contiguous_format) if _shares(g) else g.contiguous() for g in gradients]


def _shares(g: Tensor) -> bool:
    return g._is_view() or g.untyped_storage().nbytes() > g.numel() * g.element_size()


def _fake_gradients(leaves: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape if need else (0,)) for x, need in zip(leaves, needs, strict=True)]


def _returned(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


# ---- the witness ---------------------------------------------------------------------------------

_HEAD = 16  # bytes of the numbers that stand for the module's state, and of the call's seed
_NO_SEED = -1
_LATER = 0  # a seed's place is taken until the witness tells it
_GENERATOR = torch.get_rng_state().numel()


def _witness_size(device: torch.device) -> int:
    return _HEAD + _GENERATOR + (0 if device.type == "cpu" else 16)


def _mark(prepared: Prepared) -> int:
    """A number for what is read of the module beside its parameters: attributes, modes and buffers."""
    state: list[Any] = []
    for module in prepared.call.plan.objective.modules:
        state += [(name, v) for name, v in module.__dict__.items() if isinstance(v, bool | int | float | str | None)]
        state += [(id(b), b._version) for b in module._buffers.values() if b is not None and not b.is_inference()]
    return hash(tuple(state))


def _generators() -> list[Any]:
    """The states of Python's and NumPy's generators, which nobody puts back for a backward pass."""
    numpy = sys.modules.get("numpy")
    return [random.getstate(), *([] if numpy is None else [numpy.random.get_state()[1].tolist()])]


def _witness(mark: int, seed: int | None, device: torch.device) -> Tensor:
    """The module's mark, the call's seed and PyTorch's generators."""
    head = torch.tensor([mark, _NO_SEED if seed is None else seed])
    parts = [head.view(torch.uint8), torch.get_rng_state()]
    if device.type != "cpu":
        parts.append(torch.get_device_module(device).get_rng_state(device))
    return torch.cat(parts).to(device)


@contextmanager
def _as_then(prepared: Prepared, witness: Tensor) -> Iterator[None]:
    """Inside, PyTorch draws the random numbers of the forward pass again.

    Raises:
        RuntimeError: the module is not as it was.
    """
    device, seen = prepared.call.plan.device, witness.cpu()
    mark, seed = seen[:_HEAD].clone().view(torch.int64).tolist()
    prepared.tensors.seed = None if seed == _NO_SEED else seed
    if _mark(prepared) != mark:
        raise RuntimeError(
            "maml_fast: the model's training mode, attributes or buffers changed between the forward and the backward "
            "pass, which torch.compile computes apart"
        )
    if not prepared.call.choice.backend.records:
        yield
        return
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=device.type if others else "cuda"):
        torch.set_rng_state(seen[_HEAD : _HEAD + _GENERATOR].clone())  # it reads a slice from its storage's start
        for other in others:
            torch.get_device_module(other).set_rng_state(seen[_HEAD + _GENERATOR :].clone(), other)
        yield


def _forward(prepared: Prepared, needs: Sequence[bool]) -> tuple[Result, Tensor]:
    """The result, and the witness for the backward pass.

    Raises:
        RuntimeError: the forward pass itself changes what its backward pass would read.
    """
    mark = _mark(prepared)
    witness = _witness(mark, prepared.tensors.seed, prepared.call.plan.device)
    if not prepared.call.choice.backend.records or not any(needs):
        return prepared.run(), witness
    generators = _generators()
    result = prepared.run()
    if _mark(prepared) != mark or _generators() != generators:
        raise RuntimeError(
            "maml_fast: forward changes the model's attributes or buffers, or draws Python's random numbers; "
            "torch.compile needs a forward that can be run again. Call MAML outside of it, or use backward()"
        )
    return result, witness


# ---- loss and gradient at once -----------------------------------------------------------------


@torch.library.custom_op("maml_fast::meta_loss", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
@_surfaced
def _meta_loss(
    leaves: list[Tensor],
    y_s: Tensor,
    y_q: Tensor,
    own: Tensor,
    needs: list[bool],
    handle: int,
    state: int,
    reduction: str,
) -> list[Tensor]:
    prepared = _prepare(Mode.META_GRADIENT, leaves, y_s, y_q, needs, handle, state)
    prepared.tensors.weights = _preparer(handle).weights(prepared.call.plan, reduction)
    result = prepared.run()
    assert result.objective is not None
    return [result.objective, *_gradients(result, leaves)]


@_meta_loss.register_fake
def _(leaves: list[Tensor], y_s: Tensor, y_q: Tensor, own: Tensor, needs: list[bool], *names: Any) -> list[Tensor]:
    _refuse_forward_mode()
    return [leaves[0].new_empty(()), *_fake_gradients(leaves, needs)]


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    leaves, _, _, _, ctx.needs, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *leaves)
    ctx.leaves = lambda: ctx.saved_tensors[len(leaves) :]


@torch.library.custom_op("maml_fast::scaled", mutates_args=())
def _scaled(gradients: list[Tensor], leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The gradients times a number: an operator, so that a second derivative by the leaves finds no formula."""
    return [g * upstream for g in gradients]


@_scaled.register_fake
def _(gradients: list[Tensor], leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return [torch.empty_like(g) for g in gradients]


@first_derivative_only
def _scale_gradients(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    count = len(ctx.needs)
    gradients, leaves = list(ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])
    return _returned(_scaled(gradients, leaves, upstream[0]), ctx.needs), *[None] * 7


_meta_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


# ---- losses, and a gradient for weights that come later ----------------------------------------


@torch.library.custom_op("maml_fast::task_losses", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
@_surfaced
def _task_losses(
    leaves: list[Tensor], y_s: Tensor, y_q: Tensor, own: Tensor, needs: list[bool], handle: int, state: int
) -> tuple[Tensor, Tensor]:
    result, witness = _forward(_prepare(Mode.LOSS, leaves, y_s, y_q, needs, handle, state), needs)
    assert result.losses is not None
    return result.losses.contiguous(), witness


@_task_losses.register_fake
def _(
    leaves: list[Tensor], y_s: Tensor, y_q: Tensor, own: Tensor, needs: list[bool], handle: int, state: int
) -> tuple[Tensor, Tensor]:
    _refuse_forward_mode()
    return leaves[0].new_empty((leaves[-2].shape[0],)), _fake_witness(leaves)


def _fake_witness(leaves: Sequence[Tensor]) -> Tensor:
    return leaves[0].new_empty((_witness_size(leaves[0].device),), dtype=torch.uint8)


@torch.library.custom_op("maml_fast::meta_gradient", mutates_args=())
@_surfaced
def _meta_gradient(
    leaves: list[Tensor],
    y_s: Tensor,
    y_q: Tensor,
    weights: Tensor,
    witness: Tensor,
    needs: list[bool],
    handle: int,
    state: int,
) -> list[Tensor]:
    prepared = _prepare(Mode.META_GRADIENT, leaves, y_s, y_q, needs, handle, state, _LATER)
    _check_upstream("weights", weights, (prepared.call.plan.tasks,), leaves[0])
    prepared.tensors.weights = weights.resolve_neg().contiguous()
    with _as_then(prepared, witness):
        return _gradients(prepared.run(), leaves)


@_meta_gradient.register_fake
def _(
    leaves: list[Tensor],
    y_s: Tensor,
    y_q: Tensor,
    weights: Tensor,
    witness: Tensor,
    needs: list[bool],
    handle: int,
    state: int,
) -> list[Tensor]:
    return _fake_gradients(leaves, needs)


def _check_upstream(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(value.shape) != shape or value.dtype != like.dtype:
        raise ValueError(f"{name}: expected shape {shape} and {like.dtype}, got {tuple(value.shape)} and {value.dtype}")


def _keep_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    leaves, y_s, y_q, _, ctx.needs, ctx.handle, ctx.state = inputs
    ctx.save_for_backward(*leaves, y_s, y_q, output[1])
    ctx.leaves = lambda: ctx.saved_tensors[: len(leaves)]


@first_derivative_only
def _pull_losses(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
    *leaves, y_s, y_q, witness = ctx.saved_tensors
    found = _meta_gradient(leaves, y_s, y_q, upstream, witness, ctx.needs, ctx.handle, ctx.state)
    return _returned(found, ctx.needs), *[None] * 6


_task_losses.register_autograd(_pull_losses, setup_context=_keep_losses)


# ---- query outputs, and a gradient for a cotangent that comes later ----------------------------


@torch.library.custom_op("maml_fast::query_outputs", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
@_surfaced
def _query_outputs(
    leaves: list[Tensor], y_s: Tensor, own: Tensor, needs: list[bool], handle: int, state: int
) -> tuple[Tensor, Tensor]:
    result, witness = _forward(_prepare(Mode.QUERY_OUTPUTS, leaves, y_s, None, needs, handle, state), needs)
    return _single(result.outputs).contiguous(), witness


def _single(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"model: expected a tensor as output under torch.compile, got {type(outputs).__name__}")
    return outputs


@_query_outputs.register_fake
def _(
    leaves: list[Tensor], y_s: Tensor, own: Tensor, needs: list[bool], handle: int, state: int
) -> tuple[Tensor, Tensor]:
    _refuse_forward_mode()
    preparer, x_q = _preparer(handle), leaves[-1]
    count, learned = len(preparer.model.names), len(preparer.objective.learned.names)
    with torch.no_grad():
        sample = _single(preparer.output_of(leaves[:count], leaves[-2 - learned : -2], x_q))
    return sample.new_empty((*x_q.shape[:2], *sample.shape[1:])), _fake_witness(leaves)


@torch.library.custom_op("maml_fast::pullback", mutates_args=())
@_surfaced
def _pullback(
    leaves: list[Tensor], y_s: Tensor, cotangent: Tensor, witness: Tensor, needs: list[bool], handle: int, state: int
) -> list[Tensor]:
    prepared = _prepare(Mode.VJP, leaves, y_s, None, needs, handle, state, _LATER)
    plan = prepared.call.plan
    if plan.out_shape is not None:
        _check_upstream("cotangent", cotangent, (plan.tasks, plan.query, *plan.out_shape), leaves[0])
    prepared.tensors.cotangent = cotangent.resolve_neg().contiguous()
    with _as_then(prepared, witness):
        return _gradients(prepared.run(), leaves)


@_pullback.register_fake
def _(
    leaves: list[Tensor], y_s: Tensor, cotangent: Tensor, witness: Tensor, needs: list[bool], handle: int, state: int
) -> list[Tensor]:
    return _fake_gradients(leaves, needs)


def _keep_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    leaves, y_s, _, ctx.needs, ctx.handle, ctx.state = inputs
    ctx.save_for_backward(*leaves, y_s, output[1])
    ctx.leaves = lambda: ctx.saved_tensors[: len(leaves)]


@first_derivative_only
def _pull_outputs(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
    *leaves, y_s, witness = ctx.saved_tensors
    found = _pullback(leaves, y_s, upstream, witness, ctx.needs, ctx.handle, ctx.state)
    return _returned(found, ctx.needs), *[None] * 5


_query_outputs.register_autograd(_pull_outputs, setup_context=_keep_outputs)
