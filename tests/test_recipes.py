"""The outer loop: resuming, interrupting, checkpoints, metrics, evaluation."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from maml_fast.api.maml import MAML
from maml_fast.api.presets import multi_step_weights
from maml_fast.data import LabelledSet, MetaBatch, Sinusoids
from maml_fast.recipes import (
    NETS,
    Config,
    OmniglotConfig,
    OmniglotRecipe,
    Recipe,
    SinusoidConfig,
    SinusoidRecipe,
    Trainer,
    annealing,
    checkpoint,
    display,
    files,
    metrics,
    omniglot,
    plots,
    train,
)
from maml_fast.recipes.config import ALGORITHMS
from maml_fast.recipes.evaluation import Estimate, evaluate
from maml_fast.recipes.interrupt import Interrupt
from maml_fast.recipes.measure import ACCURACY, LOSS, Measure
from maml_fast.recipes.state import check_settings


def quiet() -> Console:
    return Console(file=io.StringIO())


def sinusoid(out: Path, iterations: int, **settings: Any) -> SinusoidRecipe:
    settings = {"meta_batch": 4, "log_every": 7, "eval_tasks": 20, "threads": 1} | settings
    return SinusoidRecipe(SinusoidConfig(out=out, iterations=iterations, **settings))


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with 3 instead of 11 numbers of inner steps evaluated: each is a plan of its own."""
    monkeypatch.setattr(SinusoidRecipe._evaluate, "__defaults__", ((0, 1, 10),))


@pytest.fixture
def brief_end(few_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed but not rendered, which takes the longest."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **how: file.write(b""))


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random characters in place of Omniglot's: noisy copies of one image for each."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(1623, 1, 28, 28, generator=generator) < 0.2
    noise = torch.rand(1623, 4, 28, 28, generator=generator) < 0.05
    samples = (prototypes ^ noise).to(torch.uint8).flatten(0, 1)
    data = LabelledSet(samples, torch.full((1623,), 4))
    monkeypatch.setattr(omniglot, "load_omniglot", lambda folder: (data, [f"A/{n:04d}" for n in range(1623)]))


def small_omniglot(out: Path, iterations: int, **settings: Any) -> OmniglotRecipe:
    defaults = {
        "meta_batch": 4,
        "log_every": 7,
        "eval_tasks": 8,
        "validate_every": 8,
        "validation_tasks": 8,
        "threads": 1,
    }
    settings = defaults | settings
    return OmniglotRecipe(OmniglotConfig(out=out, iterations=iterations, **settings))


def parameters(recipe: Recipe) -> list[torch.Tensor]:
    return [p.detach().clone() for p in recipe.maml.parameters()]


def losses(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "iterations_per_second"} for line in lines]


@pytest.mark.usefixtures("drawings", "brief_end")
@pytest.mark.parametrize("make", [sinusoid, small_omniglot])
def test_resuming_gives_the_same_bits(make: Any, tmp_path: Path) -> None:
    often = {"validate_every": 8, "validation_tasks": 8}
    straight, first, second = (make(tmp_path / run, until, **often) for run, until in (("a", 20), ("b", 10), ("b", 20)))
    assert train(straight, console=quiet()) == 0
    assert train(first, console=quiet()) == 0
    assert train(second, resume=True, console=quiet()) == 0
    assert all(map(torch.equal, parameters(straight), parameters(second)))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    a, b = (checkpoint.load(tmp_path / run / "checkpoint.pt") for run in "ab")
    assert a["iteration"] == b["iteration"] == 20
    for kept_a, kept_b in ((a["model"], b["model"]), (a["best"].pop("model"), b["best"].pop("model"))):
        assert all(map(torch.equal, kept_a.values(), kept_b.values()))
    assert a["best"] == b["best"]
    assert a["best"]["iteration"] in (8, 16)
    assert (tmp_path / "a" / "evaluation.json").read_text() == (tmp_path / "b" / "evaluation.json").read_text()


