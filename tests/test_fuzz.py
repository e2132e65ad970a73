"""Random networks: the same for the same seed, right on this machine, and small when they fail."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from maml_fast.backends import cpu
from maml_fast.checking.fuzz import fuzz, run, worker
from maml_fast.checking.fuzz.case import Script, draw
from maml_fast.checking.fuzz.choices import Choices, shrink
from maml_fast.checking.fuzz.constants import norms_constants
from maml_fast.checking.fuzz.layers import LAYERS
from maml_fast.checking.fuzz.sketch import Sketch, Unfit
from maml_fast.checking.fuzz.worker import Outcome, Worker, outcome
from maml_fast.checking.report import Report

ROOT = Path(__file__).parents[1]
ISAS = ("baseline", "avx2")
BUILT = cpu.info()["built"]


def script(index: int, seed: int = 0) -> Script:
    return draw(Choices(chance=random.Random(f"{seed} {index}")), ISAS, "A case.")


# ---- choices -------------------------------------------------------------------------------------


def test_choices_can_be_made_again() -> None:
    first = Choices(chance=random.Random(0))
    made = [first.of("abcdef") for _ in range(20)]
    again = Choices(first.taken)
    assert [again.of("abcdef") for _ in range(20)] == made
    assert again.of("abcdef") == "a"  # beyond what was given: the simplest
    assert Choices([9]).of("ab") == "b"
    assert not any(Choices().once_in(n) for n in (2, 3, 4))


def test_shrinking_finds_the_smallest() -> None:
    def failing(given: Sequence[int]) -> Choices | None:
        """Fails where some number is at least 3 and a later one is odd."""
        choices = Choices(given)
        taken = [choices.of(range(9)) for _ in range(min(len(given), 30))]
        large = next((i for i, n in enumerate(taken) if n >= 3), None)
        return choices if large is not None and any(n % 2 for n in taken[large + 1 :]) else None

    start = failing([random.Random(i).randrange(9) for i in range(30)])
    assert start is not None
    assert shrink(start, failing, seconds=60).taken == [3, 1]


def test_spans_are_left_out_whole() -> None:
    """Groups of 7 that begin with their number and count only whole; one of them is to blame."""

    def failing(given: Sequence[int]) -> Choices | None:
        choices, culprit = Choices(given), False
        for _ in range(len(given) // 7):
            with choices.span():
                group = [choices.of(range(5)) for _ in range(7)]
                culprit |= group[0] == 4 and sum(group) == 10
        return choices if culprit else None

    start = failing([1, 2, 3, 4, 0, 1, 2] * 3 + [4, 1, 1, 1, 1, 1, 1] + [1, 0, 0, 0, 0, 0, 3] * 4)
    assert start is not None
    assert len(start.spans) == 8
    assert len(shrink(start, failing, seconds=60, most=200).taken) == 7


def test_shrinking_gives_up_in_time() -> None:
    attempts, start = [], Choices([5] * 50)
    for _ in range(50):
        start.of(range(9))

    def failing(given: Sequence[int]) -> None:
        attempts.append(given)

    assert shrink(start, failing, seconds=60, most=7) is start
    assert len(attempts) == 7
    assert shrink(start, failing, seconds=0) is start


# ---- the generator -------------------------------------------------------------------------------


def test_a_case_is_always_the_same() -> None:
    assert script(7) == script(7)
    assert script(7) != script(8)
    assert script(7) != script(7, seed=1)


def test_every_choice_list_is_a_script() -> None:
    """Shrinking cuts lists anywhere."""
    for seed in range(60):
        chance = random.Random(seed)
        given = [chance.randrange(chance.choice((2, 40))) for _ in range(chance.randrange(60))]
        compile(draw(Choices(given), ISAS, "A case.").text, "case", "exec")


def test_the_simplest_case_is_a_linear_layer() -> None:
    text = draw(Choices(), ISAS, "A case.").text
    assert re.findall(r"self\.l\d = (.*)", text) == ["nn.Linear(3, 2)"]
    assert "MAML_FAST_ISA" not in text


@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 5, 7)])
def test_every_layer_is_drawn(shape: tuple[int, ...]) -> None:
    for layer in set(LAYERS[len(shape)]):
        lines = set()
        for seed in range(40):
            c, net = Choices(chance=random.Random(seed)), Sketch(shape)
            x = net.apply(net.layer(f"nn.Linear({shape[-1]}, {shape[-1]})"), net.values[0])
            before = len(net.lines)
            try:
                layer(c, net, x)
            except Unfit:
                continue
            lines.update(net.lines[before:])
        assert lines, layer.__name__


def test_what_is_drawn_covers_the_options() -> None:
    text = "\n".join(script(i).text for i in range(250))
    wanted = [
        "nn.Conv2d", "nn.Conv1d", "nn.BatchNorm2d", "nn.BatchNorm1d", "nn.LayerNorm", "nn.GroupNorm",
        "nn.InstanceNorm2d",
        "nn.MaxPool2d", "F.max_pool1d", "nn.AvgPool2d", "nn.AdaptiveAvgPool2d", "nn.Upsample", "torch.cat", "torch.add",
        "padding=\"same\"", "dilation=(2", "groups=3", "bias=False", "inplace=True", ".weight = self", "model.eval()",
        "requires_grad_(False)", "channels_last", ".t().contiguous().t()", "expand_as", "_neg_view", "[..., 0]",
        '"cross_entropy"', "label_smoothing", '"bce_with_logits"', '"l1"', "nn.HuberLoss", '"steps": 0', '"steps": 3',
        '"first_order": True', "torch.float64", "adapts = ['", "torch.rand(p.shape", '"tape_bytes": 0', '"threads": 3',
        'os.environ["MAML_FAST_ISA"] = "avx2"', ".squeeze(", ".unsqueeze(", ".mean(", ".unflatten(", "F.interpolate",
    ]  # fmt: skip
    assert [part for part in wanted if part not in text] == []


# ---- the run -------------------------------------------------------------------------------------


@pytest.mark.skipif(not BUILT, reason="the core is not built")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_networks_agree(seed: int) -> None:
    found = [outcome(script(i, seed), ["cpu"]) for i in range(25)]
    assert [o for o in found if o.verdict == "failed"] == []
    assert sum(o.verdict == "ok" for o in found) > 15


class Patched(Worker):
    """Runs scripts in this process."""

    def run(self, script: Script) -> Outcome:
        return outcome(script, self._backends)


def wrong_for_tanh(script: Script, backends: object) -> Outcome:
    """A stand-in for a wrong kernel: fails where forward has a tanh and the loop any step."""
    return Outcome("failed" if "anh(" in script.text and '"steps": 0' not in script.text else "ok", "wrong for tanh")


def test_failures_become_small_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "Worker", Patched)
    monkeypatch.setattr(sys.modules[__name__], "outcome", wrong_for_tanh)
    assert fuzz(40, seed=5, out=tmp_path) == 1
    text = capsys.readouterr().out
    scripts = sorted(tmp_path.glob("case-5-*.py"))
    assert scripts
    assert all(f"failed: {path}" in text for path in scripts)
    for path in scripts:
        lines = re.findall(r"^        (?:self\.l|v)\d+ = .*$", path.read_text(), re.MULTILINE)
        assert len(lines) <= 6, path.read_text()  # a flatten, the tanh, a product, a linear layer
        assert len(re.findall(r"anh\(", path.read_text())) == 1
        index = path.stem.split("-")[-1]
        assert f"maml-fast verify --fuzz 1 --seed 5 --from {index}, shrunk: wrong for tanh" in path.read_text()


@pytest.mark.skipif(not BUILT, reason="the core is not built")
def test_a_script_runs_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "case.py"
    path.write_text(draw(Choices(), ISAS, "A case.").text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, check=True)
    assert "ok: " in done.stdout


SIMPLEST = draw(Choices(), (), "A case.").text


@pytest.mark.parametrize(
    ("old", "new", "verdict", "reason"),
    [
        ("", "", "ok", ""),
        ("nn.Linear(3, 2)", "nn.Linear(3, 2, device='meta')", "refused", ""),
        ("return v1", "raise KeyError('mine')", "refused", "KeyError: 'mine'"),
        ("return v1", "return v1.cummax(1)[0]", "declined", "cummax"),
        ("return v1", "os.abort()", "failed", "the process died"),
        ("return v1", "__import__('time').sleep(60)", "failed", "it took more than"),
    ],
)
@pytest.mark.skipif(not BUILT, reason="the core is not built")
def test_outcomes(old: str, new: str, verdict: str, reason: str) -> None:
    assert old in SIMPLEST
    process = Worker(["cpu"], limit=20 if "sleep" in new else 300)
    try:
        found = process.run(Script(SIMPLEST.replace(old, new) if old else SIMPLEST, ""))
        assert found.verdict == verdict
        assert reason in found.reason
        if verdict == "failed":  # another process takes over
            assert process.run(Script(SIMPLEST, "")).verdict == "ok"
    finally:
        process.close()


@pytest.mark.parametrize("before", ["", "baseline"])
def test_the_instruction_set_is_put_back(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def examine(*arguments: object, **named: object) -> Report:
        seen.append(os.environ.get("MAML_FAST_ISA"))
        return Report(())

    monkeypatch.setattr(worker, "examine", examine)
    monkeypatch.setenv("MAML_FAST_ISA", before)
    outcome(Script(SIMPLEST, "avx2"), ["cpu"])
    assert seen == ["avx2"]
    assert os.environ["MAML_FAST_ISA"] == before


@pytest.mark.parametrize(
    ("layers", "shape", "expected"),
    [
        ([nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=2), nn.InstanceNorm2d(4)], (4, 6, 6), True),
        ([nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=2), nn.BatchNorm2d(4)], (4, 6, 6), False),
        ([nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=2), nn.GroupNorm(4, 4)], (4, 6, 6), True),
        ([nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=2), nn.GroupNorm(2, 4)], (4, 6, 6), False),
        ([nn.Upsample(scale_factor=(1, 3)), nn.LayerNorm(3)], (4, 6, 1), True),
        ([nn.Upsample(scale_factor=(1, 3)), nn.LayerNorm([6, 3])], (4, 6, 1), False),
        ([nn.ReLU(), nn.Threshold(100.0, 0.0), nn.InstanceNorm2d(4)], (4, 6, 6), False),
    ],
)
def test_norms_of_constants(layers: list[nn.Module], shape: tuple[int, ...], expected: bool) -> None:
    assert norms_constants(nn.Sequential(*layers), torch.randn(5, *shape)) == expected


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    class Interrupted(Patched):
        def run(self, script: Script) -> Outcome:
            calls.append(script)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return Outcome("ok")

    monkeypatch.setattr(run, "Worker", Interrupted)
    assert fuzz(20, seed=3, first=100, out=tmp_path) == 130
    text = capsys.readouterr().out
    assert "maml-fast verify --fuzz 17 --seed 3 --from 103" in text
    assert "3 cases agree" in text


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend: expected one of"):
        fuzz(1, backend="fastest")


def test_scripts_leave_the_generators_alone() -> None:
    before = torch.get_rng_state()
    script(3)
    assert torch.equal(torch.get_rng_state(), before)
