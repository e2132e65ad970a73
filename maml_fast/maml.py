"""`MAML`: the public face of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import checks, dispatch, losses, ops
from .adapted import Adapted
from .model import Adapts, Model, common_device, common_dtype
from .plan import Inner, Mode, Needs, Plan, Result, Tensors
from .rates import LearningRates, RateLike


class Call(NamedTuple):
    """What was decided for one set of shapes: the plan, and the backend that runs it."""

    plan: Plan
    choice: dispatch.Choice


class Prepared(NamedTuple):
    """A checked call with its numbers, ready to run."""

    call: Call
    tensors: Tensors

    def run(self) -> Result:
        return self.call.choice.backend.run(self.call.plan, self.tensors)


_SETTINGS: dict[str, Callable[[Any], Any]] = {
    "first_order": bool,
    "allow_unused": lambda value: value,
    "steps": checks.steps,
    "loss": losses.resolve,
    "backend": dispatch.known,
    "tape_bytes": int,
    "threads": checks.threads,
    "precision": checks.precision,
}


class MAML(nn.Module):
    """Model-Agnostic Meta-Learning over a batch of tasks (Finn et al., arXiv 1703.03400).

    For every task t, θ_{k+1} = θ_k − α ∘ ∇L_s(θ_k) for k = 0 … steps − 1 on its support set; the
    meta-objective is the mean over tasks of L_q(θ_K) on its query set.

    Args:
        model: any `nn.Module` from one batch (N, *in) to one batch (N, *out).
        lr: α. A number, a (learnable) scalar tensor, or a mapping from parameter name to a number
            or a tensor that is a scalar or has the parameter's shape. An `nn.Parameter` is
            registered, so that `parameters()` yields it.
        first_order: drop second derivatives (FOMAML).
        allow_unused: False raises if a parameter does not take part in the model's output;
            otherwise such parameters get zero gradients.
        allow_nograd: accepted for learn2learn's signature. Frozen parameters
            (`requires_grad=False`) are always constants.
        steps: K ≥ 0, the number of inner steps.
        loss: `"mse"`, `"cross_entropy"`, `"bce_with_logits"`, `"l1"`, `"huber"`, the matching
            `torch.nn` module or function, or any callable `(outputs, targets) -> scalar`. The mean
            over a task's samples.
        backend: `"auto"`, `"cpu"`, `"vmap"`, `"reference"` or `"triton"` (unverified on hardware; never `"auto"`).
            The last chooses by the network's size between `"triton-resident"` and `"triton-wide"`.
        adapts: which parameters the inner loop updates: names, or a predicate
            `(name, parameter) -> bool`. None means all. The others still get meta-gradients.
        tape_bytes: memory a thread may spend on saved activations; beyond it they are recomputed.
        threads: of the C++ core; None for PyTorch's `torch.get_num_threads()`. Results do not depend on
            it. PyTorch's own threads spin for milliseconds after an operation, in the core's way: a
            training loop is faster with `torch.set_num_threads(1)` and all cores named here.
        precision: `"float32"` is exact; `"tf32"` and `"bf16"` allow the Triton backend to round the
            operands of matrix products and convolutions. Sums, weights and all else stay float32,
            and the other backends always compute in the parameters' dtype.

    Shapes: `x_s (T, Ns, *in)`, `y_s (T, Ns)` int64 labels or `(T, Ns, *out)` targets; `x_q`, `y_q`
    likewise with Nq. Inputs have the parameters' dtype (float32 or float64) and device; a model with an
    `nn.Embedding` may also take int64 or int32 indices.

    `lr`, `steps` and every other argument after `model` but `adapts` may be assigned later: `maml.steps = 10`.

    BatchNorm uses the statistics of the task's own batch and never touches the running buffers;
    in `eval()` mode the running statistics are constants.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or range.
        RuntimeError: the named backend cannot run the model; the message lists why.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: RateLike,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        *,
        steps: int = 1,
        loss: losses.LossLike = "cross_entropy",
        backend: str = "auto",
        adapts: Adapts = None,
        tape_bytes: int = 1 << 28,
        threads: int | None = None,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self._calls: dict[Any, Call] = {}
        self._warned = False
        self.backend = backend
        self.module = model
        self.first_order = first_order
        self.allow_unused = allow_unused
        self.allow_nograd = allow_nograd
        self.steps = steps
        self.loss = losses.resolve(loss)
        self.tape_bytes = tape_bytes
        self.threads = threads
        self.precision = precision
        self._adapts = adapts
        self._model = self._snapshot()
        self._set_rates(lr)
        self._handle = ops.register(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lr":
            self._set_rates(value)
            return
        if name in _SETTINGS:
            value = _SETTINGS[name](value)
            self._calls.clear()  # they were planned for the old value
        super().__setattr__(name, value)

    def _set_rates(self, lr: RateLike) -> None:
        rates = LearningRates(lr, self._model)
        old: LearningRates | None = self.__dict__.get("_rates")
        for name in old.parameters() if old else ():
            self._parameters.pop(name)
        self.__dict__.pop("lr", None)
        parameters = rates.parameters()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        if "lr" not in parameters:
            self.__dict__["lr"] = lr
        self._rates: LearningRates = rates
        self._calls.clear()

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this process and is made again: copies and pickles hold numbers and settings."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_model", "_calls", "_handle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._calls = {}
        self._model = self._snapshot()
        self._handle = ops.register(self)

    # ---- the public calls ----------------------------------------------------------------------

    def meta_loss(self, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor, reduction: str = "mean") -> Tensor:
        """Query loss after adaptation, L = mean_t L_q(θ_K); its gradient is exact.

        Args:
            x_s, y_s, x_q, y_q: the meta-batch (shapes: see the class).
            reduction: `"mean"` or `"sum"` over tasks (scalar), or `"none"` (T,).

        Returns:
            The loss, differentiable once w.r.t. parameters, learnable rates, `x_s` and `x_q`.
        """
        return ops.meta_loss(self, x_s, y_s, x_q, y_q, checks.reduction(reduction))

    def backward(self, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor, reduction: str = "mean") -> Tensor:
        """Equal to `meta_loss(…).backward()`, without autograd's overhead.

        Adds to the existing `.grad` of parameters, learnable rates and inputs. Hooks that live on
        the autograd graph (a DDP wrapper's, `Tensor.register_hook`) do not run: use `meta_loss`.

        Returns:
            The loss, detached.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
        prepared = self._prepare(Mode.META_GRADIENT, x_s, y_s, x_q, y_q)
        tensors = prepared.tensors
        leaves = tensors.leaves()
        if any(v.grad_fn is not None for v in (*tensors.rates, x_s, x_q)):  # a module's parameters are leaves
            loss = ops.meta_loss(self, x_s, y_s, x_q, y_q, reduction)
            loss.backward()
            return loss.detach()
        tensors.weights = self._weights(prepared.call.plan, reduction)
        if prepared.call.choice.backend.accumulates:
            tensors.into = _existing_gradients(tensors.parameters)
        result = prepared.run()
        for leaf, gradient in zip(leaves, result.gradients(), strict=True):
            if gradient is not None:
                if leaf.grad is None:
                    leaf.grad = gradient
                else:
                    leaf.grad += gradient
        assert result.objective is not None
        return result.objective

    def forward(self, x_s: Tensor, y_s: Tensor, x_q: Tensor) -> Tensor:
        """Query outputs after adaptation, (T, Nq, *out), differentiable once like `meta_loss`."""
        return ops.query_outputs(self, x_s, y_s, x_q)

    @torch.no_grad()
    def adapt(self, x_s: Tensor, y_s: Tensor) -> Adapted:
        """Per-task parameters θ_K, without a graph."""
        result = self._prepare(Mode.ADAPT, x_s, y_s).run()
        return Adapted(self, dict(zip(self._model.names, result.adapted, strict=True)))

    def explain(self, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor | None = None) -> str:
        """Which backend runs this meta-batch, why the others do not, and which variant Triton's would be and why."""
        mode = Mode.META_GRADIENT if y_q is not None else Mode.LOGITS
        return str(self._prepare(mode, x_s, y_s, x_q, y_q).call.choice)

    # ---- from tensors to a plan ----------------------------------------------------------------

    def _snapshot(self) -> Model:
        for name, parameter in self.module.named_parameters():
            if is_lazy(parameter):
                raise ValueError(f"model: expected initialised parameters, got a lazy {name!r}; call the model once")
        model = Model(self.module, self._adapts)
        if not model.names:
            raise ValueError(f"model: expected a module with parameters, got {type(self.module).__name__} without any")
        parameters = model.parameters()
        checks.model_dtype(common_dtype(parameters))
        common_device(parameters)
        return model

    def _prepare(
        self,
        mode: Mode,
        x_s: Tensor | None,
        y_s: Tensor | None,
        x_q: Tensor | None = None,
        y_q: Tensor | None = None,
        leaves: Sequence[Tensor] | None = None,
    ) -> Prepared:
        """Check everything and find the plan.

        What depends on shapes and types alone is checked once for each combination of them.

        Args:
            leaves: stand-ins for the model's parameters and the learning rates.
        """
        if self._model.restructured():
            self._model = self._snapshot()
            self._calls.clear()
        parameters = self._model.parameters() if leaves is None else list(leaves[: len(self._model.names)])
        batch = (x_s, y_s, x_q, y_q)
        first = parameters[0]
        try:
            key = (
                mode,
                *[None if v is None else (v.shape, v.dtype, v.device, v.requires_grad) for v in batch],
                first.dtype,
                first.device,
                self._model.modes(),
                self._rates.learnable(),
            )
        except AttributeError:
            key = None
        call = None if key is None else self._calls.get(key)
        if call is None:
            self._check_batch(mode, *batch)
            call = self._calls[key] = self._make_call(mode, *batch)
        self._check_labels(call.plan, y_s, y_q)
        rates = self._rates.tensors(first.dtype, first.device) if leaves is None else leaves[len(parameters) :]
        return Prepared(call, Tensors(parameters, rates, x_s, y_s, x_q, y_q))

    def _check_batch(self, mode: Mode, x_s: Any, y_s: Any, x_q: Any, y_q: Any) -> None:
        parameters = self._model.parameters()
        dtype, device, loss = common_dtype(parameters), common_device(parameters), self.loss
        indices = self._model.takes_indices
        if mode is not Mode.APPLY:
            checks.inputs("x_s", x_s, dtype, device, indices)
            checks.targets("y_s", y_s, "x_s", x_s, loss, dtype)
        if mode is not Mode.ADAPT:
            checks.inputs("x_q" if x_s is not None else "x", x_q, dtype, device, indices)
        if x_s is not None and x_q is not None:
            checks.same_tasks(x_s, x_q)
        if mode in (Mode.LOSS, Mode.META_GRADIENT):
            checks.targets("y_q", y_q, "x_q", x_q, loss, dtype)

    def _output_of(self, leaves: Sequence[Tensor], x: Tensor) -> Tensor:
        """The model's output for the first task's samples; shapes are all that the caller wants."""
        return self._model.call(self._model.named(leaves[: len(self._model.names)]), self._model.buffers(), x[0])

    def _check_labels(self, plan: Plan, y_s: Tensor | None, y_q: Tensor | None) -> None:
        if plan.classes is not None:
            for name, y in (("y_s", y_s), ("y_q", y_q)):
                if y is not None:
                    checks.labels_in_range(name, y, plan.classes)

    def _weights(self, plan: Plan, reduction: str) -> Tensor:
        """Weight of each task's loss in the reduced one; made once, never written."""
        key = f"weights {reduction}"
        weights = plan.state.get(key)
        if weights is None:
            value = 1.0 / plan.tasks if reduction == "mean" else 1.0
            weights = plan.state[key] = torch.full((plan.tasks,), value, dtype=plan.dtype, device=plan.device)
        assert isinstance(weights, Tensor)
        return weights

    def _make_call(
        self, mode: Mode, x_s: Tensor | None, y_s: Tensor | None, x_q: Tensor | None, y_q: Tensor | None
    ) -> Call:
        x = x_s if x_s is not None else x_q
        y = y_s if y_s is not None else y_q
        assert x is not None
        plan = Plan(
            mode=mode,
            model=self._model,
            inner=Inner(self.loss, self.steps, self.first_order),
            rates=self._rates.shapes,
            needs=Needs(
                self._model.trainable,
                self._rates.learnable(),
                x_s is not None and x_s.requires_grad,
                x_q is not None and x_q.requires_grad,
            ),
            tasks=x.shape[0],
            support=0 if x_s is None else x_s.shape[1],
            query=0 if x_q is None else x_q.shape[1],
            in_shape=tuple(x.shape[2:]),
            target=None if y is None else (tuple(y.shape[2:]), y.dtype),
            dtype=common_dtype(self._model.parameters()),
            in_dtype=x.dtype,
            device=x.device,
            tape_bytes=self.tape_bytes,
            threads=self.threads,
            precision=self.precision,
        )
        self._check_model(plan)
        for name, y in (("y_s", y_s), ("y_q", y_q)):
            if y is not None and plan.out_shape is not None:
                checks.target_shape(name, y, plan.out_shape, self.loss)
        choice = dispatch.choose(plan, self.backend)
        if self.backend == "auto" and not self._warned and not choice.backend.fused:
            dispatch.warn_of_fallback(choice)
            self._warned = True
        return Call(plan, choice)

    def _check_model(self, plan: Plan) -> None:
        graph = plan.trace[0]
        if self.allow_unused is False and graph is not None:
            unused = set(range(len(plan.model.names))) - graph.used_parameters()
            if unused:
                raise ValueError(f"model: parameter {plan.model.names[min(unused)]!r} does not reach the output")


def _existing_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters' gradients, if all have one that a kernel can add to in place."""
    gradients = []
    for p in parameters:
        g = p.grad
        if g is None or g.dtype != p.dtype or g.shape != p.shape or not g.is_contiguous():
            return []
        gradients.append(g)
    return gradients
