"""maml_fast: task-batched kernels for MAML and its relatives."""

from . import nn
from .adam import FlatAdam
from .adapted import Adapted
from .flat import FlatParameters
from .maml import MAML

__version__ = "0.1.0"
__all__ = ["MAML", "Adapted", "FlatAdam", "FlatParameters", "__version__", "nn"]
