"""Functions of numbers, element by element: written once, differentiated symbolically, run by every backend."""

from .derive import Derivatives, derivatives
from .language import Expression, call, constant, variable

__all__ = ["Derivatives", "Expression", "call", "constant", "derivatives", "variable"]
