"""The Python state of an inner rule of a person's own, frozen so that a later state can be compared with it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn

from .lookups import Unguardable
from .state import Held, attributes, freeze


def picture(rule: Any) -> Hashable:
    """Equal pictures, equal state: attributes, code and what the code looks up, and the kinds of parameters.

    What cannot be compared has a picture that equals no other, so that it is looked at anew at every call.
    """
    parts = rule.modules() if isinstance(rule, nn.Module) else [rule]
    try:
        return tuple(_of(part) for part in parts)
    except Unguardable:
        fresh = object()
        return Held("object", id(fresh), fresh)


def _of(part: Any) -> Hashable:
    if not isinstance(part, nn.Module):
        return freeze(part)
    kinds = tuple((n, p is not None and (p.shape, p.dtype, p.device)) for n, p in part._parameters.items())
    left_out = ("_parameters", "_modules")
    held = tuple((name, freeze(value)) for name, value in attributes(part) if name not in left_out)
    return type(part), kinds, held
