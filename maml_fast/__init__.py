"""maml_fast: task-batched kernels for MAML and its relatives."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .lazy import names_of

if TYPE_CHECKING:
    from . import compat, nn
    from .algorithms.gradients import Clip, Displacement, Implicit, Unrolled
    from .algorithms.rules import SGD, Adam, AdamW, RMSprop
    from .api.adapted import Adapted
    from .api.evaluate import Evaluation, evaluate
    from .api.maml import MAML
    from .api.presets import ANIL, BOIL, CAVIA, FOMAML, IMAML, MAMLpp, MetaSGD, ProtoMAML, Reptile, multi_step_weights
    from .api.ragged import ragged
    from .api.rates import per_step
    from .checking.own import verify
    from .checking.report import Report
    from .optim import FlatAdam, FlatParameters

__version__ = "0.1.0"
__all__ = [
    "ANIL",
    "BOIL",
    "CAVIA",
    "FOMAML",
    "IMAML",
    "MAML",
    "MAMLpp",
    "SGD",
    "Adam",
    "AdamW",
    "Adapted",
    "Clip",
    "Displacement",
    "Evaluation",
    "FlatAdam",
    "FlatParameters",
    "Implicit",
    "MetaSGD",
    "ProtoMAML",
    "RMSprop",
    "Report",
    "Reptile",
    "Unrolled",
    "__version__",
    "compat",
    "evaluate",
    "multi_step_weights",
    "nn",
    "per_step",
    "ragged",
    "verify",
]

_look_up = names_of(
    __name__,
    {
        "MAML": "api.maml",
        "FOMAML": "api.presets",
        "ANIL": "api.presets",
        "BOIL": "api.presets",
        "CAVIA": "api.presets",
        "Evaluation": "api.evaluate",
        "evaluate": "api.evaluate",
        "IMAML": "api.presets",
        "MAMLpp": "api.presets",
        "ProtoMAML": "api.presets",
        "Reptile": "api.presets",
        "multi_step_weights": "api.presets",
        "MetaSGD": "api.presets",
        "SGD": "algorithms.rules",
        "Adam": "algorithms.rules",
        "AdamW": "algorithms.rules",
        "RMSprop": "algorithms.rules",
        "Clip": "algorithms.gradients",
        "Displacement": "algorithms.gradients",
        "Implicit": "algorithms.gradients",
        "Unrolled": "algorithms.gradients",
        "Adapted": "api.adapted",
        "FlatAdam": "optim",
        "FlatParameters": "optim",
        "Report": "checking.report",
        "per_step": "api.rates",
        "ragged": "api.ragged",
        "verify": "checking.own",
    },
)


def __getattr__(name: str) -> Any:
    return import_module(f"{__name__}.{name}") if name in ("compat", "nn") else _look_up(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
