"""Batch, running and layer normalisation (g group, e element of a group, r = 1/√(variance + ε)).

A group is what shares a mean: a channel for batch normalisation, a sample's features for layer
normalisation. With x̂ = (x − μ) r, u = γ δ and mean over a group's elements:

    y  = γ x̂ + β                        x̂˙ = r (ẋ − mean ẋ − x̂ q),  q = mean(x̂ ẋ)
    dx = r w,  w = u − mean u − x̂ c,    c = mean(u x̂)
    dẋ = r (ẇ − r q w),                 ẇ = u̇ − mean u̇ − x̂˙ c − x̂ mean(u̇ x̂ + u x̂˙)
    dγ = Σ δ x̂,  dβ = Σ δ               dγ˙ = Σ (δ̇ x̂ + δ x̂˙),  dβ˙ = Σ δ̇

With constant statistics every mean in these lines is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher


@dataclass(frozen=True)
class Groups:
    """How a task's values fall into groups: element e of group g is at (e // inner) outer + e % inner + g group.

    Attributes:
        groups, elements: how many a task has, and how many numbers a group has.
        by_group: the weight's index is g rather than e.
        constant: the statistics are given, not computed.
    """

    groups: int
    elements: int
    inner: int
    outer: int
    group: int
    by_group: bool
    constant: bool

    @property
    def numbers(self) -> list[int]:
        return [self.groups, self.elements, self.inner, self.outer, self.group]

    def constants(self) -> dict[str, Any]:
        across = 16 if self.by_group else 4
        block_g = min(triton.next_power_of_2(self.groups), across)
        block_e = min(triton.next_power_of_2(self.elements), 2048 // block_g)
        return {"BY_GROUP": self.by_group, "CONSTANT": self.constant, "BLOCK_G": block_g, "BLOCK_E": block_e}


@triton.jit
def _tile(start, g, groups, elements, inner, outer, group, BLOCK_E: tl.constexpr):
    """Elements, places and mask of the tile (e, g) that begins at element `start`."""
    e = start + tl.arange(0, BLOCK_E)
    place = (e // inner * outer + e % inner)[:, None] + g[None, :] * group
    return e, place, (e[:, None] < elements) & (g[None, :] < groups)


@triton.jit
def _weight(weight, e, g, elements, groups, BY_GROUP: tl.constexpr):
    """A weight vector as a tile that broadcasts to (e, g)."""
    if BY_GROUP:
        return tl.load(weight + g, g < groups, other=0.0)[None, :]
    else:
        return tl.load(weight + e, e < elements, other=0.0)[:, None]


@triton.jit
def norm_kernel(
    x, y, weight, bias, running_mean, running_variance, means, scales,
    groups, elements, inner, outer, group, task_size, weight_task, bias_task, eps,
    BY_GROUP: tl.constexpr, CONSTANT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y = γ x̂ + β; keeps μ and r of each group."""
    blocks = tl.cdiv(groups, BLOCK_G)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    g = tl.program_id(0) % blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    x += t * task_size
    y += t * task_size
    if CONSTANT:
        mean = tl.load(running_mean + g, g < groups, other=0.0)
        variance = tl.load(running_variance + g, g < groups, other=0.0)
    else:
        mean = tl.zeros((BLOCK_G,), tl.float32)
        for start in range(0, elements, BLOCK_E):
            e, place, inside = _tile(start, g, groups, elements, inner, outer, group, BLOCK_E)
            mean += tl.sum(tl.load(x + place, inside, other=0.0), axis=0)
        mean /= elements
        variance = tl.zeros((BLOCK_G,), tl.float32)
        for start in range(0, elements, BLOCK_E):
            e, place, inside = _tile(start, g, groups, elements, inner, outer, group, BLOCK_E)
            d = tl.where(inside, tl.load(x + place, inside, other=0.0) - mean[None, :], 0.0)
            variance += tl.sum(d * d, axis=0)
        variance /= elements
    scale = 1.0 / tl.sqrt(variance + eps)
    tl.store(means + t * groups + g, mean, g < groups)
    tl.store(scales + t * groups + g, scale, g < groups)
    for start in range(0, elements, BLOCK_E):
        e, place, inside = _tile(start, g, groups, elements, inner, outer, group, BLOCK_E)
        value = (tl.load(x + place, inside, other=0.0) - mean[None, :]) * scale[None, :]
        if weight is not None:
            value *= _weight(weight + t * weight_task, e, g, elements, groups, BY_GROUP)
        if bias is not None:
            value += _weight(bias + t * bias_task, e, g, elements, groups, BY_GROUP)
        tl.store(y + place, value, inside)


