"""Random networks against the float64 textbook: `maml-fast verify --fuzz`.

A case is a list of small numbers, the choices that a generator made; the generator turns them into a script that
anybody can run. Smaller numbers and shorter lists make simpler cases, so a failing case is shrunk without knowing what
it is.
"""

from __future__ import annotations

from .run import fuzz

__all__ = ["fuzz"]
