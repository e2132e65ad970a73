"""Inner rules: how one inner step moves the parameters, given their gradient.

θ_{k+1}, m_{k+1} = U(θ_k, g_k, m_k; k), with m the rule's state. Each rule is written once, in tensor operations:
`reference` and `vmap` run it, and the fused backends derive from what it executes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

Named = Mapping[str, Tensor]
State = tuple[Tensor, ...]


class OwnRule(Protocol):
    """A rule of one's own; if it is an `nn.Module`, its parameters are learned with the model's.

    Both functions get and give dictionaries with a tensor for each parameter that adapts, by its name.
    """

    def init(self, theta: dict[str, Tensor]) -> Any:
        """m_0 for the parameters θ_0: tensors in any tuples, lists and dictionaries."""

    def update(self, theta: dict[str, Tensor], gradient: dict[str, Tensor], state: Any, step: int) -> tuple[Any, Any]:
        """θ_{k+1} and m_{k+1}, from those of inner step k."""


class Rule:
    """A rule whose numbers may be learned; it does the same to every parameter.

    Attributes:
        numbers: by name: a float, a (learnable) tensor, a mapping by parameter name of these, or `mf.per_step`.
        counts: whether `update` reads which step it is, beyond whether it is the first.
    """

    counts = True

    def __init__(self, **numbers: Any) -> None:
        self.numbers: Mapping[str, Any] = {n: dict(v) if isinstance(v, Mapping) else v for n, v in numbers.items()}

    def init(self, theta: Tensor) -> State:
        """m_0 for one parameter."""
        return ()

    def update(self, numbers: Named, theta: Tensor, gradient: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """θ_{k+1} and m_{k+1} for one parameter."""
        raise NotImplementedError

    def _with(self, **numbers: Any) -> None:
        """Take further numbers, those that are not a plain zero: what these would do is left out."""
        self.numbers = {**self.numbers, **{n: v for n, v in numbers.items() if not _is_zero(v)}}

    def replaced(self, name: str, value: Any) -> Rule:
        """The same rule with another value for one of its numbers."""
        other = copy.copy(self)
        other.numbers = {**self.numbers, name: dict(value) if isinstance(value, Mapping) else value}
        return other

    def states(self) -> int:
        """How many tensors of state a parameter has behind a step."""
        one = torch.ones((), dtype=torch.float64)
        return len(self.update(dict.fromkeys(self.numbers, one), one, one, (), 0)[1])

    def has(self, name: str) -> bool:
        """Whether the rule has a number."""
        return name in self.numbers

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={v}' for n, v in self.numbers.items())})"


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


class SGD(Rule):
    """Stochastic gradient descent: the update of `torch.optim.SGD`, differentiated through.

    d = g + w θ;  m ← d at the first step, then μ m + (1 − τ) d;  θ ← θ − α m, with Nesterov θ − α (d + μ m).

    Args:
        lr: α. momentum: μ. dampening: τ. weight_decay: w. Each a number, a (learnable) scalar tensor, a mapping by
            parameter name to a number or a tensor that is a scalar or has the parameter's shape, or `mf.per_step` of
            any of these.
        nesterov: whether to look ahead; needs a momentum, and no dampening.

    Raises:
        ValueError: nesterov without a momentum or with a dampening.
    """

    counts = False

    def __init__(
        self, lr: Any = 1e-3, momentum: Any = 0, dampening: Any = 0, nesterov: bool = False, weight_decay: Any = 0
    ) -> None:
        super().__init__(lr=lr)
        self._with(momentum=momentum, dampening=dampening, weight_decay=weight_decay)
        self.nesterov = bool(nesterov)
        if nesterov and (not self.has("momentum") or self.has("dampening")):
            raise ValueError("nesterov: expected a momentum and zero dampening")

    @property
    def is_plain(self) -> bool:
        """Whether it is θ ← θ − α g."""
        return {*self.numbers} <= {"lr", "dampening"}

    def update(self, numbers: Named, theta: Tensor, gradient: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        d = gradient + numbers["weight_decay"] * theta if self.has("weight_decay") else gradient
        if self.has("momentum"):
            momentum, kept = numbers["momentum"], 1 - numbers["dampening"] if self.has("dampening") else 1.0
            state = (momentum * state[0] + kept * d if state else d,)
            d = d + momentum * state[0] if self.nesterov else state[0]
        return theta - numbers["lr"] * d, state


class Adam(Rule):
    """Adam (Kingma and Ba, arXiv 1412.6980): the update of `torch.optim.Adam`, differentiated through.

    m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;  θ ← θ − α m̂ / √(v̂ + ε²), with m̂ = m / (1 − β₁^{k+1}) and v̂
    likewise. PyTorch divides by √v̂ + ε, which has no derivative at g = 0; away from it the two agree to 1e-6.

    Args:
        lr: α. betas: β₁ and β₂. eps: ε. weight_decay: w. Each as in `SGD`.
        decoupled: whether w shrinks θ itself, by α w (AdamW), and is not added to g as w θ.
    """

    def __init__(
        self,
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0,
        decoupled: bool = False,
    ) -> None:
        beta1, beta2 = betas
        super().__init__(lr=lr, beta1=beta1, beta2=beta2, eps=eps)
        self._with(weight_decay=weight_decay)
        self.decoupled = bool(decoupled)

    def update(self, numbers: Named, theta: Tensor, gradient: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        lr, beta1, beta2, eps = (numbers[n] for n in ("lr", "beta1", "beta2", "eps"))
        g = gradient
        if self.has("weight_decay"):
            w = numbers["weight_decay"]
            theta, g = (theta * (1 - lr * w), g) if self.decoupled else (theta, g + w * theta)
        m, v = (1 - beta1) * g, (1 - beta2) * (g * g)
        if state:
            m, v = beta1 * state[0] + m, beta2 * state[1] + v
        size, scale = lr / (1 - beta1 ** (step + 1)), 1 / (1 - beta2 ** (step + 1))
        return theta - size * m / (v * scale + eps * eps).sqrt(), (m, v)


def AdamW(lr: Any = 1e-3, betas: tuple[Any, Any] = (0.9, 0.999), eps: Any = 1e-8, weight_decay: Any = 0.01) -> Adam:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101): `Adam(…, decoupled=True)`."""
    return Adam(lr, betas, eps, weight_decay, decoupled=True)


