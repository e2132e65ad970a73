"""maml_fast: task-batched kernels for MAML and its relatives."""

from . import nn
from .api.adapted import Adapted
from .api.maml import MAML
from .optim import FlatAdam, FlatParameters

__version__ = "0.1.0"
__all__ = ["MAML", "Adapted", "FlatAdam", "FlatParameters", "__version__", "nn"]