@triton.jit
def norm_backward_kernel(
    x, delta, out, weight, means, scales, weight_out, bias_out,
    groups, elements, inner, outer, group, task_size, weight_task, weight_out_task, bias_out_task,
    ACCUMULATE: tl.constexpr, ACCUMULATE_WEIGHT: tl.constexpr, ACCUMULATE_BIAS: tl.constexpr,
    BY_GROUP: tl.constexpr, CONSTANT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx = r (u − mean u − x̂ mean(u x̂)); where weights go by group also dγ and dβ."""
    blocks = tl.cdiv(groups, BLOCK_G)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    g = tl.program_id(0) % blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    mean = tl.load(means + t * groups + g, g < groups, other=0.0)[None, :]
    scale = tl.load(scales + t * groups + g, g < groups, other=0.0)[None, :]
    x += t * task_size
    delta += t * task_size
    sum_d = tl.zeros((BLOCK_G,), tl.float32)
    sum_dx = tl.zeros((BLOCK_G,), tl.float32)
    sum_u = tl.zeros((BLOCK_G,), tl.float32)
    sum_ux = tl.zeros((BLOCK_G,), tl.float32)
    for start in range(0, elements, BLOCK_E):
        e, place, inside = _tile(start, g, groups, elements, inner, outer, group, BLOCK_E)
        hat = (tl.load(x + place, inside, other=0.0) - mean) * scale
        d = tl.load(delta + place, inside, other=0.0)
        u = d
        if weight is not None:
            u *= _weight(weight + t * weight_task, e, g, elements, groups, BY_GROUP)
        sum_d += tl.sum(d, axis=0)
        sum_dx += tl.sum(d * hat, axis=0)
        sum_u += tl.sum(u, axis=0)
        sum_ux += tl.sum(u * hat, axis=0)
    if weight_out is not None:
        target = weight_out + t * weight_out_task + g
        if ACCUMULATE_WEIGHT:
            sum_dx += tl.load(target, g < groups, other=0.0)
        tl.store(target, sum_dx, g < groups)
    if bias_out is not None:
        target = bias_out + t * bias_out_task + g
        if ACCUMULATE_BIAS:
            sum_d += tl.load(target, g < groups, other=0.0)
        tl.store(target, sum_d, g < groups)
    if out is not None:
        for start in range(0, elements, BLOCK_E):
            e, place, inside = _tile(start, g, groups, elements, inner, outer, group, BLOCK_E)
            w = tl.load(delta + place, inside, other=0.0)
            if weight is not None:
                w *= _weight(weight + t * weight_task, e, g, elements, groups, BY_GROUP)
            if not CONSTANT:
                hat = (tl.load(x + place, inside, other=0.0) - mean) * scale
                w -= sum_u[None, :] / elements + hat * (sum_ux[None, :] / elements)
            w *= scale
            target = out + t * task_size + place
            if ACCUMULATE:
                w += tl.load(target, inside, other=0.0)
            tl.store(target, w, inside)


@triton.jit
def norm_tangent_kernel(
    x, push, y, weight, weight_push, bias_push, means, scales, push_means, push_slopes,
    groups, elements, inner, outer, group, task_size, weight_task, weight_push_task, bias_push_task,
    BY_GROUP: tl.constexpr, CONSTANT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """ẏ = γ x̂˙ + γ̇ x̂ + β̇; keeps mean ẋ and q of each group. An absent ẋ (`push`) is zero."""
    blocks = tl.cdiv(groups, BLOCK_G)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    g = tl.program_id(0) % blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    mean = tl.load(means + t * groups + g, g < groups, other=0.0)[None, :]
    scale = tl.load(scales + t * groups + g, g < groups, other=0.0)[None, :]
    x += t * task_size
    push_mean = tl.zeros((BLOCK_G,), tl.float32)
    slope = tl.zeros((BLOCK_G,), tl.float32)
    if push is not None:
        push += t * task_size
        if not CONSTANT:
            for start in range(0, elements, BLOCK_E):
                e, place, inside = _tile(start, g, groups, elements, inner, outer, group, BLOCK_E)
                p = tl.load(push + place, inside, other=0.0)
                push_mean += tl.sum(p, axis=0)
                slope += tl.sum(p * (tl.load(x + place, inside, other=0.0) - mean) * scale, axis=0)
            push_mean /= elements
            slope /= elements
    tl.store(push_means + t * groups + g, push_mean, g < groups)
    tl.store(push_slopes + t * groups + g, slope, g < groups)
    for start in range(0, elements, BLOCK_E):
        e, place, inside = _tile(start, g, groups, elements, inner, outer, group, BLOCK_E)
        hat = (tl.load(x + place, inside, other=0.0) - mean) * scale
        value = tl.zeros_like(hat)
        if push is not None:
            value = tl.load(push + place, inside, other=0.0) - push_mean[None, :] - hat * slope[None, :]
            value *= scale
            if weight is not None:
                value *= _weight(weight + t * weight_task, e, g, elements, groups, BY_GROUP)
        if weight_push is not None:
            value += hat * _weight(weight_push + t * weight_push_task, e, g, elements, groups, BY_GROUP)
        if bias_push is not None:
            value += _weight(bias_push + t * bias_push_task, e, g, elements, groups, BY_GROUP)
        tl.store(y + t * task_size + place, value, inside)


@triton.jit
def _curved(
    x, push, delta, delta_push, weight, weight_push, mean, scale, push_mean, slope,
    e, g, place, inside, elements, groups, BY_GROUP: tl.constexpr,
):  # fmt: skip
    """x̂, x̂˙, δ, δ̇, u, u̇ of a tile."""
    hat = (tl.load(x + place, inside, other=0.0) - mean) * scale
    hat_push = tl.zeros_like(hat)
    if push is not None:
        hat_push = scale * (tl.load(push + place, inside, other=0.0) - push_mean - hat * slope)
    d = tl.load(delta + place, inside, other=0.0)
    d_push = tl.load(delta_push + place, inside, other=0.0)
    u, u_push = d, d_push
    if weight is not None:
        gamma = _weight(weight, e, g, elements, groups, BY_GROUP)
        u, u_push = gamma * d, gamma * d_push
    if weight_push is not None:
        u_push += _weight(weight_push, e, g, elements, groups, BY_GROUP) * d
    return hat, hat_push, d, d_push, u, u_push


@triton.jit
def norm_curvature_kernel(
    x, push, delta, delta_push, out, weight, weight_push, means, scales, push_means, push_slopes,
    weight_out, bias_out,
    groups, elements, inner, outer, group, task_size, weight_task, weight_push_task, weight_out_task, bias_out_task,
    ACCUMULATE: tl.constexpr, ACCUMULATE_WEIGHT: tl.constexpr, ACCUMULATE_BIAS: tl.constexpr,
    BY_GROUP: tl.constexpr, CONSTANT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dẋ, the tangent of `norm_backward_kernel`; where weights go by group also dγ˙ and dβ˙."""
    blocks = tl.cdiv(groups, BLOCK_G)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    g = tl.program_id(0) % blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    mean = tl.load(means + t * groups + g, g < groups, other=0.0)[None, :]
    scale = tl.load(scales + t * groups + g, g < groups, other=0.0)[None, :]
    push_mean = tl.load(push_means + t * groups + g, g < groups, other=0.0)[None, :]
    slope = tl.load(push_slopes + t * groups + g, g < groups, other=0.0)[None, :]
    x += t * task_size
    delta += t * task_size
    delta_push += t * task_size
    if push is not None:
        push += t * task_size
    if weight is not None:
        weight += t * weight_task
    if weight_push is not None:
        weight_push += t * weight_push_task
    sum_d = tl.zeros((BLOCK_G,), tl.float32)
    sum_dx = tl.zeros((BLOCK_G,), tl.float32)
    c = tl.zeros((BLOCK_G,), tl.float32)
    mean_u = tl.zeros((BLOCK_G,), tl.float32)
    c_push = tl.zeros((BLOCK_G,), tl.float32)
    mean_u_push = tl.zeros((BLOCK_G,), tl.float32)
    for start in range(0, elements, BLOCK_E):
        e, place, inside = _tile(start, g, groups, elements, inner, outer, group, BLOCK_E)
        hat, hat_push, d, d_push, u, u_push = _curved(
            x, push, delta, delta_push, weight, weight_push, mean, scale, push_mean, slope,
            e, g, place, inside, elements, groups, BY_GROUP,
        )  # fmt: skip
        sum_d += tl.sum(d_push, axis=0)
        sum_dx += tl.sum(d_push * hat + d * hat_push, axis=0)
        mean_u += tl.sum(u, axis=0)
        c += tl.sum(u * hat, axis=0)
        mean_u_push += tl.sum(u_push, axis=0)
        c_push += tl.sum(u_push * hat + u * hat_push, axis=0)
    if weight_out is not None:
        target = weight_out + t * weight_out_task + g
        if ACCUMULATE_WEIGHT:
            sum_dx += tl.load(target, g < groups, other=0.0)
        tl.store(target, sum_dx, g < groups)
    if bias_out is not None:
        target = bias_out + t * bias_out_task + g
        if ACCUMULATE_BIAS:
            sum_d += tl.load(target, g < groups, other=0.0)
        tl.store(target, sum_d, g < groups)
    if out is not None:
        mean_u, c, mean_u_push, c_push = mean_u / elements, c / elements, mean_u_push / elements, c_push / elements
        for start in range(0, elements, BLOCK_E):
            e, place, inside = _tile(start, g, groups, elements, inner, outer, group, BLOCK_E)
            hat, hat_push, d, d_push, u, u_push = _curved(
                x, push, delta, delta_push, weight, weight_push, mean, scale, push_mean, slope,
                e, g, place, inside, elements, groups, BY_GROUP,
            )  # fmt: skip
            value = u_push
            if not CONSTANT:
                w = u - mean_u[None, :] - hat * c[None, :]
                value -= mean_u_push[None, :] + hat_push * c[None, :] + hat * c_push[None, :]
                value -= scale * slope * w
            value *= scale
            target = out + t * task_size + place
            if ACCUMULATE:
                value += tl.load(target, inside, other=0.0)
            tl.store(target, value, inside)


@triton.jit
def norm_weights_kernel(
    x, push, delta, delta_push, means, scales, push_means, push_slopes, weight_out, bias_out,
    groups, elements, task_size, weight_out_task, bias_out_task,
    ACCUMULATE_WEIGHT: tl.constexpr, ACCUMULATE_BIAS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dγ_e = Σ_g δ x̂ and dβ_e = Σ_g δ where weights go by element; with δ̇ (`delta_push`) their tangents."""
    blocks = tl.cdiv(elements, BLOCK_E)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    sum_d = tl.zeros((BLOCK_E,), tl.float32)
    sum_dx = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, groups, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        inside = (g[:, None] < groups) & (e[None, :] < elements)
        place = t * task_size + g[:, None] * elements + e[None, :]
        group = t * groups + g
        mean = tl.load(means + group, g < groups, other=0.0)[:, None]
        scale = tl.load(scales + group, g < groups, other=0.0)[:, None]
        hat = (tl.load(x + place, inside, other=0.0) - mean) * scale
        d = tl.load(delta + place, inside, other=0.0)
        if delta_push is None:
            sum_d += tl.sum(d, axis=0)
            sum_dx += tl.sum(d * hat, axis=0)
        else:
            d_push = tl.load(delta_push + place, inside, other=0.0)
            term = d_push * hat
            if push is not None:
                push_mean = tl.load(push_means + group, g < groups, other=0.0)[:, None]
                slope = tl.load(push_slopes + group, g < groups, other=0.0)[:, None]
                term += d * scale * (tl.load(push + place, inside, other=0.0) - push_mean - hat * slope)
            sum_d += tl.sum(d_push, axis=0)
            sum_dx += tl.sum(term, axis=0)
    if weight_out is not None:
        target = weight_out + t * weight_out_task + e
        if ACCUMULATE_WEIGHT:
            sum_dx += tl.load(target, e < elements, other=0.0)
        tl.store(target, sum_dx, e < elements)
    if bias_out is not None:
        target = bias_out + t * bias_out_task + e
        if ACCUMULATE_BIAS:
            sum_d += tl.load(target, e < elements, other=0.0)
        tl.store(target, sum_d, e < elements)


Part = tuple[Tensor | None, int]
"""A weight vector inside a flat parameter vector and its task stride; (None, 0) where absent."""


@dataclass(frozen=True)
class Gradients:
    """Where dγ and dβ go, and whether they add to what is there."""

    weight: Part = (None, 0)
    bias: Part = (None, 0)
    add_weight: bool = False
    add_bias: bool = False


def forward(
    launch: Launcher, tasks: int, s: Groups, x: Tensor, y: Tensor, weight: Part, bias: Part,
    running: Sequence[Tensor | None], stats: Sequence[Tensor], eps: float,
) -> None:  # fmt: skip
    """y = γ x̂ + β; `stats` receives μ and r, each (T, groups)."""
    constants = s.constants()
    arguments = [x, y, weight[0], bias[0], *running, *stats, *s.numbers, s.groups * s.elements, weight[1], bias[1], eps]
    launch(norm_kernel, _programs(tasks, s, constants), arguments, constants)


def backward(
    launch: Launcher, tasks: int, s: Groups, x: Tensor, delta: Tensor, out: Tensor | None, weight: Part,
    stats: Sequence[Tensor], gradients: Gradients, accumulate: bool,
) -> None:  # fmt: skip
    """out (+)= dx (unless None), and dγ, dβ."""
    size = s.groups * s.elements
    inside = gradients if s.by_group else Gradients()
    if out is not None or s.by_group:
        constants = {**_accumulate(accumulate, inside), **s.constants()}
        arguments = [x, delta, out, weight[0], *stats, inside.weight[0], inside.bias[0], *s.numbers, size]
        arguments += [weight[1], inside.weight[1], inside.bias[1]]
        launch(norm_backward_kernel, _programs(tasks, s, constants), arguments, constants)
    if not s.by_group:
        _weights(launch, tasks, s, x, None, delta, None, [*stats, None, None], gradients)


def tangent(
    launch: Launcher, tasks: int, s: Groups, x: Tensor, push: Tensor | None, y: Tensor, weight: Part,
    weight_push: Part, bias_push: Part, stats: Sequence[Tensor],
) -> None:  # fmt: skip
    """y = ẏ; `stats` holds μ, r and receives mean ẋ and q."""
    constants = s.constants()
    arguments = [x, push, y, weight[0], weight_push[0], bias_push[0], *stats, *s.numbers, s.groups * s.elements]
    arguments += [weight[1], weight_push[1], bias_push[1]]
    launch(norm_tangent_kernel, _programs(tasks, s, constants), arguments, constants)


def curvature(
    launch: Launcher, tasks: int, s: Groups, x: Tensor, push: Tensor | None, delta: Tensor, delta_push: Tensor,
    out: Tensor | None, weight: Part, weight_push: Part, stats: Sequence[Tensor], gradients: Gradients,
    accumulate: bool,
) -> None:  # fmt: skip
    """out (+)= dẋ (unless None), and dγ˙, dβ˙."""
    size = s.groups * s.elements
    inside = gradients if s.by_group else Gradients()
    if out is not None or s.by_group:
        constants = {**_accumulate(accumulate, inside), **s.constants()}
        arguments = [x, push, delta, delta_push, out, weight[0], weight_push[0], *stats]
        arguments += [inside.weight[0], inside.bias[0], *s.numbers, size]
        arguments += [weight[1], weight_push[1], inside.weight[1], inside.bias[1]]
        launch(norm_curvature_kernel, _programs(tasks, s, constants), arguments, constants)
    if not s.by_group:
        _weights(launch, tasks, s, x, push, delta, delta_push, stats, gradients)


def _weights(
    launch: Launcher, tasks: int, s: Groups, x: Tensor, push: Tensor | None, delta: Tensor,
    delta_push: Tensor | None, stats: Sequence[Tensor | None], gradients: Gradients,
) -> None:  # fmt: skip
    weight, bias = gradients.weight, gradients.bias
    if weight[0] is None and bias[0] is None:
        return
    block_e = min(triton.next_power_of_2(s.elements), 64)
    block_g = min(triton.next_power_of_2(s.groups), 32)
    constants = {"ACCUMULATE_WEIGHT": gradients.add_weight, "ACCUMULATE_BIAS": gradients.add_bias}
    constants |= {"BLOCK_G": block_g, "BLOCK_E": block_e}
    arguments = [x, push, delta, delta_push, *stats, weight[0], bias[0]]
    arguments += [s.groups, s.elements, s.groups * s.elements, weight[1], bias[1]]
    launch(norm_weights_kernel, tasks * -(-s.elements // block_e), arguments, constants)


def _accumulate(values: bool, gradients: Gradients) -> dict[str, Any]:
    return {
        "ACCUMULATE": values,
        "ACCUMULATE_WEIGHT": gradients.add_weight,
        "ACCUMULATE_BIAS": gradients.add_bias,
    }


def _programs(tasks: int, s: Groups, constants: dict[str, Any]) -> int:
    return tasks * -(-s.groups // constants["BLOCK_G"])
