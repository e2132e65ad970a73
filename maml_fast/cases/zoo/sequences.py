"""Sequences and language: recurrent networks, convolutions over words, transformers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import draw
from .model import model


class GRUClassifier(nn.Module):
    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.gru, self.fc = nn.GRU(inputs, hidden, batch_first=True), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.gru(x)
        return self.fc(out[:, -1, :])


class LSTMTagger(nn.Module):
    """Both directions, two layers, attention over the steps."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True, dropout=dropout)
        self.attention, self.fc = nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x)
        weights = torch.softmax(self.attention(torch.tanh(hidden)), dim=1)
        context = torch.sum(weights * hidden, dim=1)
        return self.fc(context)


class LanguageRNN(nn.Module):
    """Time stands first: the next token at each."""

    def __init__(self, vocabulary: int = 12) -> None:
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(vocabulary, 6), nn.RNN(6, 8, nonlinearity="tanh")
        self.decoder = nn.Linear(8, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.encoder(tokens.t())
        output, _ = self.rnn(embedded)
        return self.decoder(output).permute(1, 2, 0)


class GRUCellByHand(nn.Module):
    """A cell of linear layers in a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h, self.h2h, self.out = nn.Linear(3, 15), nn.Linear(5, 15), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), 5, dtype=x.dtype, device=x.device)
        for t in range(x.size(1)):
            i_r, i_z, i_n = self.x2h(x[:, t]).chunk(3, 1)
            h_r, h_z, h_n = self.h2h(h).chunk(3, 1)
            z = torch.sigmoid(i_z + h_z)
            n = torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n)
            h = n + z * (h - n)
        return self.out(h)


class TextCNN(nn.Module):
    """Kim, arXiv 1408.5882."""

    def __init__(self, vocabulary: int, dim: int, filters: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.convs = nn.ModuleList([nn.Conv2d(1, filters, (k, dim)) for k in (3, 4, 5)])
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(3 * filters, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).unsqueeze(1)
        pooled = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        pooled = [F.max_pool1d(i, i.size(2)).squeeze(2) for i in pooled]
        return self.fc(self.dropout(torch.cat(pooled, 1)))


class FastText(nn.Module):
    """A mean over the words that are there (arXiv 1607.01759)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        weights = mask.unsqueeze(-1).to(self.fc.weight.dtype)
        mean = (self.embedding(tokens) * weights).sum(1) / weights.sum(1).clamp(min=1)
        return self.fc(mean)


class BertLayer(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out, self.norm1 = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-12)
        self.up, self.down, self.norm2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], self.heads, self.size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.size) + mask
        context = torch.matmul(self.dropout(nn.functional.softmax(scores, dim=-1)), v)
        context = context.permute(0, 2, 1, 3).contiguous().view(x.size())
        x = self.norm1(x + self.dropout(self.out(context)))
        return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    """Devlin et al., arXiv 1810.04805: tokens, segments, positions, a mask, a pooler."""

    def __init__(self, dropout: float = 0.0, dim: int = 8) -> None:
        super().__init__()
        self.words, self.segments = nn.Embedding(20, dim, padding_idx=0), nn.Embedding(2, dim)
        self.positions, self.norm = nn.Embedding(10, dim), nn.LayerNorm(dim, eps=1e-12)
        self.layers = nn.ModuleList([BertLayer(dim, 2, dropout) for _ in range(2)])
        self.pooler, self.classifier = nn.Linear(dim, dim), nn.Linear(dim, 3)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.arange(input_ids.size(1), device=input_ids.device).unsqueeze(0)
        x = self.norm(self.words(input_ids) + self.segments(token_type_ids) + self.positions(positions))
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -10000.0
        for layer in self.layers:
            x = layer(x, mask)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class CausalSelfAttention(nn.Module):
    bias: Tensor

    def __init__(self, dim: int, heads: int, block: int, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.n_head, self.flash = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads, flash
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        q, k, v = (u.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for u in (q, k, v))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    def __init__(self, dim: int, length: int, flash: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(dim), CausalSelfAttention(dim, 2, length, flash)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Blocks with norms first, tied embeddings, a loss per token."""

    def __init__(self, flash: bool, vocabulary: int = 12, dim: int = 8, block: int = 6) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, dim), nn.Embedding(block, dim)
        self.h = nn.ModuleList()
        for _ in range(2):
            self.h.append(Block(dim, block, flash))
        self.ln_f, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Llama(nn.Module):
    """A block of RMSNorm, rotary positions, grouped keys and SwiGLU (arXiv 2302.13971), on features."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int = 8, heads: int = 2, length: int = 5) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.embed, self.norm1, self.norm2 = nn.Linear(3, dim), RMSNorm(dim), RMSNorm(dim)
        self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = nn.Linear(dim, self.size, bias=False), nn.Linear(dim, self.size, bias=False)
        self.w1, self.w2, self.w3 = (nn.Linear(*s, bias=False) for s in ((dim, 12), (12, dim), (dim, 12)))
        self.head = nn.Linear(dim, 4)
        angles = torch.outer(torch.arange(length).float(), 1.0 / 10.0 ** (torch.arange(0, self.size, 2) / self.size))
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        x = self.embed(x)
        h = self.norm1(x)
        q = self.wq(h).view(b, t, self.heads, self.size).transpose(1, 2)
        k, v = (w(h).view(b, t, 1, self.size).transpose(1, 2) for w in (self.wk, self.wv))
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        k, v = (u.repeat_interleave(self.heads, dim=1) for u in (k, v))
        mask = torch.full((t, t), float("-inf")).triu(1).to(x)
        attention = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(self.size) + mask, dim=-1)
        x = x + self.wo((attention @ v).transpose(1, 2).reshape(b, t, -1))
        h = self.norm2(x)
        x = x + self.w2(F.silu(self.w1(h)) * self.w3(h))
        return self.head(x.mean(1))


class TransformerClassifier(nn.Module):
    """PyTorch's encoder layers over features, a mean, a linear head."""

    def __init__(self, inputs: int, dim: int, heads: int, layers: int, length: int, classes: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(inputs, dim), nn.Parameter(0.02 * torch.randn(1, length, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.positions).mean(dim=1))


class PaddedEncoder(nn.Module):
    """PyTorch's attention with a mask of what is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(x)
        attended, _ = self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)
        x = self.norm(x + attended)
        return self.head((x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


class Snail(nn.Module):
    """Dense blocks of dilated causal convolutions, then attention (arXiv 1707.03141)."""

    def __init__(self) -> None:
        super().__init__()
        self.xf, self.xg = nn.Conv1d(3, 4, 2), nn.Conv1d(3, 4, 2)
        self.yf, self.yg = nn.Conv1d(7, 4, 2, dilation=2), nn.Conv1d(7, 4, 2, dilation=2)
        self.key, self.query, self.value = nn.Linear(11, 4), nn.Linear(11, 4), nn.Linear(11, 5)
        self.fc = nn.Linear(16, 3)

    def dense(self, x: Tensor, f: nn.Module, g: nn.Module, pad: int) -> Tensor:
        padded = F.pad(x, (pad, 0))
        return torch.cat((x, torch.tanh(f(padded)) * torch.sigmoid(g(padded))), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dense(x.permute(0, 2, 1), self.xf, self.xg, 1)
        h = self.dense(h, self.yf, self.yg, 2).permute(0, 2, 1)
        length = h.size(1)
        mask = torch.triu(torch.ones(length, length), diagonal=1).bool()
        logits = torch.bmm(self.query(h), self.key(h).transpose(1, 2)) / 2.0
        logits = logits.masked_fill(mask.unsqueeze(0), -float("inf"))
        read = torch.bmm(F.softmax(logits, dim=2), self.value(h))
        return self.fc(torch.cat((h, read), dim=2)[:, -1])


class LinearAttention(nn.Module):
    """Keys and values are summed first (arXiv 2006.16236), by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.size(0), x.size(1), 3, 2, 4).unbind(2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("nlhd,nlhm->nhmd", k, v)
        z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
        out = torch.einsum("nlhd,nhmd,nlh->nlhm", q, kv, z)
        return self.out(out.flatten(2).mean(1))


TOKENS, MASK = draw.whole(20, 7), draw.kept(7)
SENTENCE = draw.named(input_ids=TOKENS, token_type_ids=draw.whole(2, 7), attention_mask=MASK)

CASES = (
    model("gru-classifier", lambda: GRUClassifier(3, 6, 3), (6, 3), (3,), "cross_entropy"),
    model("lstm-attention", LSTMTagger, (5, 3), (3,), "cross_entropy"),
    model("lstm-dropout", lambda: LSTMTagger(0.2), (5, 3), (3,), "cross_entropy"),
    model("language-rnn", LanguageRNN, draw.whole(12, 6), draw.whole(12, 6), "cross_entropy"),
    model("gru-by-hand", GRUCellByHand, (5, 3), (2,), "mse"),
    model("text-cnn", lambda: TextCNN(20, 6, 4, 3), draw.whole(20, 8), draw.whole(3), "cross_entropy"),
    model("text-cnn-dropout", lambda: TextCNN(20, 6, 4, 3, 0.5), draw.whole(20, 8), draw.whole(3), "cross_entropy"),
    model("fast-text", FastText, draw.named(tokens=TOKENS, mask=MASK), draw.whole(3), "cross_entropy"),
    model("bert", Bert, SENTENCE, draw.whole(3), "cross_entropy"),
    model("bert-dropout", lambda: Bert(0.1), SENTENCE, draw.whole(3), "cross_entropy"),
    model("gpt", lambda: GPT(flash=False), draw.whole(12, 6), draw.whole(12, 6, least=-1), token_loss),
    model("gpt-flash", lambda: GPT(flash=True), draw.whole(12, 6), draw.whole(12, 6, least=-1), token_loss),
    model("llama-block", Llama, (5, 3), (4,), "cross_entropy"),
    model("transformer-encoder", lambda: TransformerClassifier(3, 8, 2, 2, 5, 3), (5, 3), (3,), "cross_entropy"),
    model("padded-attention", PaddedEncoder, draw.several(draw.normal(7, 3), MASK), draw.whole(3), "cross_entropy"),
    model("snail", Snail, (6, 3), (3,), "cross_entropy"),
    model("linear-attention", LinearAttention, (5, 4), (3,), "cross_entropy"),
)  # fmt: skip
