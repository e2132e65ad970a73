"""learn2learn's algorithms and its functions on modules: `import maml_fast.compat.learn2learn as l2l`.

Scripts written for learn2learn run as they are. Their tasks are recorded and computed together by `mf.MAML` once a
result is read, a gradient is looked at, or a parameter changes; see `docs/compat.md`.
"""

from __future__ import annotations

from typing import Any

from . import algorithms, utils
from .utils import clone_module, detach_module, magic_box, update_module

__all__ = ["algorithms", "clone_module", "detach_module", "magic_box", "update_module", "utils"]


def __getattr__(name: str) -> Any:
    if name in ("data", "vision", "text", "gym", "optim", "nn"):
        raise AttributeError(
            f"maml_fast.compat.learn2learn has algorithms and utils, not {name!r}: keep that import from learn2learn, "
            "or use maml_fast.data"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
