"""The zoo: models of published architectures, small, written as their users write them, one family per file.

They are for `maml-fast verify --zoo`, which tells how many of such models run fused, and for the tests.
"""

from __future__ import annotations

from ..case import Case
from . import (
    adapters,
    convnets,
    dense_outputs,
    few_shot,
    fields,
    graphs,
    policies,
    recommenders,
    sequences,
    sets,
    signals,
    tabular,
    vision_transformers,
)

_FAMILIES = (few_shot, convnets, vision_transformers, dense_outputs, fields, sets, sequences, signals, recommenders,
             graphs, policies, adapters, tabular)  # fmt: skip

ZOO: tuple[Case, ...] = tuple(case for family in _FAMILIES for case in family.CASES)