class RMSprop(Rule):
    """RMSprop: the update of `torch.optim.RMSprop`, differentiated through.

    d = g + w θ;  v ← β v + (1 − β) d²;  r = d / √(v + ε²);  θ ← θ − α r, with momentum b ← μ b + r and θ ← θ − α b.
    Centered, v loses the square of the mean ḡ ← β ḡ + (1 − β) d. PyTorch divides by √v + ε (see `Adam`).

    Args:
        lr: α. alpha: β. eps: ε. weight_decay: w. momentum: μ. Each as in `SGD`.
        centered: whether to divide by the deviation from the mean.
    """

    counts = False

    def __init__(
        self,
        lr: Any = 1e-2,
        alpha: Any = 0.99,
        eps: Any = 1e-8,
        weight_decay: Any = 0,
        momentum: Any = 0,
        centered: bool = False,
    ) -> None:
        super().__init__(lr=lr, alpha=alpha, eps=eps)
        self._with(weight_decay=weight_decay, momentum=momentum)
        self.centered = bool(centered)

    def update(self, numbers: Named, theta: Tensor, gradient: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        alpha, eps = numbers["alpha"], numbers["eps"]
        d = gradient + numbers["weight_decay"] * theta if self.has("weight_decay") else gradient
        before = list(state)
        v = (1 - alpha) * (d * d)
        after = [alpha * before.pop(0) + v if state else v]
        square = after[0]
        if self.centered:
            mean = (1 - alpha) * d
            after.append(alpha * before.pop(0) + mean if state else mean)
            square = square - after[1] * after[1]
        r = d / (square + eps * eps).sqrt()
        if self.has("momentum"):
            after.append(numbers["momentum"] * before.pop(0) + r if state else r)
            r = after[-1]
        return theta - numbers["lr"] * r, tuple(after)
