"""Outer optimisation without Python's cost per parameter."""

from .adam import FlatAdam
from .flat import FlatParameters

__all__ = ["FlatAdam", "FlatParameters"]
