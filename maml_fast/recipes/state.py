"""What a checkpoint must hold to be continued from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PARTS = ("config", "iteration", "model", "optimizer", "sampler", "window", "best")


class OtherSettings(ValueError):
    """The run to be resumed was started with other settings."""


def check_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare the settings of the run that was started with those it is to be continued with.

    Raises:
        OtherSettings: one differs; the message names it.
    """
    for name, value in wanted.items():
        if name in _OF_MAMLPP and wanted.get("algorithm") != "mamlpp":
            continue
        before = found.get(name, _ADDED.get(name))
        if before != value:
            raise OtherSettings(f"{name}: the run was started with {before}, got {value}")


_ADDED = {"algorithm": "maml", "optimizer": "adam", "meta_decay": 0, "first_order": 0}
"""What was the only way in runs of versions without the setting."""

_OF_MAMLPP = ("anneal",)
"""Settings that no run of another algorithm depends on."""


def misfit(
    state: Mapping[str, Any], model: Mapping[str, Any], measure: str, log_every: int, own: Mapping[str, Any]
) -> str:
    """Why a run cannot continue from `state`, as a phrase; empty if it can, as far as optimizer and sampler can.

    Args:
        state: of unknown origin, but tensors and plain values.
        model: the state of the run's own module, an example of form.
        measure: the name by which the best parameters were chosen.
        log_every: the largest number of losses in the window.
        own: the learner's own numbers, likewise an example of form.
    """
    if missing := [part for part in PARTS if part not in state]:
        return f"it has no {missing[0]}"
    if not isinstance(state["config"], Mapping):
        return "its config is no mapping"
    if not _is_count(state["iteration"]):
        return f"its iteration is {state['iteration']!r:.50}"
    if not _are_losses(state["window"], log_every):
        return "its window holds no losses"
    if reason := _misfit_of_module(state["model"], model):
        return f"its model {reason}"
    if reason := _misfit_of_own(state, own) or (state["best"] and _misfit_of_own(state["best"], own)):
        return reason
    return _misfit_of_best(state["best"], model, measure) or _misfit_of_seal(state.get("metrics"))


def _misfit_of_own(part: Any, own: Mapping[str, Any]) -> str:
    """Of the learner's own numbers, which no version without them has."""
    if not isinstance(part, Mapping) or (part.get("model") == {} and "numbers" not in part):
        return ""  # of a best that there is not yet
    reason = _misfit_of_module(part.get("numbers", {}), own)
    return f"its learned numbers: it {reason}" if reason else ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_losses(window: Any, most: int) -> bool:
    return isinstance(window, Tensor) and window.is_floating_point() and window.dim() == 1 and len(window) <= most


def _misfit_of_best(best: Any, model: Mapping[str, Any], measure: str) -> str:
    if not isinstance(best, Mapping) or not isinstance(best.get("model"), Mapping):
        return "its best has no model"
    if not best["model"]:
        return ""
    value = best.get(measure)
    if not isinstance(value, float) or not math.isfinite(value):
        return f"its best has no {measure}"
    reason = _misfit_of_module(best["model"], model)
    return f"its best model {reason}" if reason else ""


def _misfit_of_seal(seal: Any) -> str:
    if seal is None:  # of an earlier version
        return ""
    fine = isinstance(seal, Mapping) and _is_count(seal.get("bytes")) and isinstance(seal.get("sha256"), str)
    return "" if fine else "its metrics have no checksum"


def _misfit_of_module(found: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(found, Mapping):
        return f"is a {type(found).__name__}, expected a mapping"
    if missing := [name for name in wanted if name not in found]:
        return f"has no {missing[0]}"
    if unknown := [name for name in found if name not in wanted]:
        return f"has an unknown {unknown[0]}"
    different = (name for name, value in wanted.items() if _form(found[name]) != _form(value))
    return next((f"has {name} as {_form(found[name])}, expected {_form(wanted[name])}" for name in different), "")


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = "" if value.layout == torch.strided else f"{value.layout} "
    return f"{layout}{value.dtype} {tuple(value.shape)}".replace("torch.", "")
