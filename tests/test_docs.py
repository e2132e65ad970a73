"""The examples in the README, in CONTRIBUTING.md, docs/recipes.md and docs/compat.md run as they stand."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import maml_fast as mf

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "docs" / "recipes.md"


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def headings(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("## ")]


def test_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    torch.manual_seed(0)
    found, names = blocks(RECIPES), dict[str, Any]()
    assert len(found) > len(headings(RECIPES))
    for number, block in enumerate(found):
        exec(compile(block, f"recipes.md, block {number}", "exec"), names)
    assert 0 <= float(names["accuracy"].mean()) <= 1
    whole = mf.MAML(names["model"], lr=0.1, steps=10)
    parts = [p.grad for p in names["model"].parameters()]
    names["model"].zero_grad()
    whole.backward(*(names[n] for n in ("x_s", "y_s", "x_q", "y_q")))
    for part, p in zip(parts, names["model"].parameters(), strict=True):
        torch.testing.assert_close(part, p.grad, rtol=1e-4, atol=1e-6)


def test_compat() -> None:
    found, names = blocks(ROOT / "docs" / "compat.md"), dict[str, Any]()
    assert len(found) >= 2
    for number, block in enumerate(found):
        exec(compile(block, f"compat.md, block {number}", "exec"), names)
    assert "meta-gradients, 2 inner steps: 23 tasks in 3 fused calls" in names["maml"].explain()
    assert "7 tasks in 1 fused call" in names["explain"](names["model"])


def test_readme() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters()),
        "x_s": torch.randn(2, 3, 4),
        "y_s": torch.randint(3, (2, 3)),
        "x_q": torch.randn(2, 5, 4),
        "y_q": torch.randint(3, (2, 5)),
    }
    found = blocks(ROOT / "README.md")
    assert len(found) >= 2
    for block in found:
        exec(block, names)
    assert names["adapted"](names["x_q"]).shape == (2, 5, 3)


def test_contributing(core: Any) -> None:
    """The worked examples for contributors."""
    names = dict[str, Any]()
    found = blocks(ROOT / "CONTRIBUTING.md")
    assert len(found) >= 4
    for number, block in enumerate(found):
        exec(compile(block, f"CONTRIBUTING.md, block {number}", "exec"), names)


def _rank(rank: int, port: int, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, (x_s, y_s, x_q, y_q) = _problem()
    mine = slice(2 * rank, 2 * rank + 2)
    parallel = DistributedDataParallel(mf.MAML(model, lr=0.1))
    F.cross_entropy(parallel(x_s[mine], y_s[mine], x_q[mine]).flatten(0, 1), y_q[mine].flatten()).backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], results)
    torch.distributed.destroy_process_group()


def _problem() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    batch = [v for n in (3, 4) for v in (torch.randn(4, n, 6).double(), torch.randint(3, (4, n)))]
    return model, batch


@pytest.mark.no_sanitizer
def test_processes_average_their_gradients(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = tmp_path / "gradients"
    torch.multiprocessing.spawn(_rank, (port, str(results)), nprocs=2)
    model, batch = _problem()
    mf.MAML(model, lr=0.1).backward(*batch)
    for theirs, p in zip(torch.load(results), model.parameters(), strict=True):
        torch.testing.assert_close(theirs, p.grad, rtol=1e-12, atol=1e-14)
