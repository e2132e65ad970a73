"""Few-shot tasks from tensors in memory: whole meta-batches by vectorised indexing, seeded, resumable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import names_of

if TYPE_CHECKING:
    from .episodes import Episodes, LabelledSet
    from .omniglot import load_omniglot, split_omniglot
    from .sampler import MetaBatch, Sampler
    from .sinusoid import Sinusoids

__all__ = ["Episodes", "LabelledSet", "MetaBatch", "Sampler", "Sinusoids", "load_omniglot", "split_omniglot"]

__getattr__ = names_of(
    __name__,
    {
        "Episodes": "episodes",
        "LabelledSet": "episodes",
        "MetaBatch": "sampler",
        "Sampler": "sampler",
        "Sinusoids": "sinusoid",
        "load_omniglot": "omniglot",
        "split_omniglot": "omniglot",
    },
)