@pytest.mark.usefixtures("brief_end")
@pytest.mark.parametrize("algorithm", ALGORITHMS[1:])
def test_every_algorithm_resumes_to_the_same_bits(algorithm: str, tmp_path: Path) -> None:
    settings = {"algorithm": algorithm, "steps": 2, "inner_lr": 0.01, "anneal": 16, "first_order": 13}
    settings |= {"meta_decay": 24} if algorithm == "reptile" else {}
    settings |= {"validate_every": 8, "validation_tasks": 8}
    straight, first, second = (
        sinusoid(tmp_path / run, until, **settings) for run, until in (("a", 20), ("b", 10), ("b", 20))
    )
    for recipe, resume in ((straight, False), (first, False), (second, True)):
        assert train(recipe, resume=resume, console=quiet()) == 0
    assert all(map(torch.equal, parameters(straight), parameters(second)))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert (tmp_path / "a" / "evaluation.json").read_text() == (tmp_path / "b" / "evaluation.json").read_text()
    plain = sinusoid(tmp_path / "c", 20, **settings | {"algorithm": "maml"})
    assert train(plain, console=quiet()) == 0
    assert not all(map(torch.equal, straight.maml.module.parameters(), plain.maml.module.parameters()))
    with pytest.raises(ValueError, match=f"algorithm: the run was started with {algorithm}, got maml"):
        train(sinusoid(tmp_path / "a", 30, **settings | {"algorithm": "maml"}), resume=True, console=quiet())


@pytest.mark.usefixtures("brief_end")
def test_learned_rates_are_kept_with_the_best_and_evaluated(tmp_path: Path) -> None:
    """They move, and those of the best validation come back with its parameters."""
    settings = {"algorithm": "metasgd", "inner_lr": 0.01, "validate_every": 4, "validation_tasks": 8, "meta_lr": 0.01}
    recipe = sinusoid(tmp_path, 12, **settings)
    assert train(recipe, console=quiet()) == 0
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    names = [f"lr{i}" for i in range(6)]
    assert list(state["numbers"]) == list(state["best"]["numbers"]) == names
    assert all((value != 0.01).any() for value in state["numbers"].values())
    for name in names:
        assert torch.equal(recipe.maml.get_parameter(name).detach(), state["best"]["numbers"][name])
    (tmp_path / "other").mkdir()
    for harm in (lambda s: s["numbers"].pop("lr0"), lambda s: s["best"]["numbers"].update(lr1=torch.zeros(2))):
        harmed = checkpoint.load(tmp_path / "checkpoint.pt")
        harm(harmed)
        checkpoint.save(tmp_path / "other" / "checkpoint.pt", harmed)
        with pytest.raises(ValueError, match="its learned numbers: it has"):
            train(sinusoid(tmp_path / "other", 12, **settings), resume=True, console=quiet())


