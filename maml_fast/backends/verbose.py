"""`MAML_FAST_VERBOSE=plan,run,why`: what is planned and run, how long it takes, and why not faster.

`plan` logs a line per plan that is made, `run` a line per call with what its time went into, `instructions` a line more
per instruction of every call, `why` a line per reason why a backend that comes first in the order of preference could
not run a plan. The variable is read once, at import: without it a call costs one look at a constant.

The lines go through `logging`, to the loggers `maml_fast.plan` and so on, which write to standard error.
"""

from __future__ import annotations

import logging
import os
import warnings
from time import perf_counter

import torch

from ..lower.plan import Plan, Result, Tensors
from .base import Spent
from .dispatch import Choice

TOPICS = ("plan", "run", "instructions", "why")


def _asked(value: str) -> frozenset[str]:
    asked = frozenset(word.strip() for word in value.split(",") if word.strip())
    if unknown := asked.difference(TOPICS):
        warnings.warn(
            f"MAML_FAST_VERBOSE: expected any of {', '.join(TOPICS)}, got {', '.join(sorted(unknown))}", stacklevel=2
        )
    return asked.intersection(TOPICS)


ASKED = _asked(os.environ.get("MAML_FAST_VERBOSE", ""))
PLANS = not ASKED.isdisjoint(("plan", "why"))
RUNS = not ASKED.isdisjoint(("run", "instructions"))

if ASKED:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logging.getLogger("maml_fast").addHandler(_handler)
    logging.getLogger("maml_fast").propagate = False
    for _topic in ASKED:
        logging.getLogger(f"maml_fast.{_topic}").setLevel(logging.INFO)


def _log(topic: str, message: str) -> None:
    if topic in ASKED:
        logging.getLogger(f"maml_fast.{topic}").info(message)


def planned(choice: Choice, start: float) -> None:
    """Log a plan whose making began at `start` (of `perf_counter`), and why no earlier backend runs it."""
    plan, took = choice.plan, perf_counter() - start
    _log("plan", f"{_name(choice)}, {plan.dtype}, {_algorithm(plan)}, {_milliseconds(took)}")
    if "why" not in ASKED:
        return
    for backend in choice.considered:
        if backend is choice.backend:
            break
        for reason in backend.why_not(plan):
            _log("why", f"not {backend.name}: {reason}")


def timed(choice: Choice, tensors: Tensors) -> Result:
    """Run a plan and log its time; what no instruction took is Python's."""
    start = perf_counter()
    result, spent = choice.backend.profile(choice.plan, tensors)
    if choice.plan.device.type == "cuda":
        torch.cuda.synchronize(choice.plan.device)
    took = perf_counter() - start
    if spent:
        spent.append(Spent("python", "python", took - sum(part.seconds for part in spent)))
    kinds: dict[str, float] = {}
    for part in spent:
        kinds[part.kind] = kinds.get(part.kind, 0.0) + part.seconds
    parts = " + ".join(f"{kind} {1e3 * seconds:.3f}" for kind, seconds in kinds.items())
    _log("run", f"{_name(choice)}, {_milliseconds(took)}{parts and f' = {parts}'}")
    for part in spent:
        _log("instructions", f"{1e3 * part.seconds:9.4f} ms  {part.text}")
    return result


def _name(choice: Choice) -> str:
    plan = choice.plan
    samples = " + ".join(str(n) for n in (plan.support, plan.query) if n)
    return f"{choice.backend.name} {plan.mode.value}, {plan.tasks} tasks of {samples} samples"


def _algorithm(plan: Plan) -> str:
    inner = plan.inner
    if plan.mode.applies:
        return "given parameters"
    return f"{inner.steps} steps, order {1 if inner.first_order else 2}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"
