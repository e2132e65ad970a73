"""What can happen to a run's folder: a second run, damage, malice, a full disk, a kill."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import small_disk
from rich.console import Console

from maml_fast.data.storage import Busy
from maml_fast.recipes import Damaged, SinusoidConfig, SinusoidRecipe, Trainer, checkpoint, train
from maml_fast.recipes.metrics import Metrics, read_metrics

SETTINGS: dict[str, Any] = {
    "meta_batch": 4,
    "log_every": 4,
    "save_every": 1000,
    "validate_every": 8,
    "validation_tasks": 8,
    "eval_tasks": 8,
    "threads": 1,
}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def recipe(out: Path, iterations: int, **settings: Any) -> SinusoidRecipe:
    return SinusoidRecipe(SinusoidConfig(out=out, iterations=iterations, **(SETTINGS | settings)))


def trainer(out: Path, iterations: int, resume: bool = True, console: Console | None = None) -> Trainer:
    """A run without pictures and evaluation, which take the longest."""
    made = Trainer(recipe(out, iterations), resume=resume, console=console or quiet())
    made._finish = lambda: None  # type: ignore[method-assign]
    return made


def told(out: Path, iterations: int, resume: bool = True) -> str:
    """What a run says."""
    console = quiet()
    assert trainer(out, iterations, resume, console).run() == 0
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def ten_iterations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    told(folder, 10)
    return folder


@pytest.fixture
def run(ten_iterations: Path, tmp_path: Path) -> Path:
    """The folder of a run of ten iterations."""
    return shutil.copytree(ten_iterations, tmp_path / "run")


@pytest.fixture
def file(run: Path) -> Path:
    """Its checkpoint."""
    return run / "checkpoint.pt"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the state in a checkpoint, under a checksum that is right."""
    state = checkpoint.load(file)
    change(state)
    checkpoint.save(file, state)


# ---- two runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_second_run_is_refused_and_touches_nothing(resume: bool, run: Path) -> None:
    first = trainer(run, 20)
    (run / ".checkpoint.pt.123").touch()
    before = contents(run)
    with pytest.raises(Busy, match=f"out: {run} is in use by another run"):
        Trainer(recipe(run, 20), resume=resume, console=quiet())
    assert contents(run) == before
    assert first.run() == 0
    assert not list(run.glob("earlier*"))
    told(run, 24)


def test_folder_is_free_after_a_run_that_could_not_start(run: Path) -> None:
    with pytest.raises(ValueError, match="inner_lr: the run was started with"):
        Trainer(recipe(run, 20, inner_lr=0.5), resume=True, console=quiet())
    told(run, 20)


def test_trainer_does_nothing_after_its_run(run: Path) -> None:
    ended = trainer(run, 12)
    assert ended.run() == 0
    with pytest.raises(RuntimeError, match="run: expected to be called once"):
        ended.run()
    with pytest.raises(RuntimeError, match="save: expected to be called before the run's end"):
        ended.save()


def test_what_a_killed_run_left_half_written_is_removed(run: Path) -> None:
    for name in (".checkpoint.pt.12", ".metrics.jsonl.12-ab", ".curves.png.12", ".adaptation.png.12", ".lock"):
        (run / name).write_bytes(b"half")
    (run / ".mine.12").touch()
    told(run, 12)
    assert [name for name in contents(run) if name.startswith(".")] == [".mine.12"]


# ---- what is resumed, and what is moved away ---------------------------------------------------------


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    assert f"There is no {tmp_path}/checkpoint.pt to resume from: a new run begins." in told(tmp_path, 4)


def test_run_that_was_killed_before_its_first_checkpoint_is_moved_aside(run: Path) -> None:
    (run / "checkpoint.pt").unlink()
    lines = (run / "metrics.jsonl").read_bytes()
    assert "now in" in told(run, 4)
    assert (run / "earlier-1" / "metrics.jsonl").read_bytes() == lines


def test_files_of_others_are_left_alone(run: Path) -> None:
    foreign = {"package.json": b"{}", "photo.png": b"mine", "model.pt": b"mine", "data.jsonl": b"{}"}
    for name, content in foreign.items():
        (run / name).write_bytes(content)
    told(run, 4, resume=False)
    assert contents(run).items() > foreign.items()
    assert set(contents(run / "earlier-1")) == {"checkpoint.pt", "metrics.jsonl"}


def test_folder_may_look_like_markup(tmp_path: Path) -> None:
    out, console = tmp_path / "[red]a[0][/blue]", quiet()
    assert train(recipe(out, 8), resume=True, console=console) == 0
    output = console.file.getvalue() + told(out, 12) + told(out, 4, resume=False)  # type: ignore[attr-defined]
    assert output.count(f"{out}") == 8