def test_mamlpp_is_annealed_by_the_iteration_alone(tmp_path: Path) -> None:
    recipe = sinusoid(tmp_path, 100, algorithm="mamlpp", steps=3, anneal=40, first_order=6)
    found = {}
    iteration: int | None = 0
    while iteration is not None:
        annealing.settle(recipe.config, recipe.maml, iteration)
        found[iteration] = recipe.maml.step_weights, recipe.maml.first_order
        iteration = annealing.next_change(recipe.config, iteration)
    assert list(found) == [0, 4, 6, *range(8, 41, 4)]
    assert [order for _, order in found.values()] == [True, True] + [False] * 10
    for at, (weights, _) in found.items():
        assert weights == (None if at == 40 else multi_step_weights(3, at // 4 / 10))
    plain = sinusoid(tmp_path, 100)
    annealing.settle(plain.config, plain.maml, 50)
    assert annealing.next_change(plain.config, 0) is None
    assert plain.maml.step_weights is None


@pytest.mark.usefixtures("brief_end")
def test_reptile_moves_towards_what_tasks_adapt_to_by_steps_that_fall(tmp_path: Path) -> None:
    """θ ← θ + ε (mean θ_K − θ), ε from 1 on a line to 0, with Adam inside."""
    recipe = sinusoid(tmp_path, 4, algorithm="reptile", steps=2, inner_lr=0.01)
    model, stream = copy.deepcopy(recipe.maml.module), Sinusoids(4, 10, 10, seed=0)
    for iteration in range(4):
        x_s, y_s, *_ = next(stream)
        found = []
        for x, y in zip(x_s, y_s, strict=True):
            own = copy.deepcopy(model)
            optimizer = torch.optim.Adam(own.parameters(), lr=0.01, betas=(0.0, 0.999))
            for _ in range(2):
                optimizer.zero_grad()
                F.mse_loss(own(x), y).backward()
                optimizer.step()
            found.append([p.detach() for p in own.parameters()])
        with torch.no_grad():
            for p, *ends in zip(model.parameters(), *found, strict=True):
                p += (1 - iteration / 4) * (torch.stack(ends).mean(0) - p)
    assert train(recipe, console=quiet()) == 0
    for p, expected in zip(recipe.maml.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-3, atol=1e-4)


def test_a_longer_reptile_run_would_fall_otherwise(tmp_path: Path) -> None:
    config = sinusoid(tmp_path, 10, algorithm="reptile").config
    assert (config.optimizer, config.meta_lr, config.meta_decay) == ("sgd", 1.0, 10)
    with pytest.raises(ValueError, match="meta_decay: the run was started with 10, got 20"):
        check_settings(config.fixed(), sinusoid(tmp_path, 20, algorithm="reptile").config.fixed())
    check_settings(config.fixed(), sinusoid(tmp_path, 20, algorithm="reptile", meta_decay=10).config.fixed())
    before = {n: v for n, v in config.fixed().items() if n not in ("optimizer", "meta_decay", "anneal", "first_order")}
    adam = {"optimizer": "adam", "meta_lr": 1e-3, "meta_decay": 0}
    check_settings(before | {"meta_lr": 1e-3}, sinusoid(tmp_path, 10, algorithm="reptile", **adam).config.fixed())
    with pytest.raises(ValueError, match="optimizer: the run was started with adam, got sgd"):
        check_settings(before, config.fixed())


def test_mamlpp_is_measured_as_far_as_it_has_rates(tmp_path: Path) -> None:
    assert OmniglotConfig(out=tmp_path, algorithm="mamlpp").measurable(range(11)) == [*range(6)]
    assert OmniglotConfig(out=tmp_path, algorithm="mamlpp", steps=2).test_steps == 2
    assert [OmniglotConfig(out=tmp_path, algorithm=a).steps for a in ("maml", "reptile", "mamlpp")] == [1, 5, 5]
    assert OmniglotConfig(out=tmp_path, algorithm="metasgd").measurable(range(11)) == [*range(11)]
    with pytest.raises(ValueError, match="test_steps: expected at most the 2 that mamlpp has rates for, got 3"):
        OmniglotConfig(out=tmp_path, algorithm="mamlpp", steps=2, test_steps=3)
    with pytest.raises(ValueError, match="steps: expected 1 or more for mamlpp"):
        SinusoidConfig(out=tmp_path, algorithm="mamlpp", steps=0)
    with pytest.raises(ValueError, match="optimizer: expected one of adam, sgd, got 'lion'"):
        SinusoidConfig(out=tmp_path, optimizer="lion")


def test_a_run_of_a_version_without_algorithms_goes_on(tmp_path: Path) -> None:
    config = sinusoid(tmp_path, 1).config.fixed()
    before = {name: value for name, value in config.items() if name != "algorithm"}
    check_settings(before, config)
    with pytest.raises(ValueError, match="algorithm: the run was started with maml, got anil"):
        check_settings(before, config | {"algorithm": "anil"})


class Interrupting(Sinusoids):
    """Sends this process a signal while the given meta-batch is drawn."""

    def __init__(self, at: int, number: int, *sizes: int) -> None:
        super().__init__(*sizes)
        self.at, self.number = at, number

    def __next__(self) -> MetaBatch:
        self.at -= 1
        if self.at == 0:
            os.kill(os.getpid(), self.number)
        return super().__next__()


@pytest.mark.usefixtures("brief_end")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_between_iterations(number: signal.Signals, tmp_path: Path) -> None:
    straight = sinusoid(tmp_path / "a", 20)
    assert train(straight, console=quiet()) == 0
    interrupted = sinusoid(tmp_path / "b", 20)
    trainer = Trainer(interrupted, console=quiet())
    interrupted.sampler = Interrupting(13, number, 4, 10, 10)
    assert trainer.run() == 128 + number
    assert checkpoint.load(tmp_path / "b" / "checkpoint.pt")["iteration"] == 13
    resumed = sinusoid(tmp_path / "b", 20)
    assert train(resumed, resume=True, console=quiet()) == 0
    assert all(map(torch.equal, parameters(straight), parameters(resumed)))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.fixture
def usual_interrupt() -> Iterator[None]:
    """Python's own handler, also where the tests were started in the background, with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_interrupt")
def test_second_interrupt_acts_as_usual() -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_run_writes_everything(tmp_path: Path) -> None:
    assert train(sinusoid(tmp_path, 20), console=quiet()) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint.pt", "metrics.jsonl", "curves.png", "adaptation.png", "evaluation.json"}
    for picture in ("curves.png", "adaptation.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert [len(rows) for rows in results.values()] == [11, 11]
    assert [line["iteration"] for line in losses(tmp_path)] == [7, 14]


@pytest.mark.usefixtures("brief_end")
@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_however_short_the_stretches(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "BAR_PERIOD", 0.0)
    monkeypatch.setattr(display, "LINE_PERIOD", 0.0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150)
    assert train(sinusoid(tmp_path, 10, log_every=2), console=console) == 0
    output = console.file.getvalue()
    for iteration in (1, 5, 9):
        assert (f"{iteration}/10" if terminal else f"iteration {iteration}: loss ") in output
    assert "it/s" in output


@pytest.mark.usefixtures("brief_end")
def test_progress_is_not_shown_every_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "LINE_PERIOD", 3600.0)
    console = quiet()
    assert train(sinusoid(tmp_path, 10, log_every=2), console=console) == 0
    assert "it/s" not in console.file.getvalue()


@pytest.mark.usefixtures("brief_end")
def test_meta_training_learns(tmp_path: Path) -> None:
    assert train(sinusoid(tmp_path, 1500, meta_batch=25, log_every=100), console=quiet()) == 0
    curve = [line["loss"] for line in losses(tmp_path)]
    assert curve[-1] < 0.8 * curve[0]


@pytest.mark.usefixtures("drawings")
@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_omniglot_learns_validates_and_keeps_the_best(net: str, tmp_path: Path) -> None:
    assert train(small_omniglot(tmp_path, 40, meta_batch=16, net=net), console=quiet()) == 0
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    validated = [line["validation_accuracy"] for line in losses(tmp_path) if "validation_accuracy" in line]
    assert len(validated) == 5
    best = state["best"]
    assert best["accuracy"] == max(validated)
    assert best["iteration"] == 8 * (1 + validated.index(max(validated)))
    (rows,) = json.loads((tmp_path / "evaluation.json").read_text()).values()
    assert rows[3]["accuracy"]["mean"] > 0.5, "five classes; chance is 0.2"


@pytest.mark.usefixtures("brief_end")
def test_sinusoid_validates_and_keeps_the_best(tmp_path: Path) -> None:
    console = quiet()
    assert train(sinusoid(tmp_path, 40, validate_every=8, validation_tasks=50), console=console) == 0
    best = checkpoint.load(tmp_path / "checkpoint.pt")["best"]
    validated = {line["iteration"]: line["validation_loss"] for line in losses(tmp_path) if "validation_loss" in line}
    assert list(validated) == [8, 16, 24, 32, 40]
    assert best["loss"] == min(validated.values()) == validated[best["iteration"]]
    assert f"{best['loss']:.4f}, of iteration {best['iteration']}." in console.file.getvalue()
    again = sinusoid(tmp_path, 40, validation_tasks=50)
    again.maml.module.load_state_dict(best["model"])
    assert again.validate() == best["loss"], "the same tasks every time"


def test_sinusoid_validation_is_the_mean_over_the_curve(tmp_path: Path) -> None:
    recipe = sinusoid(tmp_path, 1, seed=3, validation_tasks=30)
    tasks = Sinusoids(30, 5, 10, seed=3 * 3 + 1)
    results = evaluate(recipe.maml, tasks, 30, steps=[1, 5, 10])
    assert recipe.validate() == pytest.approx(sum(result.loss.mean for result in results) / 3)


class Scripted(SinusoidRecipe):
    """Validates to the given values."""

    values: Iterator[float]

    def validate(self) -> float:
        return next(self.values)


def scripted(out: Path, iterations: int, *values: float) -> Scripted:
    recipe = Scripted(sinusoid(out, iterations, validate_every=4).config)
    recipe.values = iter(values)
    return recipe


def read_strictly(out: Path) -> list[dict[str, Any]]:
    """The metrics, by a reader that takes no Infinity and no NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    text = (out / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.usefixtures("few_steps")
def test_validation_that_is_not_finite_is_never_chosen(tmp_path: Path) -> None:
    values = [math.nan, 3.0, 1.0, -math.inf, 2.0, math.inf]
    straight = scripted(tmp_path / "a", 24, *values)
    assert train(straight, console=quiet()) == 0
    state = checkpoint.load(tmp_path / "a" / "checkpoint.pt")
    assert (state["best"]["iteration"], state["best"]["loss"]) == (12, 1.0)
    assert all(map(torch.equal, parameters(straight), state["best"]["model"].values())), "the best are evaluated"
    assert not all(map(torch.equal, parameters(straight), state["model"].values()))
    lines = read_strictly(tmp_path / "a")
    assert [line["validation_loss"] for line in lines if "validation_loss" in line] == [None, 3.0, 1.0, None, 2.0, None]
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")

    assert train(scripted(tmp_path / "b", 18, *values[:4]), console=quiet()) == 0
    resumed = scripted(tmp_path / "b", 24, *values[4:])
    assert train(resumed, resume=True, console=quiet()) == 0
    assert all(map(torch.equal, parameters(straight), parameters(resumed)))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.usefixtures("brief_end")
def test_last_parameters_are_evaluated_where_no_validation_is_finite(tmp_path: Path) -> None:
    recipe = scripted(tmp_path, 8, math.nan, math.inf)
    assert train(recipe, console=quiet()) == 0
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert all(map(torch.equal, parameters(recipe), state["model"].values()))


@pytest.mark.usefixtures("brief_end")
def test_best_of_an_earlier_version_is_taken_up(tmp_path: Path) -> None:
    assert train(scripted(tmp_path, 4, 1.0), console=quiet()) == 0
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    del state["best"]["iteration"]
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    console = quiet()
    assert train(scripted(tmp_path, 8, 2.0), resume=True, console=console) == 0
    assert "1.0000, of iteration ?." in console.file.getvalue()


@pytest.mark.parametrize(
    ("measure", "value", "best", "improves"),
    [
        (ACCURACY, 0.5, None, True),
        (ACCURACY, 0.5, 0.4, True),
        (ACCURACY, 0.5, 0.5, False),
        (LOSS, 0.4, 0.5, True),
        (LOSS, 0.5, 0.4, False),
        *[(measure, value, None, False) for measure in (ACCURACY, LOSS) for value in (math.nan, math.inf, -math.inf)],
    ],
)
def test_measures_know_their_direction(measure: Measure, value: float, best: float | None, improves: bool) -> None:
    assert measure.improves(value, best) is improves


@pytest.mark.parametrize("value", [None, 0.0, 1e33])
def test_curves_are_drawn_whatever_the_validations_are(value: float | None, tmp_path: Path) -> None:
    lines = [{"iteration": 1, "loss": None}, {"iteration": 2, "validation_loss": value}]
    plots.training_curves(tmp_path / "curves.png", lines, LOSS)


@pytest.mark.usefixtures("brief_end")
def test_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    assert train(sinusoid(tmp_path, 5), console=quiet()) == 0
    old = (tmp_path / "checkpoint.pt").read_bytes()
    assert train(sinusoid(tmp_path, 6), console=quiet()) == 0
    assert (tmp_path / "earlier-1" / "checkpoint.pt").read_bytes() == old
    assert checkpoint.load(tmp_path / "checkpoint.pt")["iteration"] == 6


@pytest.mark.usefixtures("brief_end")
def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    assert train(sinusoid(tmp_path, 5), console=quiet()) == 0
    with pytest.raises(ValueError, match=r"inner_lr: the run was started with 0\.001, got 0\.02"):
        Trainer(sinusoid(tmp_path, 10, inner_lr=0.02), resume=True, console=quiet())


def test_backend_that_cannot_run_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backend: expected one of"):
        sinusoid(tmp_path, 5, backend="abacus")


@pytest.mark.parametrize("name", Config.COUNTS)
def test_bad_settings_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
        SinusoidConfig(out=tmp_path, **{name: 0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps: expected 0 or more"),
        ({"inner_lr": 0.0}, "inner_lr: expected a number above 0"),
        ({"meta_lr": math.nan}, "meta_lr: expected a number above 0"),
        ({"net": "transformer"}, "net: expected one of"),
        ({"split": "mine"}, "split: expected one of"),
        ({"ways": 0}, "ways: expected 1 or more"),
        ({"test_steps": -1}, "test_steps: expected 0 or more"),
    ],
)
def test_bad_omniglot_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OmniglotConfig(**settings)


@pytest.mark.parametrize(
    ("ways", "meta_batch", "steps", "test_steps"), [(5, 32, 1, 3), (10, 32, 1, 3), (11, 16, 5, 5), (20, 16, 5, 5)]
)
def test_omniglot_defaults_are_the_papers(ways: int, meta_batch: int, steps: int, test_steps: int) -> None:
    config = OmniglotConfig(ways=ways, shots=5)
    assert (config.meta_batch, config.steps, config.test_steps) == (meta_batch, steps, test_steps)
    assert (config.net, config.inner_lr, config.queries, config.iterations) == ("conv", 2.0, 5, 60_000)


def test_given_settings_replace_the_defaults() -> None:
    given = {"meta_batch": 3, "steps": 2, "test_steps": 0, "queries": 4, "inner_lr": 0.3}
    config = OmniglotConfig(ways=20, **given)
    assert {name: getattr(config, name) for name in given} == given
    assert OmniglotConfig(net="conv4").inner_lr == 0.4


@pytest.mark.parametrize("net", ["conv", "conv4"])
def test_convolutional_nets_start_as_in_the_authors_code(net: str) -> None:
    *layers, head = NETS[net](20)
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [conv.weight.shape for conv in convs] == [(64, 1, 3, 3), *[(64, 64, 3, 3)] * 3]
    assert not any(layer.bias.any() for layer in (*convs, head))
    for conv in convs:
        bound = math.sqrt(6 / (9 * (conv.in_channels + conv.out_channels)))
        assert 0.95 * bound < conv.weight.abs().max() <= bound
    assert head.weight.std().item() == pytest.approx(1.0 if net == "conv" else math.sqrt(2 / 84), rel=0.1)


@pytest.mark.usefixtures("drawings", "core")
@pytest.mark.parametrize("net", NETS)
def test_training_and_evaluation_take_the_core(net: str, tmp_path: Path) -> None:
    recipe = small_omniglot(tmp_path, 1, net=net)
    x_s, y_s, x_q, y_q = next(recipe.sampler)
    assert x_s.shape == (4, 5, 1, 28, 28)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a slower backend would warn
        for asked in ((x_s, y_s, x_q, y_q), (x_s, y_s, x_q)):
            assert "backend: cpu" in recipe.maml.explain(*asked)
        recipe.validate()


@pytest.mark.usefixtures("drawings")
def test_more_ways_than_validation_characters_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ways: expected at most"):
        small_omniglot(tmp_path, 1, ways=500, rotations=False).validate()


def test_evaluation_agrees_with_the_textbook() -> None:
    torch.manual_seed(0)
    model, rate = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), 0.05
    results = evaluate(MAML(model, rate, loss="mse"), Sinusoids(4, 5, 6, seed=5), 6, steps=[0, 2])
    tasks = Sinusoids(4, 5, 6, seed=5)
    batch = [torch.cat(parts)[:6] for parts in zip(next(tasks), next(tasks), strict=True)]
    for result, steps in zip(results, (0, 2), strict=True):
        expected = torch.stack([adapted_loss(model, rate, steps, *task) for task in zip(*batch, strict=True)])
        assert result.step == steps
        assert result.accuracy is None
        assert result.loss.mean == pytest.approx(expected.mean().item(), rel=1e-4)
        assert result.loss.ci95 == pytest.approx(1.96 * expected.std().item() / math.sqrt(6), rel=1e-4)
        assert result.loss.median == pytest.approx(expected.median().item(), rel=1e-4)


def adapted_loss(model: nn.Module, rate: float, steps: int, x_s: Any, y_s: Any, x_q: Any, y_q: Any) -> torch.Tensor:
    values = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    for _ in range(steps):
        loss = F.mse_loss(torch.func.functional_call(model, values, (x_s,)), y_s)
        gradients = torch.autograd.grad(loss, list(values.values()))
        values = {
            name: (value - rate * g).detach().requires_grad_()
            for (name, value), g in zip(values.items(), gradients, strict=True)
        }
    return F.mse_loss(torch.func.functional_call(model, values, (x_q,)), y_q).detach()


def test_estimate_of_one_task_has_no_interval() -> None:
    estimate = Estimate.of(torch.tensor([2.0]))
    assert estimate.mean == 2.0
    assert math.isnan(estimate.ci95)


def test_json_is_strict(tmp_path: Path) -> None:
    files.write_json(tmp_path / "file", {"rows": [{"mean": math.inf, "ci95": math.nan, "median": 0.5}], "step": 1})
    expected = {"rows": [{"mean": None, "ci95": None, "median": 0.5}], "step": 1}
    assert json.loads((tmp_path / "file").read_text()) == expected


def test_metrics_survive_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "loss": 3.0}\n{"iteration": 2, "loss": 2.0}\n{"iteration": 3, "lo')
    resumed = metrics.Metrics(path, until=1)
    resumed.add(iteration=2, loss=2.5)
    assert metrics.read_metrics(path) == [{"iteration": 1, "loss": 3.0}, {"iteration": 2, "loss": 2.5}]
