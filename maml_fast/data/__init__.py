"""Few-shot tasks from tensors in memory: whole meta-batches by vectorised indexing, seeded, resumable."""

from .episodes import Episodes, LabelledSet
from .omniglot import load_omniglot, split_omniglot
from .sampler import MetaBatch, Sampler
from .sinusoid import Sinusoids

__all__ = ["Episodes", "LabelledSet", "MetaBatch", "Sampler", "Sinusoids", "load_omniglot", "split_omniglot"]