def test_checkpoint_of_an_earlier_version_is_continued_from(run: Path, tmp_path: Path) -> None:
    state = checkpoint.load(run / "checkpoint.pt")
    del state["metrics"]
    torch.save(state, run / "checkpoint.pt")
    told(run, 20)
    told(tmp_path / "straight", 20)
    files = [checkpoint.load(folder / "checkpoint.pt")["model"] for folder in (run, tmp_path / "straight")]
    assert all(map(torch.equal, files[0].values(), files[1].values()))


# ---- damaged checkpoints -----------------------------------------------------------------------------


def refused(file: Path) -> str:
    with pytest.raises(Damaged, match=f"^{re.escape(str(file))}: ") as error:
        Trainer(recipe(file.parent, 20), resume=True, console=quiet())
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_checkpoint_is_read_by_torch_too(file: Path) -> None:
    assert torch.load(file, weights_only=True)["iteration"] == 10


def test_any_flipped_bit_is_found(file: Path) -> None:
    whole, generator = file.read_bytes(), random.Random(0)
    for place in [*range(60), *generator.sample(range(len(whole)), 60), *range(len(whole) - 90, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(Damaged, match=r"checkpoint\.pt"):
            checkpoint.load(file)


def test_any_missing_end_is_found(file: Path) -> None:
    whole = file.read_bytes()
    for size in [*range(0, len(whole), len(whole) // 40), *range(len(whole) - 90, len(whole))]:
        file.write_bytes(whole[:size])
        with pytest.raises(Damaged, match=r"checkpoint\.pt"):
            checkpoint.load(file)


def test_content_after_the_end_is_found(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")
    refused(file)


class Harm:
    """Pickled, it makes the file `harmed` when it is loaded."""

    def __init__(self, harmed: Path) -> None:
        self.harmed = harmed

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.harmed),)


@pytest.mark.parametrize("way", ["pickle", "torch", "sealed"])
def test_code_in_a_checkpoint_does_not_run(way: str, file: Path, tmp_path: Path) -> None:
    harm = Harm(tmp_path / "harmed")
    if way == "pickle":
        file.write_bytes(pickle.dumps({"config": harm}))
    elif way == "torch":
        torch.save({"config": harm}, file)
    else:
        changed(file, lambda state: state.update(config=harm))
    refused(file)
    assert not harm.harmed.exists()


def test_compressed_checkpoint_is_refused_before_it_is_unpacked(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert "it is compressed" in refused(file)


def test_checkpoint_larger_than_the_run_can_have_is_refused_unread(file: Path) -> None:
    os.truncate(file, 1 << 40)
    assert "expected at most" in refused(file)


PLACES = {
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_refused(place: str, file: Path) -> None:
    PLACES[place](file)
    assert "expected a regular file" in refused(file)


def test_link_that_leads_nowhere_is_told_of_and_not_taken_for_nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt"):
        Trainer(recipe(file.parent, 20), resume=True, console=quiet())


def _parameter(state: dict[str, Any]) -> str:
    return next(iter(state["model"]))


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"no {part}": lambda s, part=part: s.pop(part) for part in ("config", "model", "optimizer", "sampler", "best")},
    **{
        f"{part} is {value!r}": lambda s, part=part, value=value: s.update({part: value})
        for part in ("config", "iteration", "model", "optimizer", "sampler", "window", "best", "metrics")
        for value in ("text", 7.5, [1, 2])
    },
    "iteration below 0": lambda s: s.update(iteration=-1),
    "iteration true": lambda s: s.update(iteration=True),
    "window endless": lambda s: s.update(window=torch.zeros(1).expand(1 << 40)),
    "window of a matrix": lambda s: s.update(window=torch.zeros(2, 2)),
    "window of integers": lambda s: s.update(window=torch.zeros(2, dtype=torch.int64)),
    "parameter missing": lambda s: s["model"].pop(_parameter(s)),
    "parameter unknown": lambda s: s["model"].update(more=torch.zeros(1)),
    "parameter of another shape": lambda s: s["model"].update({_parameter(s): torch.zeros(3, 3)}),
    "parameter of another dtype": lambda s: s["model"].update({_parameter(s): s["model"][_parameter(s)].double()}),
    "parameter sparse": lambda s: s["model"].update({_parameter(s): s["model"][_parameter(s)].to_sparse()}),
    "parameter a number": lambda s: s["model"].update({_parameter(s): 1.0}),
    "best without a loss": lambda s: s["best"].pop("loss"),
    "best is NaN": lambda s: s["best"].update(loss=math.nan),
    "best of another shape": lambda s: s["best"]["model"].update({_parameter(s): torch.zeros(3, 3)}),
    "best without a model": lambda s: s["best"].pop("model"),
    "moments missing": lambda s: s["optimizer"].clear(),
    "moments of another shape": lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "rate of another run": lambda s: s["optimizer"]["param_groups"][0].update(lr=7.0),
    "sampler beyond its block": lambda s: s["sampler"].update(next=10**6),
    "sampler of another kind": lambda s: s["sampler"].update(ahead=7),
    "generator of another kind": lambda s: s["sampler"].update(generator=torch.zeros(16, dtype=torch.uint8)),
    "generator of noise": lambda s: s["sampler"].update(generator=torch.full_like(s["sampler"]["generator"], 255)),
    "metrics below 0": lambda s: s["metrics"].update(bytes=-1),
    "metrics without checksum": lambda s: s["metrics"].pop("sha256"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_state_of_another_form_is_refused_under_a_right_checksum(change: str, file: Path) -> None:
    changed(file, CHANGES[change])
    before = contents(file.parent)
    assert "not a checkpoint of this run" in refused(file)
    assert contents(file.parent) == before


# ---- damaged metrics ---------------------------------------------------------------------------------

INTACT = [{"iteration": i, "loss": float(i)} for i in (1, 2, 3)]
LINES = [json.dumps(line).encode() + b"\n" for line in INTACT]
BAD_LINES = [
    b'{"iteration": 2, "lo\n',
    b'{"iteration": 2{"iteration": 2, "loss": 1.0}\n',
    b'{"loss": 1.0}\n',
    b'{"iteration": null, "loss": 1.0}\n',
    b'{"iteration": true, "loss": 1.0}\n',
    b'{"iteration": -1, "loss": 1.0}\n',
    b'{"iteration": "2", "loss": 1.0}\n',
    b'{"iteration": 2, "loss": "x"}\n',
    b'{"iteration": 2, "loss": NaN}\n',
    b'{"iteration": 2, "loss": 1e999}\n',
    b"[2]\n",
    b"2\n",
    b"null\n",
    b"\n",
    b"\0" * 64 + b"\n",
    b"\xff\xfe}\n",
    b"[" * 100_000 + b"\n",
    b"1" * 10_000 + b"\n",
]


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("place", [0, 1, 3])
def test_damaged_line_is_left_out_and_told_of(bad: bytes, place: int, tmp_path: Path) -> None:
    path, content = tmp_path / "metrics.jsonl", b"".join([*LINES[:place], bad, *LINES[place:]])
    path.write_bytes(content)
    resumed = Metrics(path, until=3)
    assert resumed.lines == INTACT == read_metrics(path)
    assert resumed.note.startswith(f"{path}: 1 damaged line")
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content
    assert not Metrics(path, until=3).note


@pytest.mark.parametrize("end", [b'{"iteration": 4, "lo', b"\0" * 512, b"}", b'{"iteration": 4, "loss": 1.0}'])
def test_last_line_that_a_crash_cut_short_is_dropped(end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES) + end)
    resumed = Metrics(path, until=9)
    assert (resumed.lines, resumed.note) == (INTACT, "")


@pytest.mark.parametrize("change", [lambda c: c.replace(b"2.0", b"9.0"), lambda c: c[:20], lambda c: None])
def test_metrics_that_are_not_as_the_checkpoint_left_them_are_told_of(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = Metrics(path, until=0)
    for line in INTACT:
        before.add(**line)
    seal = before.seal()
    before.add(iteration=4, loss=1.0)
    assert Metrics(path, 3, seal).lines == INTACT
    assert not Metrics(path, 3, seal).note
    content = change(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    assert re.match(f"{path}: lines are missing or changed since the checkpoint", Metrics(path, 3, seal).note)


def test_metrics_are_on_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, synchronised, fsync = trainer(tmp_path, 4), [], os.fsync

    def noted(descriptor: int) -> None:
        synchronised.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    started.save()
    assert synchronised[0] == "metrics.jsonl"
    assert synchronised[1].startswith(".checkpoint.pt.")
    assert synchronised[2] == tmp_path.name


def test_run_with_damaged_metrics_names_them_and_goes_on(run: Path) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"\0" * 64 + b"".join(lines[1:]))
    assert f"{file}: 1 damaged line" in told(run, 16)
    assert [line["iteration"] for line in read_metrics(file)] == [4, 8, 12, 16, 16]


# ---- full disks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 5000])
def test_full_disk_leaves_the_last_checkpoint(size: int, run: Path) -> None:
    resumed = trainer(run, 4000)
    before = (run / "checkpoint.pt").read_bytes()
    with small_disk(size), pytest.raises(OSError, match=r"(metrics\.jsonl|checkpoint\.pt)'$"):
        resumed.run()
    assert (run / "checkpoint.pt").read_bytes() == before
    assert "at iteration 10" in told(run, 12)
