"""What every test file shares: seeds, the hypothesis profile, and where data and the core are."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

settings.register_profile("maml_fast", deadline=None, derandomize=True, database=None)
settings.load_profile("maml_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: pytest-xdist's workers then share what is left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the public data sets: `MAML_FAST_DATA`, or ../shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MAML_FAST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data: {folder} is not a folder (MAML_FAST_DATA names it)")
    return folder


@pytest.fixture(scope="session")
def core() -> ModuleType:
    """The compiled core; absence skips, or fails with `MAML_FAST_REQUIRE_CORE=1`."""
    try:
        return importlib.import_module("maml_fast._core")
    except ImportError as error:
        if os.environ.get("MAML_FAST_REQUIRE_CORE") == "1":
            pytest.fail(f"maml_fast._core is required and not built: {error}")
        pytest.skip(f"maml_fast._core is not built: {error}")
