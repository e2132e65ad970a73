"""Task samplers and the Omniglot loader."""

from __future__ import annotations

import errno
import gzip
import io
import math
import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maml_fast.data import (
    Episodes,
    LabelledSet,
    Sampler,
    Sinusoids,
    archives,
    load_omniglot,
    omniglot,
    split_omniglot,
)

DATA = Path(os.environ.get("MAML_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def toy_set(counts: list[int]) -> LabelledSet:
    """Every sample tells its class and its place in it."""
    rows = [(c, n) for c, count in enumerate(counts) for n in range(count)]
    return LabelledSet(torch.tensor(rows), torch.tensor(counts))


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_sinusoid_tasks_are_the_papers() -> None:
    x_s, y_s, x_q, y_q = next(Sinusoids(500, 10, 15, seed=1))
    assert x_s.shape == y_s.shape == (500, 10, 1)
    assert x_q.shape == y_q.shape == (500, 15, 1)
    x, y = torch.cat([x_s, x_q], 1).double(), torch.cat([y_s, y_q], 1).double()
    assert x.min() >= -5
    assert x.max() <= 5
    # A sin(x − φ) = (A cos φ) sin x − (A sin φ) cos x: one pair of coefficients explains support and query.
    basis = torch.cat([x.sin(), -x.cos()], 2)
    coefficients = torch.linalg.lstsq(basis, y).solution
    assert torch.allclose(basis @ coefficients, y, atol=1e-4)
    amplitude = coefficients.norm(dim=1).squeeze(1)
    phase = torch.atan2(coefficients[:, 1, 0], coefficients[:, 0, 0])
    assert amplitude.min() >= 0.1 - 1e-4
    assert amplitude.max() <= 5 + 1e-4
    assert phase.min() >= -1e-3
    assert phase.max() <= math.pi + 1e-3
    assert abs(amplitude.mean() - 2.55) < 0.25
    assert abs(phase.mean() - math.pi / 2) < 0.2


def test_meta_batches_are_contiguous_and_differ() -> None:
    sampler = Sinusoids(3, 2, 2, ahead=2)
    batches = [next(sampler) for _ in range(5)]
    assert all(part.is_contiguous() for batch in batches for part in batch)
    assert len({float(batch.x_s[0, 0, 0]) for batch in batches}) == 5


SAMPLERS = {
    "sinusoids": lambda seed: Sinusoids(2, 3, 4, seed=seed, ahead=3),
    "episodes": lambda seed: Episodes(toy_set([4, 5, 9]), 2, 2, 1, 3, seed=seed, ahead=3),
}


@pytest.mark.parametrize("name", SAMPLERS)
@given(taken=st.integers(0, 10), seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_stream_resumes_bit_for_bit(name: str, taken: int, seed: int) -> None:
    straight: Sampler = SAMPLERS[name](seed)
    for _ in range(taken):
        next(straight)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed: Sampler = SAMPLERS[name](seed + 1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        assert same(next(straight), next(resumed))


def test_sampling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    next(SAMPLERS["episodes"](0))
    assert torch.equal(before, torch.get_rng_state())


@given(
    counts=st.lists(st.integers(3, 9), min_size=2, max_size=6),
    ways=st.integers(1, 4),
    shots=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_episodes_are_disjoint_and_well_labelled(counts: list[int], ways: int, shots: int, seed: int) -> None:
    ways, queries = min(ways, len(counts)), min(counts) - shots
    if queries < 1:
        queries, shots = 1, min(counts) - 1
    x_s, y_s, x_q, y_q = next(Episodes(toy_set(counts), 5, ways, shots, queries, seed=seed, dtype=torch.float64))
    assert x_s.shape == (5, ways * shots, 2)
    assert x_q.shape == (5, ways * queries, 2)
    for task in range(5):
        x, y = torch.cat([x_s[task], x_q[task]]), torch.cat([y_s[task], y_q[task]])
        samples = {tuple(row) for row in x.int().tolist()}
        assert len(samples) == len(x), "a sample was drawn twice"
        pairs = set(zip(y.tolist(), x[:, 0].int().tolist(), strict=True))
        assert len(pairs) == ways == len({label for label, _ in pairs}) == len({kind for _, kind in pairs})
        assert all(place < counts[kind] for kind, place in samples)
        assert y_s[task].bincount().tolist() == [shots] * ways


def test_episodes_are_uniform() -> None:
    """All 6 ordered pairs of classes, and all 12 of (support, query), come equally often."""
    sampler = Episodes(toy_set([4, 4, 4]), 6000, 2, 1, 1, seed=3, ahead=1)
    x_s, _, x_q, _ = next(sampler)
    classes = Counter(map(tuple, x_s[:, :, 0].int().tolist()))
    places = Counter(zip(x_s[:, 0, 1].tolist(), x_q[:, 0, 1].tolist(), strict=True))
    assert len(classes) == 6
    assert len(places) == 12
    assert all(abs(n - 1000) < 150 for n in classes.values())
    assert all(abs(n - 500) < 110 for n in places.values())


def test_labelled_set_groups_and_selects() -> None:
    samples, labels = torch.tensor([[10], [20], [11], [30], [21]]), torch.tensor([1, 2, 1, 7, 2])
    grouped = LabelledSet.from_labels(samples, labels)
    assert grouped.samples.flatten().tolist() == [10, 11, 20, 21, 30]
    assert grouped.counts.tolist() == [2, 2, 1]
    assert grouped.select([2, 0]).samples.flatten().tolist() == [30, 10, 11]
    assert len(grouped.select([2, 0])) == 2


def test_rotations_are_new_classes() -> None:
    images = torch.arange(12).view(3, 2, 2)
    rotated = LabelledSet(images, torch.tensor([1, 2])).with_rotations()
    assert rotated.counts.tolist() == [1, 2] * 4
    for quarter in range(4):
        assert torch.equal(rotated.samples[3 * quarter : 3 * quarter + 3], torch.rot90(images, quarter, (1, 2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sinusoids(0, 1, 1), "tasks: expected 1 or more"),
        (lambda: Sinusoids(1, 1, 0), "queries: expected 1 or more"),
        (lambda: Sinusoids(1, 1, 1, ahead=0), "ahead: expected 1 or more"),
        (lambda: Episodes(toy_set([3, 3]), 1, 3, 1, 1), "ways: expected at most 2"),
        (lambda: Episodes(toy_set([3, 2]), 1, 2, 2, 1), "shots, queries: expected together at most 2"),
        (lambda: LabelledSet.from_labels(torch.zeros(3, 1), torch.zeros(2)), "labels: expected shape"),
        (lambda: LabelledSet(torch.zeros(3, 1), torch.tensor([2])), "counts: they sum to 2"),
        (lambda: LabelledSet(torch.zeros(3, 1), torch.tensor([3.0])), "counts: expected int64"),
        (lambda: LabelledSet(torch.zeros(3, 2, 1), torch.tensor([3])).with_rotations(), "rotations: expected square"),
        (lambda: Sinusoids(1, 1, 1).load_state_dict(Sinusoids(1, 1, 1, ahead=2).state_dict()), "ahead: the state"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- Omniglot ---------------------------------------------------------------------------------------


def drawing(number: int) -> bytes:
    """A 105 × 105 PNG of one bit, paper white, with `number` in its first pixels that survive the resizing."""
    paper = np.ones((105, 105), bool)
    kept = ((np.arange(28) + 0.5) * 3.75).astype(int)
    for bit in range(11):
        paper[kept[0], kept[bit]] = not number >> bit & 1
    file = io.BytesIO()
    Image.fromarray(paper).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def tiny_omniglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All characters with a drawing each: one part as a folder, the other as a zip."""
    root = tmp_path_factory.mktemp("omniglot")
    with zipfile.ZipFile(root / "images_evaluation.zip", "w") as archive:
        for number in range(omniglot.CHARACTERS):
            alphabet, character = divmod(number, 50)
            name = f"Alphabet{alphabet:02d}/character{character + 1:02d}/0001_01.png"
            if number < 40:
                path = root / "images_background" / name
                path.parent.mkdir(parents=True)
                path.write_bytes(drawing(number))
            else:
                archive.writestr(f"images_evaluation/{name}", drawing(number))
    return root


@pytest.fixture
def one_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omniglot, "DRAWINGS", 1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("one_drawing")
def test_omniglot_reads_the_official_layout(tiny_omniglot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiny_omniglot / "omniglot28.npz"
    cache.unlink(missing_ok=True)
    drawings, names = load_omniglot(tiny_omniglot)
    assert drawings.samples.shape == (1623, 28, 28)
    assert drawings.samples.dtype == torch.uint8
    assert names == sorted(names)
    assert names[0] == "Alphabet00/character01"
    numbers = (drawings.samples[:, 0, :11].int() << torch.arange(11)).sum(1)
    assert torch.equal(numbers, torch.arange(1623))
    assert drawings.samples[:, 1:].sum() == 0, "paper is 0"

    assert cache.stat().st_size < 300_000
    monkeypatch.setattr(omniglot, "_decode", lambda files: pytest.fail("decoded again"))
    again, _ = load_omniglot(tiny_omniglot)
    assert torch.equal(again.samples, drawings.samples)


@pytest.mark.usefixtures("one_drawing")
def test_omniglot_cache_that_is_broken_is_made_again(tiny_omniglot: Path) -> None:
    (tiny_omniglot / "omniglot28.npz").write_bytes(b"PK not really")
    assert len(load_omniglot(tiny_omniglot)[1]) == 1623
    assert np.load(tiny_omniglot / "omniglot28.npz")["counts"].sum() == 1623


@pytest.mark.usefixtures("one_drawing")
def test_omniglot_cache_of_a_read_only_folder_is_elsewhere(tiny_omniglot: Path, own_cache: Path) -> None:
    (tiny_omniglot / "omniglot28.npz").unlink(missing_ok=True)
    tiny_omniglot.chmod(0o555)
    try:
        load_omniglot(tiny_omniglot)
    finally:
        tiny_omniglot.chmod(0o755)
    assert not (tiny_omniglot / "omniglot28.npz").exists()
    assert len(list((own_cache / "maml_fast").glob("omniglot28-*.npz"))) == 1


def test_omniglot_missing_or_incomplete(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*images_background\.zip"):
        load_omniglot(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds neither images_background nor images_evaluation"):
        load_omniglot(tmp_path)
    (tmp_path / "images_background").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no images_evaluation"):
        load_omniglot(tmp_path)
    (tmp_path / "images_evaluation").mkdir()
    with pytest.raises(ValueError, match="expected 1623 characters of Omniglot, found 0"):
        load_omniglot(tmp_path)


def count_decodings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    done, decode = [], omniglot._decode

    def counted(sources: list[Path]) -> object:
        done.append(sources)
        return decode(sources)

    monkeypatch.setattr(omniglot, "_decode", counted)
    return done


@pytest.fixture
def three_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Omniglot as it would be with three characters of two drawings, unpacked."""
    monkeypatch.setattr(omniglot, "CHARACTERS", 3)
    monkeypatch.setattr(omniglot, "DRAWINGS", 2)
    root = tmp_path / "data"
    for number in range(6):
        part = "images_background" if number < 4 else "images_evaluation"
        path = root / part / f"Alphabet{part[7]}" / f"character{number // 2 + 1:02d}" / f"{number % 2 + 1:04d}_01.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawing(number))
    return root


def zipped(root: Path, part: str = "images_evaluation") -> Path:
    """Put a zip in the place of the part's folder."""
    path = root / f"{part}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((root / part).rglob("*.png")):
            archive.write(file, file.relative_to(root).as_posix())
    shutil.rmtree(root / part)
    return path


def tarred(root: Path, part: str = "images_evaluation", mode: str = "w:gz") -> Path:
    """Put a tar in the place of the part's folder."""
    path = root / f"{part}.tar"
    with tarfile.open(path, mode) as archive:
        archive.add(root / part, part)
    shutil.rmtree(root / part)
    return path


@pytest.mark.parametrize(
    "pack", [lambda root: root, zipped, tarred, *[partial(tarred, mode=f"w{m}") for m in ("", ":bz2", ":xz")]]
)
def test_omniglot_reads_folders_and_archives(pack: Callable[[Path], Path], three_characters: Path) -> None:
    pack(three_characters)
    drawings, names = load_omniglot(three_characters)
    assert names == ["Alphabetb/character01", "Alphabetb/character02", "Alphabete/character03"]
    assert ((drawings.samples[:, 0, :11].int() << torch.arange(11)).sum(1) == torch.arange(6)).all()


def lose_a_drawing(root: Path) -> None:
    next(root.rglob("0002_01.png")).unlink()


def lose_a_character(root: Path) -> None:
    shutil.rmtree(next(root.rglob("character02")))


def gain_a_drawing(root: Path) -> None:
    next(root.rglob("character02")).joinpath("0003_01.png").write_bytes(drawing(7))


def cut_a_drawing(root: Path, most: int = 60) -> None:
    path = next(root.rglob("0002_01.png"))
    path.write_bytes(path.read_bytes()[:most])


def cut_the_end_of_a_drawing(root: Path) -> None:
    cut_a_drawing(root, -1)


def empty_a_drawing(root: Path) -> None:
    next(root.rglob("0002_01.png")).write_bytes(b"")


def swap_a_drawing(root: Path) -> None:
    next(root.rglob("0002_01.png")).write_text("<html>not found</html>")


def flip_a_drawing(root: Path) -> None:
    path = next(root.rglob("0002_01.png"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def png_of_size(width: int, height: int) -> bytes:
    """A valid PNG that claims the size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def blow_a_drawing_up(root: Path) -> None:
    next(root.rglob("0002_01.png")).write_bytes(png_of_size(60_000, 60_000))


def flatten_a_drawing(root: Path) -> None:
    next(root.rglob("0002_01.png")).write_bytes(png_of_size(0, 105))


def pipe_for_a_drawing(root: Path) -> None:
    path = next(root.rglob("0002_01.png"))
    path.unlink()
    os.mkfifo(path)


def device_for_a_drawing(root: Path) -> None:
    path = next(root.rglob("0002_01.png"))
    path.unlink()
    path.symlink_to("/dev/zero")


def fill_a_drawing(root: Path) -> None:
    os.truncate(next(root.rglob("0002_01.png")), 1 << 40)


DAMAGES_OF_FOLDERS = {
    lose_a_drawing: "expected 2 drawings of each character, found 1 of Alphabet",
    lose_a_character: "expected 3 characters of Omniglot, found 2",
    gain_a_drawing: "expected 2 drawings of each character, found 3 of Alphabetb/character02",
    cut_a_drawing: r"0002_01\.png: damaged: its end is missing",
    cut_the_end_of_a_drawing: r"0002_01\.png: damaged: its end is missing",
    empty_a_drawing: r"0002_01\.png: expected a PNG image",
    swap_a_drawing: r"0002_01\.png: expected a PNG image",
    flip_a_drawing: r"0002_01\.png: damaged: ",
    blow_a_drawing_up: r"0002_01\.png: expected at most 1024 pixels a side, got 60000 × 60000",
    flatten_a_drawing: r"0002_01\.png: expected at most 1024 pixels a side, got 0 × 105",
    pipe_for_a_drawing: r"0002_01\.png: expected a regular file",
    device_for_a_drawing: r"0002_01\.png: expected a regular file",
    fill_a_drawing: r"0002_01\.png: expected at most 262144 bytes",
}


@pytest.mark.parametrize("damage", DAMAGES_OF_FOLDERS)
def test_omniglot_that_is_not_whole_is_told_of_and_not_cached(
    damage: Callable[[Path], None], three_characters: Path, own_cache: Path
) -> None:
    damage(three_characters)
    with pytest.raises(ValueError, match=DAMAGES_OF_FOLDERS[damage]):
        load_omniglot(three_characters)
    assert not list(three_characters.rglob("*.npz"))
    assert not own_cache.exists()


def add_to_zip(path: Path, name: str, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr(name, content)


def cut_archive(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty_archive(path: Path) -> None:
    os.truncate(path, 0)


def flip_archive(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(100, len(content), 150):
        content[place] ^= 85
    path.write_bytes(content)


def html_archive(path: Path) -> None:
    path.write_text("<html>not found</html>" * 100)


DAMAGES_OF_ARCHIVES = [cut_archive, empty_archive, flip_archive, html_archive]
CHARACTER = "images_evaluation/Alphabete/character03"
DAMAGES_OF_ZIPS = {
    "large": (lambda path: add_to_zip(path, f"{CHARACTER}/3.png", bytes(1 << 28)), "3.png has more than 262144 bytes"),
    "many": (
        lambda path: [add_to_zip(path, f"more/{i}.png", bytes(1 << 18)) for i in range(9)],
        "it unpacks to more than 2000000 bytes",
    ),
    "unbounded": (
        lambda path: add_to_zip(path, f"{CHARACTER}/3.png", bytes(1 << 20), zipfile.ZIP_BZIP2),
        "3.png is compressed in an unusual way",
    ),
    "above": (lambda path: add_to_zip(path, f"../../{CHARACTER}/3.png", drawing(1)), "leads out of it"),
    "absolute": (lambda path: add_to_zip(path, f"/{CHARACTER}/3.png", drawing(1)), "leads out of it"),
    "within": (lambda path: add_to_zip(path, "images_evaluation/../character03/3.png", drawing(1)), "leads out of it"),
    "bomb": (lambda path: add_to_zip(path, f"{CHARACTER}/3.png", png_of_size(1 << 30, 1 << 30)), "pixels a side"),
    "twice": (lambda path: add_to_zip(path, f"{CHARACTER}/3.png", drawing(1)), "found 3 of Alphabete/character03"),
}


@pytest.mark.parametrize("damage", DAMAGES_OF_ARCHIVES)
@pytest.mark.parametrize("pack", [zipped, tarred, partial(tarred, mode="w")])
def test_omniglot_in_a_damaged_archive_is_told_of(
    damage: Callable[[Path], None], pack: Callable[[Path], Path], three_characters: Path
) -> None:
    path = pack(three_characters)
    damage(path)
    # a plain tar has no checksum of its contents, and may end anywhere: then drawings are damaged or missing
    with pytest.raises(ValueError, match=rf"^data: ({path}: |expected )"):
        load_omniglot(three_characters)
    assert not list(three_characters.rglob("*.npz"))


@pytest.mark.parametrize("damage", DAMAGES_OF_ZIPS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_omniglot_in_a_zip_that_means_harm_is_told_of(
    damage: str, three_characters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zipped(three_characters)
    monkeypatch.setattr(archives, "LARGEST_ARCHIVE", 2_000_000)
    harm, message = DAMAGES_OF_ZIPS[damage]
    harm(path)
    with pytest.raises(ValueError, match=f"data: .*{re.escape(message)}"):
        load_omniglot(three_characters)


@pytest.mark.parametrize("kind", ["huge file", "huge header", "huge other file", "above", "link"])
def test_omniglot_in_a_tar_that_means_harm_is_told_of(
    kind: str, three_characters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "LARGEST_ARCHIVE", 2_000_000)
    member = tarfile.TarInfo(f"{CHARACTER}/3.png")
    if kind == "huge header":
        member.type = tarfile.GNUTYPE_LONGNAME
    elif kind == "huge other file":
        member.name = "README"
    elif kind == "above":
        member.name = f"../{member.name}"
    elif kind == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "/dev/zero"
        next(three_characters.rglob("character03/0002_01.png")).unlink()
    path = tarred(three_characters, mode="w")
    member.size = 0 if kind == "link" else 100 if kind == "above" else 1 << 22
    content = path.read_bytes().rstrip(b"\0")
    content = content.ljust(-(-len(content) // 512) * 512, b"\0") + member.tobuf() + bytes(member.size)
    path.write_bytes(gzip.compress(content + bytes(10240)))
    messages = {"above": "leads out of it", "link": "found 1 of Alphabete/character03"}
    with pytest.raises(ValueError, match=messages.get(kind, "unpacks to more|has more than")):
        load_omniglot(three_characters)


def test_what_a_mac_adds_to_archives_is_left_out(three_characters: Path) -> None:
    path = zipped(three_characters)
    add_to_zip(path, f"__MACOSX/{CHARACTER}/._0001_01.png", b"Mac OS X")
    assert len(load_omniglot(three_characters)[1]) == 3


def test_cache_is_of_the_data_as_it_is(three_characters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decodings(monkeypatch)
    for _ in range(2):
        load_omniglot(three_characters)
        assert len(decoded) == 1
    (three_characters / CHARACTER / "0002_01.png").rename(three_characters / CHARACTER / "0003_01.png")
    load_omniglot(three_characters)
    assert len(decoded) == 2
    lose_a_drawing(three_characters)
    with pytest.raises(ValueError, match="found 1 of"):
        load_omniglot(three_characters)


def rewrite(cache: Path, **changes: Any) -> None:
    with np.load(cache) as file:
        arrays = {name: file[name] for name in file} | changes
    np.savez_compressed(cache, **arrays)


def rewrite_with_pickle(cache: Path) -> None:
    rewrite(cache, names=np.array([Path("a")] * 3, object))


DAMAGES_OF_CACHES = {
    "half": lambda cache: rewrite(cache, counts=np.array([2, 2, 1]), bits=np.zeros((5, 98), np.uint8)),
    "fewer rows": lambda cache: rewrite(cache, bits=np.zeros((5, 98), np.uint8)),
    "other dtype": lambda cache: rewrite(cache, bits=np.zeros((6, 98))),
    "other shape": lambda cache: rewrite(cache, counts=np.array([[2, 2, 2]])),
    "pickle": rewrite_with_pickle,
    "large": lambda cache: rewrite(cache, more=np.zeros(1 << 26, np.uint8)),
    "cut": cut_archive,
    "empty": empty_archive,
    "flipped": flip_archive,
}


@pytest.mark.parametrize("damage", DAMAGES_OF_CACHES)
def test_cache_that_is_not_whole_is_not_trusted(
    damage: str, three_characters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = load_omniglot(three_characters)
    DAMAGES_OF_CACHES[damage](three_characters / "omniglot28.npz")
    decoded = count_decodings(monkeypatch)
    after, _ = load_omniglot(three_characters)
    assert torch.equal(before.samples, after.samples)
    assert len(decoded) == 1
    load_omniglot(three_characters)
    assert len(decoded) == 1


def test_cache_that_a_full_disk_refuses_is_done_without(
    three_characters: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, write: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(omniglot, "write_atomically", full)
    assert len(load_omniglot(three_characters)[1]) == 3
    assert "will be decoded every time" in caplog.text


def test_folder_that_cannot_be_listed_is_named(three_characters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, listing = str(three_characters / CHARACTER), os.scandir

    def scandir(path: str) -> object:
        if str(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", closed)
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="character03"):
        load_omniglot(three_characters)


def test_random_split_is_the_papers_size_and_fixed() -> None:
    names = [str(n) for n in range(1623)]
    parts = split_omniglot(names)
    assert {name: len(part) for name, part in parts.items()} == {"train": 1100, "val": 100, "test": 423}
    assert sorted(chain.from_iterable(parts.values())) == list(range(1623))
    assert split_omniglot(names) == parts
    assert split_omniglot(names, seed=1) != parts


def test_vinyals_split_reads_text_files(tmp_path: Path) -> None:
    names = ["A/character01", "A/character02", "B/character01"]
    for part, listed in {"train": "A/character01", "val": "B/character01", "test": "A/character02"}.items():
        (tmp_path / f"{part}.txt").write_text("".join(f"{listed}/rot{angle:03d}\n" for angle in (0, 90, 180, 270)))
    assert split_omniglot(names, "vinyals", folder=tmp_path) == {"train": [0], "val": [2], "test": [1]}
    (tmp_path / "val.txt").write_text("A/character01")
    with pytest.raises(ValueError, match=r"train\.txt and val\.txt in .* both list A/character01"):
        split_omniglot(names, "vinyals", folder=tmp_path)
    for content, message in ((b"", r"val\.txt lists no characters"), (b"\xff\xfe", r"val\.txt: expected a text file")):
        (tmp_path / "val.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            split_omniglot(names, "vinyals", folder=tmp_path)
    (tmp_path / "val.txt").write_text("B/character01")
    with pytest.raises(ValueError, match="lists A/character02"):
        split_omniglot(names[:1] + names[2:], "vinyals", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="split: the vinyals split needs a folder"):
        split_omniglot(names, "vinyals")
    with pytest.raises(ValueError, match="split: expected one of random, vinyals"):
        split_omniglot(names, "mine")


@pytest.fixture(scope="module")
def real_omniglot(tmp_path_factory: pytest.TempPathFactory) -> tuple[LabelledSet, list[str]]:
    if not (DATA / "omniglot").is_dir():
        pytest.skip(f"no omniglot in {DATA}: set MAML_FAST_DATA to the folder of the real data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return load_omniglot(DATA)


@pytest.mark.slow
def test_omniglot_equals_the_authors_resizing(real_omniglot: tuple[LabelledSet, list[str]]) -> None:
    bits = DATA / "omniglot" / "omniglot28_maml_bits.npz"
    if not bits.exists():
        pytest.skip(f"no {bits} to compare with: set MAML_FAST_DATA to the folder of the real data")
    drawings, names = real_omniglot
    with np.load(bits) as file:
        images = np.unpackbits(file["bits"], axis=-1).reshape(1623, 20, 28, 28)
        alphabets = [name.split("/")[1] for name in file["alphabets"]]
        listed = [
            f"{alphabets[a]}/character{c:02d}"
            for a, c in zip(file["char_alphabet"], file["char_in_alphabet"], strict=True)
        ]
    order = np.argsort(listed)
    assert [listed[i] for i in order] == names
    assert torch.equal(drawings.samples, torch.from_numpy(images[order]).flatten(0, 1))
    assert set(drawings.counts.tolist()) == {20}


@pytest.mark.slow
def test_vinyals_split_of_the_real_characters(real_omniglot: tuple[LabelledSet, list[str]]) -> None:
    folder = omniglot.find_split_folder(DATA)
    if folder is None:
        pytest.skip(f"no splits in {DATA}: set MAML_FAST_DATA to the folder of the real data")
    parts = split_omniglot(real_omniglot[1], "vinyals", folder=folder)
    assert {name: len(part) for name, part in parts.items()} == {"train": 1028, "val": 172, "test": 423}
    assert sorted(chain.from_iterable(parts.values())) == list(range(1623))
