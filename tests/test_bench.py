"""The benchmark times only what is right, and does its sums correctly."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from maml_fast import bench
from maml_fast.bench import peers, report, timing
from maml_fast.cases import BENCH, MODELS, Case, Problem, conv4, select, siren, strided_conv

SINUSOID = replace(select(["sinusoid-k1"])[0], tasks=3, steps=2)
# small stand-ins for the timed networks: every kind of layer that the peers must know
TINY = [
    SINUSOID,
    Case("classes", BENCH[2].network, (784,), (5,), "cross_entropy", tasks=2, support=3, query=4, lr=0.4),
    Case("waves", partial(siren, 2, 8, 3), (2,), (3,), tasks=2, support=9, query=8, lr=0.01),
    Case("strided", partial(strided_conv, 1, 4, 3), (1, 16, 16), (3,), "cross_entropy", tasks=2, support=4, query=3),
    Case("pooled", partial(conv4, 3, 4, 3, 16), (3, 32, 32), (3,), "cross_entropy", tasks=2, support=4, query=3),
]
# and for the timed models: norms, attention, embeddings, recurrence, and what adapts
SMALL_MODELS = [
    *select(["transformer-encoder", "gru-classifier", "functa", "melu", "eegnet", "text-cnn", "bert", "lora"]),
    Case("head", partial(conv4, 1, 4, 3, 4), (1, 16, 16), (3,), "cross_entropy", tasks=2, adapts=("17.weight",)),
]
CONTENDERS = [c for c in peers.contenders() if c.name != "compile(vmap)"]
# JAX takes tens of seconds to compile a convolutional meta-gradient
PAIRS = [
    pytest.param(c, case, id=f"{c.name}-{case.name}", marks=pytest.mark.slow if slow else ())
    for c in CONTENDERS
    for case in TINY
    for slow in [c.name.startswith("JAX") and case.name in ("strided", "pooled")]
]


@pytest.mark.filterwarnings("ignore:maml_fast falls back")
@pytest.mark.parametrize(("contender", "case"), PAIRS)
def test_contenders_compute_the_meta_gradient(contender: peers.Contender, case: Case) -> None:
    if contender.missing:
        pytest.skip(contender.missing)
    step = contender.make(case.build(torch.float32))
    step()
    _, note = bench.check(contender, case, step, "cpu")
    assert note == ""


@pytest.mark.parametrize("case", SMALL_MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("make", [peers.torch_loop, peers.torch_vmap], ids=lambda m: m.__name__)
def test_peers_compute_models(make: Callable[[Problem], peers.Step], case: Case) -> None:
    contender = peers.Contender("peer", make)
    _, note = bench.check(contender, case, make(case.build(torch.float32)), "cpu")
    assert note == ""


def test_groups() -> None:
    assert select(["networks"], "bench") == list(BENCH)
    assert select(["models", "siren"], "bench") == [*MODELS, *select(["siren"])]
    assert len(MODELS) == 9
    assert not set(MODELS) & set(BENCH)


def test_the_default_is_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(bench, "select", lambda *names: asked.append(names) or [])
    bench.run("cpu", None, None, 0.1)
    assert asked == [(["networks"], "bench")]


def test_what_does_not_run_fused_is_told_and_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed: list[Case] = []
    (case,) = select(["attention-over-examples"])
    monkeypatch.setattr(bench, "select", lambda names, tag: [case])
    monkeypatch.setattr(bench, "_time_case", lambda case, *_: timed.append(case) or report.Outcome(case, ()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bench.run("cpu", None, ["attention-over-examples"], 0.1) == 0
    assert timed == [case]
    assert "attention-over-examples: no fused backend supports it: backend: vmap" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.no_sanitizer
def test_compiled_peer_computes_the_meta_gradient() -> None:
    (contender,) = [c for c in peers.contenders() if c.name == "compile(vmap)"]
    _, note = bench.check(contender, SINUSOID, contender.make(SINUSOID.build(torch.float32)), "cpu")
    assert note == ""


def off_by_a_percent(problem: Problem) -> peers.Step:
    step = peers.torch_vmap(problem)

    def wrong() -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss, gradients = step()
        return loss, [1.01 * g for g in gradients]

    return wrong


def broken(problem: Problem) -> peers.Step:
    raise OSError("no compiler")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "select", lambda names, tag: [SINUSOID])
    monkeypatch.setattr(bench, "_unsupported", lambda case, device: (True, ""))
    monkeypatch.setattr(bench, "_too_slow", lambda once, fastest_peer, seconds: "")
    everyone = [
        peers.Contender("vmap", peers.torch_vmap),
        peers.Contender("wrong", off_by_a_percent),
        peers.Contender("broken", broken),
        peers.Contender("absent", broken, missing="not installed"),
        peers.Contender("backward", peers.direct_backward, ours=True),
    ]
    monkeypatch.setattr(bench, "contenders", lambda: everyone)


def test_a_slow_peer_is_timed_unless_another_is_far_faster() -> None:
    assert not bench._too_slow(9.0, math.inf, seconds=4.0)
    assert not bench._too_slow(1.0, 0.1, seconds=4.0)
    assert not bench._too_slow(1.9, 1.0, seconds=4.0)
    assert "2.1 s" in bench._too_slow(2.1, 1.0, seconds=4.0)


def test_what_is_not_ready_in_time_is_interrupted() -> None:
    with pytest.raises(TimeoutError, match=r"not ready after 0\.05 s"), timing.within(0.05):
        time.sleep(5)
    with timing.within(0.05):
        pass
    time.sleep(0.1)  # no alarm is left


@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore:maml_fast falls back")
def test_run_times_only_what_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deeper" / "bench.json"
    assert bench.run("cpu", out, None, 1.0) == 0
    text = capsys.readouterr().out
    for part in ("wrong parameters", "failed: OSError: no compiler", "absent: not installed", "vs best peer"):
        assert part in text
    content = json.loads(out.read_text())
    assert content["machine"]["versions"]["torch"]
    (record,) = content["cases"]
    timed = {name for name, c in record["contenders"].items() if c["samples_s"]}
    assert timed == {"vmap", "backward"}
    assert record["best_peer"] == "vmap"
    assert record["speedups"]["backward"]["vmap"]["low"] > 0


@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore:maml_fast falls back")
def test_a_wrong_result_of_ours_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "contenders", lambda: [peers.Contender("ours", off_by_a_percent, ours=True)])
    assert bench.run("cpu", None, None, 0.1) == 1


@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore:maml_fast falls back")
@pytest.mark.parametrize(("dtypes", "code"), [((torch.float32,), 0), ((torch.float32, torch.float64), 1)])
def test_rounding_excuses_ours_only_if_float64_is_right(
    dtypes: tuple[torch.dtype, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(problem: Problem) -> peers.Step:
        step, factor = peers.torch_vmap(problem), 1.001 if problem.x_s.dtype in dtypes else 1.0

        def scaled() -> tuple[torch.Tensor, list[torch.Tensor]]:
            loss, gradients = step()
            return loss, [factor * g for g in gradients]

        return scaled

    monkeypatch.setattr(bench, "contenders", lambda: [peers.Contender("ours", make, ours=True)])
    assert bench.run("cpu", None, None, 0.1) == code


def test_unknown_case() -> None:
    with pytest.raises(ValueError, match="no case named 'sinus'"):
        bench.run("cpu", None, ["sinus"], 0.1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the calls move."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    return now


def test_interleaved_samples(clock: list[float]) -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        clock[0] += seconds
        if not order or order[-1] != name:
            order.append(name)

    calls = {"fast": partial(call, "fast", 0.001), "slow": partial(call, "slow", 0.3)}
    samples = timing.interleave(calls, 6.0, lambda: None)
    assert samples["fast"].median == pytest.approx(0.001)
    assert samples["slow"].median == pytest.approx(0.3)
    assert len(samples["fast"].values) == timing.MOST
    assert len(samples["slow"].values) == 5
    assert set(samples["slow"].by_round) < set(samples["fast"].by_round)
    assert order.count("slow") >= 5
    ratio = samples["slow"].ratio_to(samples["fast"])
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((300, 300, 300))


def test_ratios_are_taken_round_by_round() -> None:
    a, b = timing.Samples({0: 2.0, 1: 6.0, 2: 4.0}), timing.Samples({0: 1.0, 2: 4.0, 3: 9.0})
    assert a.ratio_to(b) == timing.Spread(1.5, 1.0, 2.0)


def test_machine_is_described() -> None:
    found = report.machine("cpu")
    assert found["cores"] >= 1
    assert found["cpu"]
    assert json.dumps(found)


@pytest.mark.slow
def test_memory_of_the_loop_grows_with_tasks() -> None:
    small, large = (bench.memory("siren", "torch loop", tasks=t) for t in (1, 4))
    assert 0 <= small < large
