"""`MAML`: the public face of the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checks, dispatch, losses
from .adapted import Adapted
from .model import Adapts, Model, common_device, common_dtype
from .ops import meta_loss, query_outputs
from .plan import Inner, Mode, Needs, Plan, Result, Tensors
from .rates import LearningRates, RateLike


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
        backend: `"auto"`, `"cpu"`, `"vmap"` or `"reference"`.
        adapts: which parameters the inner loop updates: names, or a predicate
            `(name, parameter) -> bool`. None means all. The others still get meta-gradients.
        tape_bytes: memory a thread may spend on saved activations; beyond it they are recomputed.

    Shapes: `x_s (T, Ns, *in)`, `y_s (T, Ns)` int64 labels or `(T, Ns, *out)` targets; `x_q`, `y_q`
    likewise with Nq. Inputs have the parameters' dtype (float32 or float64) and device.

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
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        dispatch.check_name(backend)
        self.module = model
        self.first_order = bool(first_order)
        self.allow_unused = allow_unused
        self.allow_nograd = allow_nograd
        self.backend = backend
        self.tape_bytes = int(tape_bytes)
        self._adapts = adapts
        self._inner = Inner(losses.resolve(loss), checks.steps(steps), self.first_order)
        self._model = self._snapshot()
        self._rates = LearningRates(lr, self._model)
        for name, parameter in self._rates.parameters().items():
            self.register_parameter(name, parameter)
        self._calls: dict[Any, tuple[Plan, dispatch.Choice]] = {}
        self._warned = False

    @property
    def steps(self) -> int:
        return self._inner.steps

    # ---- the public calls: check everything, then compute -------------------------------------

    def meta_loss(self, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor, reduction: str = "mean") -> Tensor:
        """Query loss after adaptation, L = mean_t L_q(θ_K); its gradient is exact.

        Args:
            x_s, y_s, x_q, y_q: the meta-batch (shapes: see the class).
            reduction: `"mean"` or `"sum"` over tasks (scalar), or `"none"` (T,).

        Returns:
            The loss, differentiable once w.r.t. parameters, learnable rates, `x_s` and `x_q`.
        """
        checks.reduction(reduction)
        self._check_batch(x_s, y_s, x_q, y_q)
        return meta_loss(self, x_s, y_s, x_q, y_q, reduction)

    def backward(self, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor, reduction: str = "mean") -> Tensor:
        """Equal to `meta_loss(…).backward()`, without autograd's overhead.

        Adds to the existing `.grad` of parameters, learnable rates and inputs. Hooks that live on
        the autograd graph (a DDP wrapper's, `Tensor.register_hook`) do not run: use `meta_loss`.

        Returns:
            The loss, detached.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
        self._check_batch(x_s, y_s, x_q, y_q)
        tensors = self._tensors(x_s, y_s, x_q, y_q)
        leaves = [*tensors.parameters, *tensors.rates, x_s, x_q]
        if any(leaf.requires_grad and not leaf.is_leaf for leaf in leaves):
            loss = meta_loss(self, x_s, y_s, x_q, y_q, reduction)
            loss.backward()
            return loss.detach()
        tensors.weights = self._weights(x_s, reduction)
        result = self._run(Mode.META_GRADIENT, tensors)
        gradients = [*result.parameters, *result.rates, result.x_s, result.x_q]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
        assert result.losses is not None
        return torch.dot(result.losses, tensors.weights)

    def forward(self, x_s: Tensor, y_s: Tensor, x_q: Tensor) -> Tensor:
        """Query outputs after adaptation, (T, Nq, *out), differentiable once like `meta_loss`."""
        self._check_batch(x_s, y_s, x_q)
        return query_outputs(self, x_s, y_s, x_q)

    @torch.no_grad()
    def adapt(self, x_s: Tensor, y_s: Tensor) -> Adapted:
        """Per-task parameters θ_K, without a graph."""
        self._check_batch(x_s, y_s)
        result = self._run(Mode.ADAPT, self._tensors(x_s, y_s))
        return Adapted(self, dict(zip(self._model.names, result.adapted, strict=True)))

    def explain(self, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor | None = None) -> str:
        """Which backend runs this meta-batch, and why the others do not."""
        self._check_batch(x_s, y_s, x_q, y_q)
        mode = Mode.META_GRADIENT if y_q is not None else Mode.LOGITS
        return str(self._call(mode, self._tensors(x_s, y_s, x_q, y_q))[1])

    # ---- private: no checks below this line ----------------------------------------------------

    def _snapshot(self) -> Model:
        model = Model(self.module, self._adapts)
        if not model.names:
            raise ValueError(f"model: expected a module with parameters, got {type(self.module).__name__} without any")
        parameters = model.parameters()
        checks.model_dtype(common_dtype(parameters))
        common_device(parameters)
        return model

    def _check_batch(
        self, x_s: Tensor, y_s: Tensor, x_q: Tensor | None = None, y_q: Tensor | None = None
    ) -> None:
        parameters = self._model.parameters()
        dtype, device = common_dtype(parameters), common_device(parameters)
        loss = self._inner.loss
        checks.inputs("x_s", x_s, dtype, device)
        checks.targets("y_s", y_s, "x_s", x_s, loss)
        if x_q is None:
            return
        checks.inputs("x_q", x_q, dtype, device)
        checks.same_tasks(x_s, x_q)
        if y_q is not None:
            checks.targets("y_q", y_q, "x_q", x_q, loss)

    def _tensors(
        self,
        x_s: Tensor | None,
        y_s: Tensor | None,
        x_q: Tensor | None = None,
        y_q: Tensor | None = None,
    ) -> Tensors:
        if self._model.restructured():
            self._model = self._snapshot()
            self._calls.clear()
        parameters = self._model.parameters()
        first = parameters[0]
        return Tensors(parameters, self._rates.tensors(first.dtype, first.device), x_s, y_s, x_q, y_q)

    def _weights(self, x: Tensor, reduction: str) -> Tensor:
        """Weight of each task's loss in the reduced one."""
        tasks = x.shape[0]
        return torch.full((tasks,), 1.0 / tasks if reduction == "mean" else 1.0, dtype=x.dtype, device=x.device)

    def _run(self, mode: Mode, tensors: Tensors) -> Result:
        plan, choice = self._call(mode, tensors)
        return choice.backend.run(plan, tensors)

    def _call(self, mode: Mode, t: Tensors) -> tuple[Plan, dispatch.Choice]:
        """The plan and backend for these shapes, made once."""
        x = t.x_s if t.x_s is not None else t.x_q
        assert x is not None
        needs = Needs(
            self._model.trainable,
            self._rates.learnable(),
            t.x_s is not None and t.x_s.requires_grad,
            t.x_q is not None and t.x_q.requires_grad,
        )
        shapes = tuple([None if v is None else v.shape for v in (t.x_s, t.y_s, t.x_q, t.y_q)])
        key = (mode, shapes, x.dtype, x.device, needs, self._model.modes())
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._make_call(mode, t, x, needs)
        return call

    def _make_call(self, mode: Mode, t: Tensors, x: Tensor, needs: Needs) -> tuple[Plan, dispatch.Choice]:
        plan = Plan(
            mode=mode,
            model=self._model,
            inner=self._inner,
            rates=self._rates.shapes,
            needs=needs,
            tasks=x.shape[0],
            support=0 if t.x_s is None else t.x_s.shape[1],
            query=0 if t.x_q is None else t.x_q.shape[1],
            in_shape=tuple(x.shape[2:]),
            target_shapes=tuple(None if y is None else tuple(y.shape[2:]) for y in (t.y_s, t.y_q)),  # type: ignore[arg-type]
            dtype=x.dtype,
            device=x.device,
            tape_bytes=self.tape_bytes,
        )
        choice = dispatch.choose(plan, self.backend)
        if self.backend == "auto" and not self._warned and not choice.backend.fused:
            dispatch.warn_of_fallback(choice)
            self._warned = True
        return plan, choice
