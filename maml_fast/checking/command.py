"""What `maml-fast verify` does: the case list, the zoo, a person's own case, or random networks."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from .device import usable

_POSITIONS = ("model", "x_s", "y_s", "x_q", "y_q")


def run(
    case: str | None = None,
    backend: str | None = None,
    device: str = "cpu",
    fuzz: int = 0,
    seed: int = 0,
    first: int = 0,
    out: Path = Path("fuzz"),
    zoo: bool = False,
) -> int:
    """Verify, print what came of it, and return the exit code: 0 if everything agrees.

    Args:
        case: `module:function` or `file.py:function`, see `own_case`; with `zoo` a model's name or pattern.
        fuzz: how many random networks; 0 for none. seed, first, out: see `fuzz`. zoo: published models.

    Raises:
        ValueError: a case that cannot be found, or two things at once; no such backend or device.
    """
    usable(device)  # before all else is imported
    if zoo:
        if fuzz:
            raise ValueError("fuzz: expected either the zoo or random networks, got both")
        from .zoo import run as run_zoo

        return run_zoo(case, backend, device)
    if case is not None and fuzz:
        raise ValueError("fuzz: expected either a case or random networks, got both")
    if case is not None:
        if device != "cpu":
            raise ValueError("device: expected none with a case, whose tensors are where it makes them")
        return _run_own(case, backend)
    if fuzz:
        from .fuzz import fuzz as run_fuzz

        return run_fuzz(fuzz, seed, first, out, backend, device)
    from .verify import run as run_cases

    return run_cases(backend, device)


def _run_own(case: str, backend: str | None) -> int:
    from .own import verify

    settings = own_case(case)
    if backend is not None:
        settings["backend"] = backend
    report = verify(**settings)
    print(report)
    return 0 if report.ok else 1


def own_case(target: str) -> dict[str, Any]:
    """The arguments of `verify` that a person's function returns.

    Args:
        target: `module:function` or `file.py:function`. The function takes nothing and returns a mapping with model,
            x_s, y_s, x_q, y_q and settings of `MAML`, or a tuple of these five and, last, a mapping of settings.

    Raises:
        ValueError: there is no such function, or it raises. TypeError: it returns something else.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"case: expected module:function or file.py:function, got {target!r}")
    function = getattr(_imported(place), name, None)
    if not callable(function):
        raise ValueError(f"case: {place} has no function {name!r}")
    try:
        made = function()
    except Exception as error:
        traceback.print_exc()  # it is the person's own code that is at fault
        raise ValueError(f"case: {target} raised {type(error).__name__}: {error}") from error
    return _arguments(made)


def _imported(place: str) -> ModuleType:
    """A module by name, from the current folder too, or a file by its path."""
    if place.endswith(".py"):
        path = Path(place)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ValueError(f"case: there is no file {place}")
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place + ".").startswith(error.name + "."):
            raise
        raise ValueError(f"case: there is no module {error.name!r} here") from error


def _arguments(made: Any) -> dict[str, Any]:
    if isinstance(made, Mapping):
        arguments = dict(made)
    elif isinstance(made, tuple | list) and len(made) in (5, 6) and (len(made) == 5 or isinstance(made[5], Mapping)):
        arguments = dict(zip(_POSITIONS, made, strict=False)) | dict(made[5] if len(made) == 6 else {})
    else:
        raise TypeError(f"case: expected a mapping, or {', '.join(_POSITIONS)} and settings, got {_described(made)}")
    arguments |= dict(arguments.pop("kwargs", {}))
    if missing := [name for name in _POSITIONS if name not in arguments]:
        raise TypeError(f"case: expected {', '.join(_POSITIONS)}, got none for {missing[0]}")
    return arguments


def _described(made: Any) -> str:
    return f"{len(made)} values" if isinstance(made, tuple | list) else f"a {type(made).__name__}"
