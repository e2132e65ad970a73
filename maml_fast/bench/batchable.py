"""Modules that torch.func.vmap batches wrongly or not at all, written so that it can: peers get their best form."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def for_vmap(model: nn.Module) -> nn.Module:
    """A copy with such modules replaced; same parameter names."""
    model = deepcopy(model)
    return _stand_in(model) or _replaced(model)


def _replaced(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        setattr(model, name, _stand_in(child) or _replaced(child))
    return model


def _stand_in(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        eps = module.eps
        return _NormThenAffine(module, lambda x: F.batch_norm(x, None, None, training=True, eps=eps), True)
    if isinstance(module, nn.LayerNorm):
        shape, eps = list(module.normalized_shape), module.eps
        return _NormThenAffine(module, lambda x: F.layer_norm(x, shape, eps=eps), False)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        return _PaddedEmbedding(module)
    return _UnrolledGRU(module) if isinstance(module, nn.GRU) else None


class _NormThenAffine(nn.Module):
    """A norm whose weight PyTorch does not see: with it, vmap's second derivatives are wrong."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: Any, plain: Callable[[Tensor], Tensor], channels_first: bool) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.plain, self.channels_first = plain, channels_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(x)
        if self.weight is None:
            return y
        shape = (-1, *[1] * (x.dim() - 2)) if self.channels_first else self.weight.shape
        y = y * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


class _PaddedEmbedding(nn.Module):
    """Rows of padding get no gradient; vmap gives them one in every task but the first."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        assert embedding.padding_idx is not None
        self.weight, self.padding = embedding.weight, embedding.padding_idx

    def forward(self, x: Tensor) -> Tensor:
        rows = F.embedding(x, self.weight)
        return torch.where(x.eq(self.padding).unsqueeze(-1), rows.detach(), rows)


class _UnrolledGRU(nn.Module):
    """One layer and direction, batch first: PyTorch's own writes in place what vmap cannot widen."""

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        if gru.num_layers > 1 or gru.bidirectional or not gru.batch_first or not gru.bias:
            raise NotImplementedError("this GRU has no form that vmap can batch")
        self.hidden = gru.hidden_size
        for name, p in gru.named_parameters():
            self.register_parameter(name, p)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inputs = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)
        h = x.new_zeros(x.shape[0], self.hidden)
        states = []
        for t in range(x.shape[1]):
            i_r, i_z, i_n = inputs[:, t].chunk(3, -1)
            h_r, h_z, h_n = F.linear(h, self.weight_hh_l0, self.bias_hh_l0).chunk(3, -1)
            z = torch.sigmoid(i_z + h_z)
            n = torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n)
            h = n + z * (h - n)
            states.append(h)
        return torch.stack(states, 1), h.unsqueeze(0)
