"""The same meta-gradient in JAX: `jit(value_and_grad)` over `vmap` over `grad`.

Written as JAX code is: weights (in, out), images channels-last, kernels HWIO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import Tensor, nn

from ..cases import Problem
from ..graph import losses, structure
from ..nn.sine import Sine
from .inner_rules import inner_rule

Array = Any
Layer = Callable[[list[Array], Array], Array]


def make(problem: Problem) -> Callable[[], tuple[Array, list[Array]]]:
    """A compiled step on the problem's device."""
    device = jax.devices("cpu" if problem.device.type == "cpu" else "gpu")[0]
    rule = inner_rule(problem)
    plain = problem.case.adapts is None and rule.implicit is None
    if not plain or not isinstance(problem.model, nn.Sequential):
        raise NotImplementedError("no twin of this model is written in JAX")
    forward = _network(problem.model)
    loss_of = _LOSSES[losses.resolve(problem.loss).name]

    def support_loss(theta: list[Array], x: Array, y: Array) -> Array:
        return loss_of(forward(theta, x), y)

    def task_loss(theta: list[Array], x_s: Array, y_s: Array, x_q: Array, y_q: Array) -> Array:
        total, state = 0.0, None
        for k, weight in enumerate(rule.weights):
            if weight:
                total += weight * support_loss(theta, x_q, y_q)
            if k < problem.case.steps:
                gradients = jax.grad(support_loss)(theta, x_s, y_s)
                moved, state = rule.step(dict(enumerate(theta)), dict(enumerate(gradients)), state, k)
                theta = list(moved.values())
        return total

    def objective(theta: list[Array], *batch: Array) -> Array:
        return jax.vmap(task_loss, in_axes=(None, 0, 0, 0, 0))(theta, *batch).mean()

    function = jax.jit(jax.value_and_grad(objective))
    put = lambda v: jax.device_put(v, device)  # noqa: E731
    theta = [put(_to_jax(p.detach().cpu())) for p in problem.model.parameters()]
    batch = [put(_images_last(structure.first(v).cpu())) for v in problem.batch]

    def step() -> tuple[Array, list[Array]]:
        loss, gradients = function(theta, *batch)
        jax.block_until_ready((loss, gradients))
        return loss, gradients

    return step


def tensors(problem: Problem, loss: Array, gradients: Sequence[Array]) -> tuple[Tensor, list[Tensor]]:
    """The step's results in PyTorch's layout."""
    return torch.from_numpy(np.array(loss)), [_to_torch(np.asarray(g)) for g in gradients]


def _to_jax(p: Tensor) -> np.ndarray[Any, Any]:
    if p.dim() == 4:
        p = p.permute(2, 3, 1, 0)
    return np.ascontiguousarray((p.T if p.dim() == 2 else p).numpy())


def _to_torch(g: np.ndarray[Any, Any]) -> Tensor:
    g = g.transpose(3, 2, 0, 1) if g.ndim == 4 else g.T if g.ndim == 2 else g
    return torch.from_numpy(np.array(g))


def _images_last(v: Tensor) -> np.ndarray[Any, Any]:
    v = v.permute(0, 1, 3, 4, 2) if v.dim() == 5 else v
    labels = v.dtype == torch.int64
    return np.ascontiguousarray(v.numpy().astype(np.int32) if labels else v.numpy())


def _mean_squared(outputs: Array, y: Array) -> Array:
    return jnp.mean((outputs - y) ** 2)


def _cross_entropy(outputs: Array, y: Array) -> Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], axis=1))


_LOSSES: dict[str, Callable[[Array, Array], Array]] = {"mse": _mean_squared, "cross_entropy": _cross_entropy}


def _network(model: nn.Module) -> Layer:
    """The sequential model as a function of its parameters, in `parameters()` order."""
    layers = [(_LAYERS[type(m)](m), len(list(m.parameters()))) for m in model.children()]

    def forward(theta: list[Array], x: Array) -> Array:
        used = 0
        for layer, count in layers:
            x = layer(theta[used : used + count], x)
            used += count
        return x

    return forward


def _conv(module: Any) -> Layer:
    padding = [(p, p) for p in module.padding]

    def layer(p: list[Array], x: Array) -> Array:
        y = lax.conv_general_dilated(x, p[0], module.stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + p[1]

    return layer


def _batch_norm(module: Any) -> Layer:
    def layer(p: list[Array], x: Array) -> Array:
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        variance = ((x - mean) ** 2).mean(axes)
        return (x - mean) * (p[0] * lax.rsqrt(variance + module.eps)) + p[1]

    return layer


def _max_pool(module: Any) -> Layer:
    k = module.kernel_size

    def layer(p: list[Array], x: Array) -> Array:
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, k, k, 1), (1, k, k, 1), "VALID")

    return layer


def _flatten(module: Any) -> Layer:
    # PyTorch flattens channels first, and the weights are PyTorch's
    return lambda p, x: (x.transpose(0, 3, 1, 2) if x.ndim == 4 else x).reshape(x.shape[0], -1)


_LAYERS: dict[type[nn.Module], Callable[[Any], Layer]] = {
    nn.Linear: lambda m: lambda p, x: x @ p[0] + p[1],
    nn.ReLU: lambda m: lambda p, x: jax.nn.relu(x),
    Sine: lambda m: lambda p, x: jnp.sin(m.w0 * x),
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: _max_pool,
    nn.AdaptiveAvgPool2d: lambda m: lambda p, x: x.mean((1, 2), keepdims=True),
    nn.Flatten: _flatten,
}
