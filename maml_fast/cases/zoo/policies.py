"""Policies and values of reinforcement learning."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from .. import draw
from .model import model


class GaussianPolicy(nn.Module):
    """MAML's own (arXiv 1703.03400): means from an MLP, log-deviations that are parameters."""

    def __init__(self, states: int = 4, actions: int = 2) -> None:
        super().__init__()
        self.layer1, self.layer2, self.mu = nn.Linear(states, 12), nn.Linear(12, 12), nn.Linear(12, actions)
        self.sigma = nn.Parameter(torch.full((actions,), math.log(0.5)))
        self.min_log_std = math.log(1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.layer2(torch.tanh(self.layer1(x))))
        mu = self.mu(x)
        scale = torch.exp(torch.clamp(self.sigma, min=self.min_log_std))
        return mu, scale.expand_as(mu)


def reinforce(outputs: tuple[Tensor, Tensor], y: dict[str, Tensor]) -> Tensor:
    pi = Independent(Normal(*outputs, validate_args=False), 1, validate_args=False)
    return -torch.mean(pi.log_prob(y["actions"]) * y["advantages"])


class CategoricalPolicy(nn.Module):
    def __init__(self, states: int = 4, actions: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(states, 10), nn.ReLU(), nn.Linear(10, actions))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def clipped(logits: Tensor, y: dict[str, Tensor]) -> Tensor:
    """PPO's surrogate (arXiv 1707.06347) with a bonus for entropy."""
    pi = Categorical(logits=logits, validate_args=False)
    ratio = torch.exp(pi.log_prob(y["actions"]) - y["old"])
    surrogate = torch.min(ratio * y["advantages"], torch.clamp(ratio, 0.8, 1.2) * y["advantages"])
    return -(surrogate + 0.01 * pi.entropy()).mean()


class ActorCritic(nn.Module):
    """A trunk, a policy, a value."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 10), nn.Tanh())
        self.actor, self.critic = nn.Linear(10, 3), nn.Linear(10, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.actor(h), self.critic(h).squeeze(-1)


def advantage_actor_critic(outputs: tuple[Tensor, Tensor], y: dict[str, Tensor]) -> Tensor:
    logits, values = outputs
    log_probs = F.log_softmax(logits, dim=-1)
    chosen = log_probs.gather(-1, y["actions"].unsqueeze(-1)).squeeze(-1)
    advantages = (y["returns"] - values).detach()
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return (-chosen * advantages - 0.01 * entropy).mean() + 0.5 * F.mse_loss(values, y["returns"])


class Dueling(nn.Module):
    """Wang et al., arXiv 1511.06581."""

    def __init__(self) -> None:
        super().__init__()
        self.feature = nn.Sequential(nn.Linear(4, 10), nn.ReLU())
        self.advantage, self.value = nn.Linear(10, 3), nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.feature(x)
        advantage = self.advantage(x)
        return self.value(x) + advantage - advantage.mean(dim=-1, keepdim=True)


def temporal_difference(q: Tensor, y: dict[str, Tensor]) -> Tensor:
    chosen = q.gather(1, y["actions"].unsqueeze(1)).squeeze(1)
    return F.smooth_l1_loss(chosen, y["returns"])


class Distributional(nn.Module):
    """Log-probabilities of returns in bins (arXiv 1707.06887)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 10), nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=-1)


class SquashedGaussian(nn.Module):
    """Soft actor-critic's: a network for log-deviations too, actions through tanh (arXiv 1801.01290)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU())
        self.mean, self.log_std = nn.Linear(10, 2), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.net(x)
        log_std = -5 + 0.5 * 7 * (torch.tanh(self.log_std(h)) + 1)
        return torch.tanh(self.mean(h)), log_std.exp() ** 2


def gaussian(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.gaussian_nll_loss(outputs[0], y, outputs[1])


class DynamicsModel(nn.Module):
    """The change of a state, normalised by statistics in buffers (arXiv 1803.11347)."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("std", torch.rand(6) + 0.5)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 4))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        inputs = (torch.cat([state, action], dim=-1) - self.mean) / (self.std + 1e-8)
        return state + self.net(inputs)


TAKEN = {"actions": draw.whole(3), "returns": draw.normal()}
TRIED = draw.named(actions=draw.normal(2), advantages=draw.normal())
RATIOS = draw.named(actions=draw.whole(3), advantages=draw.normal(), old=draw.uniform(-1.5, -0.7))

CASES = (
    model("gaussian-policy", GaussianPolicy, (4,), TRIED, reinforce),
    model("categorical-policy", CategoricalPolicy, (4,), RATIOS, clipped),
    model("actor-critic", ActorCritic, (4,), draw.named(**TAKEN), advantage_actor_critic),
    model("dueling-q", Dueling, (4,), draw.named(**TAKEN), temporal_difference),
    model("distributional-q", Distributional, (4,), draw.shares(7), nn.KLDivLoss(reduction="batchmean")),
    # at the usual rate the inner loop diverges where a deviation is e⁻⁵, and rounding tells the result
    model("squashed-gaussian", SquashedGaussian, (4,), (2,), gaussian, lr=0.001),
    model("dynamics-model", DynamicsModel, draw.several(draw.normal(4), draw.normal(2)), (4,), "huber"),
)
