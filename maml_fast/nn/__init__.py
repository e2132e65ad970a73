"""Modules that the fused backends know and `torch.nn` lacks, and the networks of published experiments."""

from .sine import Sine

__all__ = ["Sine"]
