"""One list of cases for the tests, the gradient checks, `verify` and the benchmark.

`SMALL` covers every layer, loss and option one by one at sizes that take milliseconds; `BENCH`
are the sizes whose speed is reported.
"""

from __future__ import annotations

from ..nn.networks import conv4, mlp, resnet12, siren, strided_conv
from . import dense, families, images
from .case import Case, Problem
from .timed import BENCH

__all__ = ["BENCH", "SMALL", "Case", "Problem", "conv4", "mlp", "resnet12", "select", "siren", "strided_conv"]

SMALL: tuple[Case, ...] = dense.CASES + images.CASES + families.CASES


def select(names: list[str] | None = None, tag: str | None = None) -> list[Case]:
    """Cases by name (all of `SMALL` and `BENCH` by default), kept if they have the tag.

    Raises:
        ValueError: a name that no case has.
    """
    known = {case.name: case for case in (*SMALL, *BENCH)}
    if unknown := [n for n in names or () if n not in known]:
        raise ValueError(f"cases: no case named {unknown[0]!r}; there are {', '.join(known)}")
    chosen = known.values() if names is None else [known[n] for n in names]
    return [case for case in chosen if tag is None or tag in case.tags]
