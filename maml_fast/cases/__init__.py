"""One list of cases for the tests, the gradient checks, `verify` and the benchmark.

`SMALL` covers every layer, loss and option one by one at sizes that take milliseconds; `BENCH`
`MODELS` and `ALGORITHMS` are the sizes whose speed is reported; `ZOO` are published models, small.
"""

from __future__ import annotations

from ..nn.networks import conv4, mlp, resnet12, siren, strided_conv
from . import dense, families, images
from .case import Case, Problem
from .timed import ALGORITHMS, BENCH, MODELS
from .zoo import ZOO

__all__ = [
    "ALGORITHMS", "BENCH", "MODELS", "SMALL", "ZOO", "Case", "Problem", "conv4", "mlp", "resnet12", "select", "siren",
    "strided_conv",
]  # fmt: skip

SMALL: tuple[Case, ...] = dense.CASES + images.CASES + families.CASES


def select(names: list[str] | None = None, tag: str | None = None) -> list[Case]:
    """Cases by name or by a tag as the name of a group (all by default), kept if they have the tag.

    Raises:
        ValueError: a name that no case and no group has.
    """
    known = {case.name: case for case in (*SMALL, *BENCH, *MODELS, *ALGORITHMS, *ZOO)}
    if names is None:
        chosen = list(known.values())
    else:
        chosen = [case for name in names for case in ([known[name]] if name in known else _group(name, known))]
    return [case for case in chosen if tag is None or tag in case.tags]


def _group(name: str, known: dict[str, Case]) -> list[Case]:
    if found := [case for case in known.values() if name in case.tags]:
        return found
    groups = sorted({tag for case in known.values() for tag in case.tags})
    raise ValueError(f"cases: no case named {name!r}; there are {', '.join(known)}; and groups {', '.join(groups)}")
