"""`MAML`: the public face of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..algorithms import rules
from ..algorithms.goal import Mode
from ..algorithms.gradients import Clip, Gradient
from ..algorithms.rules import OwnRule, Rule
from ..graph import losses
from ..graph.model import Adapts
from ..graph.starting import Start
from ..graph.structure import Data
from ..lower.plan import Result
from . import autograd, checks, compiled
from .adapted import Adapted, adapt
from .batch import joined, weighted
from .prepare import CHECKED, Prepared, Preparer, Settings
from .rates import LearningRates, RateLike


class MAML(nn.Module):
    """Model-Agnostic Meta-Learning over a batch of tasks (Finn et al., arXiv 1703.03400).

    For every task t, θ_{k+1} = θ_k − α ∘ ∇L_s(θ_k) for k = 0 … steps − 1 on its support set; the
    meta-objective is the mean over tasks of L_q(θ_K) on its query set, or of a weighted sum of those of all steps.

    Args:
        model: any `nn.Module` from one batch (N, *in), or several tensors of it, to one batch (N, *out).
        lr: α. A number, a (learnable) scalar tensor, or a mapping from parameter name to a number
            or a tensor that is a scalar or has the parameter's shape, which is copied. An `nn.Parameter`
            is registered, so that `parameters()` yields it. `mf.per_step` gives one of these for each inner step.
        first_order: drop second derivatives (FOMAML).
        allow_unused: False raises if a parameter does not take part in the model's output;
            otherwise such parameters get zero gradients.
        allow_nograd: accepted for learn2learn's signature. Frozen parameters
            (`requires_grad=False`) are always constants.
        steps: K ≥ 0, the number of inner steps.
        inner: in place of `lr` another inner rule, differentiated through with its state: `mf.SGD` (momentum, weight
            decay), `mf.Adam`, `mf.AdamW`, `mf.RMSprop`; `lr=α` is short for `inner=mf.SGD(α)`. Or one's own: an
            object with `init(theta) -> state` and `update(theta, gradient, state, step) -> (theta, state)` over
            dictionaries by parameter name, in tensor operations; if it is an `nn.Module`, its parameters are among
            `parameters()`. A rule gets a gradient of zeros for a parameter that the loss does not use.
        gradient: `mf.Unrolled(order, last, checkpoint)` (default: exact, of order 2), `mf.Implicit(proximal)` (iMAML)
            or `mf.Displacement()` (Reptile).
        clip: `mf.Clip(value=…)` or `mf.Clip(norm=…)` of every inner gradient of a task, differentiated through.
        step_weights: w_0 … w_K: a task's objective is Σ_k w_k L_q(θ_k), in one pass (MAML++, Antoniou et al.,
            arXiv 1810.09502); None for L_q(θ_K). Assign others to anneal them: a plan is made for each set of numbers.
        per_step: every inner step has support samples of its own: `x_s`, `y_s` and `weights_s` are (T, K, Ns, …).
        start: a function `(theta, x_s, y_s) -> {name: tensor}` of one task's θ_0 by name and support set: parameters
            that start from the task's data instead (ProtoMAML), differentiated. θ stands in the model while it runs.
            With `per_step` it gets the first inner step's samples.
        loss: `"mse"`, `"cross_entropy"`, `"bce_with_logits"`, `"l1"`, `"huber"`, the matching
            `torch.nn` module or function, or any callable `(outputs, targets) -> scalar`. The mean
            over a task's samples. It is evaluated with the task's own parameters in the model, so that a penalty over
            `model.parameters()` counts. Parameters of a loss that is a module get meta-gradients and do not adapt.
            A named loss takes the model's output, or the first of several.
        backend: `"auto"`, `"cpu"`, `"vmap"`, `"reference"` or `"triton"` (unverified on hardware; never `"auto"`).
            The last chooses by the network's size between `"triton-resident"` and `"triton-wide"`. `"compiled"` (never
            `"auto"`) runs the losses and meta-gradients of `"vmap"` through TorchInductor: many times as fast, after
            about a minute of compiling for every new shape or setting.
        adapts: which parameters the inner loop updates: names, or a predicate
            `(name, parameter) -> bool`. None means all. The others still get meta-gradients.
        learns: likewise, which parameters get meta-gradients; the others begin every task as they are. None means all.
        tape_bytes: memory a thread may spend on saved activations; beyond it they are recomputed.
        threads: of the C++ core, at most the processors that the process may use; None for PyTorch's
            `torch.get_num_threads()`. Results do not depend on it. PyTorch's own threads spin for milliseconds
            after an operation that uses them, in the core's way: `FlatAdam` and the samplers do not wake them.
        precision: `"float32"` is exact; `"tf32"` and `"bf16"` allow the Triton backend to round the
            operands of matrix products and convolutions. Sums, weights and all else stay float32,
            and the other backends always compute in the parameters' dtype.
        check: `"first"` holds the first call of every captured graph on a fused backend against the textbook: of one
            task, loss and meta-gradient within twice PyTorch's own error plus a floor. On a miss it warns with both
            numbers and uses the next backend that agrees. `"always"` does so in every call, `"never"` not at all.

    Shapes: `x_s (T, Ns, *in)`, `y_s (T, Ns)` int64 labels or `(T, Ns, *out)` targets; `x_q`, `y_q`
    likewise with Nq. Inputs have the parameters' device, and their dtype or one of whole numbers or booleans that the
    model takes. Inputs and targets may be several tensors, all with leading (T, N): of a tuple or list the model is
    called as `model(*x)`, of a mapping as `model(**x)`; a loss of one's own is called as `loss(outputs, y)` with one
    task's y in the structure that was given. Samples of the query set may have another shape than those of the support
    set. The fused backends run one tensor of the parameters' dtype and one shape of samples, the others any.

    `weights_s (T, Ns)` and `weights_q (T, Nq)`, of the parameters' dtype, make a task's loss Σ_n w_n ℓ_n in place of
    the mean, ℓ_n being the loss of sample n alone. They are not normalised, and have gradients. A model whose samples
    mix (BatchNorm on batch statistics) raises. `mf.ragged` pads tasks of different sizes in this way.

    `lr`, `inner`, `steps` and every other argument after `model` but `adapts` and `learns` may be assigned later:
    `maml.steps = 10`.

    With `per_step` each inner step k descends the loss on `x_s[:, k]`, `y_s[:, k]`, and K ≥ 1.

    Buffers are constants on every backend: a pass starts from the module's own, and what forward writes into them (the
    running statistics of a norm, the iterates of `spectral_norm`) is thrown away. BatchNorm uses the statistics of the
    task's own batch; in `eval()` mode the running statistics are constants. `torch.autocast` ends at a call: numbers
    have the parameters' dtype.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or range.
        RuntimeError: the named backend cannot run the model; the message lists why.
    """

    lr: RateLike | None  # a number or mapping stands in __dict__, a parameter is registered
    inner: Rule | OwnRule
    loss: losses.Loss
    steps: int
    step_weights: tuple[float, ...] | None
    gradient: Gradient
    clip: Clip | None
    per_step: bool
    start: Start | None
    first_order: bool
    allow_unused: bool | None
    backend: str
    tape_bytes: int
    threads: int | None
    precision: str
    check: str

    def __init__(
        self,
        model: nn.Module,
        lr: RateLike | None = None,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        *,
        inner: Rule | OwnRule | None = None,
        steps: int = 1,
        gradient: Gradient | None = None,
        clip: Clip | None = None,
        step_weights: Sequence[float] | Tensor | None = None,
        per_step: bool = False,
        start: Start | None = None,
        loss: losses.LossLike = "cross_entropy",
        backend: str = "auto",
        adapts: Adapts = None,
        learns: Adapts = None,
        tape_bytes: int = 1 << 28,
        threads: int | None = None,
        precision: str = "float32",
        check: str = "first",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self.module = model
        self.allow_nograd = allow_nograd
        given = {
            "loss": loss,
            "steps": steps,
            "step_weights": step_weights,
            "first_order": first_order,
            "allow_unused": allow_unused,
            "backend": backend,
            "tape_bytes": tape_bytes,
            "threads": threads,
            "precision": precision,
            "check": check,
            "gradient": gradient,
            "clip": clip,
            "per_step": per_step,
            "start": start,
        }
        checks.one_of(lr=lr, inner=inner)
        settings = {name: check(given[name]) for name, check in CHECKED.items()}
        self.__dict__.update(settings)
        self._adapts, self._learns = _kept(adapts), _kept(learns)
        rule = rules.SGD(lr) if inner is None else checks.rule(inner)
        self._start(Settings(**settings), rule)

    def _start(self, settings: Settings, inner: Rule | OwnRule, again: bool = False) -> None:
        lr, rule = _taken(inner)
        self._preparer = Preparer(self.module, self._adapts, replace(settings, rule=rule), lr, again, self._learns)
        compiled.register(self._preparer)
        self._show_rule(inner)
        self._show_rates(self._preparer.rates)
        self._show_learned()

    def __setattr__(self, name: str, value: Any) -> None:
        preparer = self.__dict__.get("_preparer")
        if preparer is not None and (rule := self._rule_with(name, value)) is not None:
            self._take(rule, settled=name not in ("lr", "inner"))
            return
        if name in CHECKED:
            value = CHECKED[name](value)
            self._preparer.set(name, value)
        super().__setattr__(name, value)
        if name == "loss":
            self._show_learned()

    def _rule_with(self, name: str, value: Any) -> Rule | OwnRule | None:
        """The inner rule after an assignment; None where that is not of the rule."""
        if name == "inner":
            return checks.rule(value)
        if name == "lr":
            return checks.with_number(self.inner, "lr", value)
        replaced = self._preparer.rates.replaced(name, value)
        return None if replaced is None else checks.with_number(self.inner, *replaced)

    def _take(self, inner: Rule | OwnRule, settled: bool = False) -> None:
        """Another inner rule, or the same with other numbers."""
        old = self._preparer.rates
        self._preparer.set_rates(*_taken(inner), settled)
        self._show_rule(inner)
        self._show_rates(self._preparer.rates, old)

    def _show_rule(self, inner: Rule | OwnRule) -> None:
        """Answer to `inner`; a rule that is a module is registered, so that `parameters()` yields its own."""
        self._modules.pop("inner", None)
        self.__dict__.pop("inner", None)
        if isinstance(inner, nn.Module):
            self.add_module("inner", inner)
        else:
            self.__dict__["inner"] = inner

    def _show_learned(self) -> None:
        """Register a loss that is a module with parameters of its own, so that `parameters()` yields them."""
        self._modules.pop("learned_loss", None)
        if self._preparer.objective.learned.names:
            self.add_module("learned_loss", self.loss.module)

    def _show_rates(self, rates: LearningRates, old: LearningRates | None = None) -> None:
        """Register rates that are parameters, and answer to `lr`; a mapping is shown read-only."""
        for name in old.parameters() if old else ():
            self._parameters.pop(name, None)
        self.__dict__.pop("lr", None)
        parameters = rates.parameters()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        if "lr" not in parameters:
            self.__dict__["lr"] = MappingProxyType(rates.given) if isinstance(rates.given, dict) else rates.given

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this process and is made again: copies and pickles hold numbers and settings."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("_preparer",)}
        if isinstance(self._preparer.rates.given, dict):
            state["lr"] = self._preparer.rates.given  # the view of it has no copies
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start(Settings(**{name: self.__dict__[name] for name in CHECKED}), self.inner, again=True)

    # ---- the public calls ----------------------------------------------------------------------

    def meta_loss(
        self,
        x_s: Data,
        y_s: Data,
        x_q: Data,
        y_q: Data,
        reduction: str = "mean",
        *,
        weights_s: Tensor | None = None,
        weights_q: Tensor | None = None,
    ) -> Tensor:
        """Query loss after adaptation, L = mean_t L_q(θ_K); its gradient is exact.

        Args:
            x_s, y_s, x_q, y_q: the meta-batch (shapes: see the class).
            reduction: `"mean"` or `"sum"` over tasks (scalar), or `"none"` (T,).
            weights_s, weights_q: of the samples (shapes: see the class); None for the mean.

        Returns:
            The loss, differentiable once w.r.t. parameters, learnable rates, weights, and the tensors of `x_s` and
            `x_q`.
        """
        if self.per_step or weights_s is not None or weights_q is not None:
            x_s, y_s, x_q = self._given(x_s, y_s, x_q, weights_s, weights_q)
        call: Callable[..., Tensor] = autograd.meta_loss
        if compiled.traced():
            call = compiled.within(compiled.meta_loss, call, x_s, y_s, x_q, y_q)
        return call(self._preparer, x_s, y_s, x_q, y_q, checks.reduction(reduction))

    @overload
    def backward(
        self,
        x_s: Data,
        y_s: Data,
        x_q: Data,
        y_q: Data,
        reduction: str = "mean",
        outputs: Literal[False] = ...,
        *,
        weights_s: Tensor | None = None,
        weights_q: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def backward(
        self,
        x_s: Data,
        y_s: Data,
        x_q: Data,
        y_q: Data,
        reduction: str = "mean",
        *,
        outputs: Literal[True],
        weights_s: Tensor | None = None,
        weights_q: Tensor | None = None,
    ) -> tuple[Tensor, Any]: ...

    def backward(
        self,
        x_s: Data,
        y_s: Data,
        x_q: Data,
        y_q: Data,
        reduction: str = "mean",
        outputs: bool = False,
        *,
        weights_s: Tensor | None = None,
        weights_q: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Equal to `meta_loss(…).backward()`, without autograd's overhead.

        Adds to the existing `.grad` of parameters, learnable rates, inputs and weights. Hooks that live on
        the autograd graph (a DDP wrapper's, `Tensor.register_hook`) do not run: use `meta_loss`.

        Args:
            x_s, y_s, x_q, y_q: the meta-batch (shapes: see the class).
            reduction: `"mean"` or `"sum"` over tasks.
            outputs: return the query outputs of the same pass too.
            weights_s, weights_q: of the samples (shapes: see the class); None for the mean.

        Returns:
            The loss, detached; with `outputs` also f(x_q; θ_K), (T, Nq, *out) or a structure of such tensors, detached.
        """
        if torch.compiler.is_compiling():
            weights = {"weights_s": weights_s, "weights_q": weights_q}
            return compiled.outside(self.backward, x_s, y_s, x_q, y_q, reduction, outputs=outputs, **weights)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
        if self.per_step or weights_s is not None or weights_q is not None:
            x_s, y_s, x_q = self._given(x_s, y_s, x_q, weights_s, weights_q)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # gradients outlive the mode
                return self._backward(x_s, y_s, x_q, y_q, reduction, outputs)
        return self._backward(x_s, y_s, x_q, y_q, reduction, outputs)

    def _backward(
        self, x_s: Data, y_s: Data, x_q: Data, y_q: Data, reduction: str, outputs: bool
    ) -> Tensor | tuple[Tensor, Any]:
        prepared = self._preparer.prepare(Mode.META_GRADIENT, x_s, y_s, x_q, y_q, bool(outputs))
        tensors, leaves, plan = prepared.tensors, prepared.leaves(), prepared.call.plan
        tensors.weights = self._preparer.weights(plan, reduction)
        if any(v.grad_fn is not None for v in leaves[len(tensors.parameters) :]):  # a module's parameters are leaves
            with torch.enable_grad():
                loss, result = autograd.loss_and_result(prepared)
                loss.backward()
            return _loss_of(result, outputs)
        tensors.into = () if plan.starts else prepared.call.choice.backend.into(tensors.parameters)
        if tensors.into:
            increment_version(tensors.into)  # what autograd saved of them is no more
        result = prepared.run()
        for leaf, gradient in zip(leaves, prepared.gradients(result), strict=True):
            if gradient is not None:
                if leaf.grad is None:
                    leaf.grad = gradient
                else:
                    leaf.grad += gradient
        return _loss_of(result, outputs)

    def forward(self, x_s: Data, y_s: Data, x_q: Data, *, weights_s: Tensor | None = None) -> Any:
        """Query outputs after adaptation, (T, Nq, *out), differentiable once like `meta_loss`.

        A model that returns several tensors (in a tuple, list, mapping or dataclass) gives such a structure of theirs.
        With `mf.Displacement` outputs have no graph: it is no derivative of theirs.
        """
        x_s, y_s, x_q = self._given(x_s, y_s, x_q, weights_s)
        call: Callable[..., Any] = autograd.query_outputs
        if compiled.traced():
            call = compiled.within(compiled.query_outputs, call, x_s, y_s, x_q)
        return call(self._preparer, x_s, y_s, x_q)

    def adapt(self, x_s: Data, y_s: Data, *, weights_s: Tensor | None = None) -> Adapted:
        """Per-task parameters θ_K, without a graph, and the inner rule's state, with which `Adapted.step` goes on.

        Of numbers that are per step it takes the first K.
        """
        if torch.compiler.is_compiling():
            return compiled.outside(self.adapt, x_s, y_s, weights_s=weights_s)
        x_s, y_s, _ = self._given(x_s, y_s, None, weights_s)
        return adapt(self._preparer, x_s, y_s)

    def with_steps(self, steps: int) -> MAML:
        """The same learner of the same module with another number of inner steps, and the query loss at the last."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in CHECKED}
        settings |= {"steps": steps, "step_weights": None, "adapts": self._adapts, "learns": self._learns}
        return MAML(self.module, inner=self.inner, allow_nograd=self.allow_nograd, **settings)

    def explain(
        self,
        x_s: Data,
        y_s: Data,
        x_q: Data,
        y_q: Data | None = None,
        level: str = "backend",
        *,
        weights_s: Tensor | None = None,
        weights_q: Tensor | None = None,
    ) -> str:
        """Which backend runs this meta-batch, why the others do not, and which variant Triton's would be and why.

        Args:
            level: `"backend"`, or `"program"` for the model's graph, the program, the kernel calls and their memory
                as well.
        """
        if torch.compiler.is_compiling():
            weights = {"weights_s": weights_s, "weights_q": weights_q}
            return compiled.outside(self.explain, x_s, y_s, x_q, y_q, level, **weights)
        x_s, y_s, x_q = self._given(x_s, y_s, x_q, weights_s, weights_q)
        if level not in ("backend", "program"):
            raise ValueError(f"level: expected 'backend' or 'program', got {level!r}")
        mode = Mode.META_GRADIENT if y_q is not None else Mode.QUERY_OUTPUTS
        choice = self._prepare(mode, x_s, y_s, x_q, y_q).call.choice
        return choice.program() if level == "program" else str(choice)

    def _given(
        self, x_s: Any, y_s: Any, x_q: Any, weights_s: Tensor | None, weights_q: Tensor | None = None
    ) -> tuple[Any, Any, Any]:
        """Inputs with their weights; the sets of all inner steps one behind the other."""
        if self.per_step:
            x_s, y_s, weights_s = joined(self.steps, x_s, y_s, weights_s)
        if weights_s is None and weights_q is None:
            return x_s, y_s, x_q
        sets = self.steps if self.per_step else 1
        x_s, x_q = weighted(x_s, x_q, weights_s, weights_q, next(self.module.parameters()).dtype, sets)
        return x_s, y_s, x_q

    def _prepare(
        self,
        mode: Mode,
        x_s: Data | None,
        y_s: Data | None,
        x_q: Data | None = None,
        y_q: Data | None = None,
    ) -> Prepared:
        return self._preparer.prepare(mode, x_s, y_s, x_q, y_q)


def _kept(chosen: Adapts) -> Adapts:
    """Names as a tuple, lest an iterator be used up."""
    return chosen if chosen is None or callable(chosen) or isinstance(chosen, str) else tuple(chosen)


def _taken(inner: Rule | OwnRule) -> tuple[RateLike | None, Rule | OwnRule | None]:
    """The rates, None for a rule of one's own, and the rule, None for plain gradient descent."""
    if not isinstance(inner, Rule):
        return None, inner
    plain = isinstance(inner, rules.SGD) and inner.is_plain
    return inner.numbers["lr"], None if plain else inner


def _loss_of(result: Result, outputs: bool) -> Tensor | tuple[Tensor, Any]:
    assert result.objective is not None
    return (result.objective, result.outputs) if outputs else result.objective
