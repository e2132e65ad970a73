"""Omniglot (Lake et al., 2015) at 28 × 28, read from its official layout."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .episodes import LabelledSet

SIZE = 28
CHARACTERS = 1623
RANDOM_SPLIT = {"train": 1100, "val": 100, "test": 423}
SPLITS = ("random", "vinyals")

_PARTS = ("images_background", "images_evaluation")
_PNG = re.compile(rf"(?:^|/)(?:{'|'.join(_PARTS)})/([^/]+/character\d+)/[^/]+\.png$")
_HOW_TO_GET = (
    "Omniglot's official files are images_background.zip and images_evaluation.zip from "
    "https://github.com/brendenlake/omniglot/tree/master/python. Put both into one folder, "
    "zipped or unpacked, and name it with --data or MAML_FAST_DATA"
)
_log = logging.getLogger(__name__)


def load_omniglot(folder: Path) -> tuple[LabelledSet, list[str]]:
    """All 1 623 characters, 20 drawings each.

    Drawings are reduced from 105 to 28 pixels as MAML's authors did: nearest neighbour, rows and columns
    ⌊(i + ½) 105/28⌋. Decoding happens once; the result is cached beside the data, or in the user's cache
    folder where that cannot be written.

    Args:
        folder: holds `images_background` and `images_evaluation` as folders or as archives
            (.zip, .tar, .tar.gz, .tar.xz …; one archive may hold both), itself or in `omniglot/`.

    Returns:
        uint8 samples (32 460, 28, 28), ink 1 and paper 0; and the characters' names
        `Alphabet/characterNN`, sorted.

    Raises:
        FileNotFoundError: the folder or a part of the data is missing; says where to get it.
        ValueError: the data is not the whole of Omniglot.
    """
    sources = _find_sources(Path(folder))
    key = _fingerprint(sources)
    beside = sources[0].parent / "omniglot28.npz"
    elsewhere = _user_cache() / f"omniglot28-{key[:16]}.npz"
    for cache in (beside, elsewhere):
        if (cached := _read_cache(cache, key)) is not None:
            return cached
    _log.info("decoding Omniglot from %s (once)", ", ".join(str(s) for s in sources))
    images, counts, names = _decode(_drawings(sources))
    if len(names) != CHARACTERS:
        raise ValueError(f"data: expected {CHARACTERS} characters of Omniglot, found {len(names)} in {folder}")
    bits = np.packbits(images.reshape(len(images), -1), axis=1)
    packed = {"bits": bits, "counts": counts, "names": names, "key": key}
    if not any(_write_cache(cache, packed) for cache in (beside, elsewhere)):
        _log.warning("neither %s nor %s can be written: Omniglot will be decoded every time", beside, elsewhere)
    return _labelled(images, counts, names)


def split_omniglot(
    names: list[str], split: str = "random", seed: int = 0, folder: Path | None = None
) -> dict[str, list[int]]:
    """Disjoint classes for meta-training, validation and test.

    Args:
        names: the characters' names, as `load_omniglot` returns them.
        split: `"random"` (1100/100/423 characters, as MAML) or `"vinyals"` (1028/172/423, by text files).
        seed: of the random split.
        folder: of the text files `train.txt`, `val.txt` and `test.txt` with lines
            `Alphabet/characterNN[/rotRRR]`.

    Returns:
        For `"train"`, `"val"` and `"test"` the indices into `names`.

    Raises:
        ValueError: unknown split, wrong number of names, or a listed name that is unknown.
        FileNotFoundError: a text file is missing.
    """
    if split == "random":
        if len(names) != CHARACTERS:
            raise ValueError(f"names: expected {CHARACTERS} characters, got {len(names)}")
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        parts = order.split(list(RANDOM_SPLIT.values()))
        return {name: sorted(part.tolist()) for name, part in zip(RANDOM_SPLIT, parts, strict=True)}
    if split == "vinyals":
        return {name: _listed(names, folder, name) for name in RANDOM_SPLIT}
    raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")


def find_split_folder(data: Path) -> Path | None:
    """Where the text files of Vinyals' split lie in or beside the data folder, if they do."""
    places = [base / place for base in (data, data.parent) for place in ("splits/omniglot_vinyals", "splits/vinyals")]
    return next((place for place in places if (place / "train.txt").is_file()), None)


# ---- finding and reading the drawings ---------------------------------------------------------------


def _find_sources(folder: Path) -> list[Path]:
    """The folders or archives that together hold both parts."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data: no folder {folder}. {_HOW_TO_GET}.")
    for base in (folder, folder / "omniglot"):
        parts = [_part(base, part) for part in _PARTS]
        if all(parts):
            return [p for p in parts if p is not None]
        if any(parts):
            missing = next(name for name, found in zip(_PARTS, parts, strict=True) if found is None)
            raise FileNotFoundError(f"data: {base} holds no {missing}, only the other part. {_HOW_TO_GET}.")
        if both := sorted(base.glob("omniglot*.tar*")) + sorted(base.glob("omniglot*.zip")):
            return both[:1]
    raise FileNotFoundError(f"data: {folder} holds neither {' nor '.join(_PARTS)}. {_HOW_TO_GET}.")


def _part(base: Path, name: str) -> Path | None:
    if (base / name).is_dir():
        return base / name
    archives = [base / f"{name}.zip", *sorted(base.glob(f"{name}.tar*"))]
    return next((archive for archive in archives if archive.is_file()), None)


def _drawings(sources: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """(path, PNG file) of every file in the sources; paths start in or above the part's folder."""
    for source in sources:
        if source.is_dir():
            for path in source.rglob("*.png"):
                yield path.relative_to(source.parent).as_posix(), path.read_bytes()
        elif source.suffix == ".zip":
            with zipfile.ZipFile(source) as archive:
                for name in archive.namelist():
                    if name.endswith(".png"):
                        yield name, archive.read(name)
        else:
            with tarfile.open(source) as tar:
                for member in tar:
                    if member.isfile() and (file := tar.extractfile(member)) is not None:
                        yield member.name, file.read()


def _decode(files: Iterable[tuple[str, bytes]]) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.str_]]:
    """Images (M, 28, 28) sorted by character and file, counts (C,) and names (C,) of the characters."""
    found = []
    for path, png in files:
        if match := _PNG.search(path):
            found.append((match[1], path.rsplit("/", 1)[1], _shrink(png)))
    found.sort(key=lambda drawing: drawing[:2])
    names, counts = np.unique([name for name, _, _ in found], return_counts=True)
    images = np.stack([image for _, _, image in found]) if found else np.empty((0, SIZE, SIZE), np.uint8)
    return images, counts.astype(np.int64), names


def _shrink(png: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        ink = np.asarray(image.convert("L")) < 128
    rows, columns = (((np.arange(SIZE) + 0.5) * (side / SIZE)).astype(np.int64) for side in ink.shape)
    return ink[np.ix_(rows, columns)].astype(np.uint8)


# ---- the cache --------------------------------------------------------------------------------------


def _fingerprint(sources: list[Path]) -> str:
    """Changes when a source is moved, replaced, or (for a folder) gains or loses an alphabet."""
    facts = [(str(s.resolve()), s.stat().st_mtime_ns, s.stat().st_size) for s in sources]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maml_fast"


def _read_cache(path: Path, key: str) -> tuple[LabelledSet, list[str]] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            images = np.unpackbits(file["bits"], axis=1, count=SIZE * SIZE).reshape(-1, SIZE, SIZE)
            return _labelled(images, file["counts"], file["names"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _write_cache(path: Path, arrays: dict[str, object]) -> bool:
    """Write atomically, so that a reader or a crash never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Asked of the mode, because root may write where the owner of the data said no.
        if not path.parent.stat().st_mode & stat.S_IWUSR:
            return False
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def _labelled(
    images: NDArray[np.uint8], counts: NDArray[np.int64], names: NDArray[np.str_]
) -> tuple[LabelledSet, list[str]]:
    return LabelledSet(torch.from_numpy(images), torch.from_numpy(counts)), [str(name) for name in names]


# ---- splits -----------------------------------------------------------------------------------------


def _listed(names: list[str], folder: Path | None, part: str) -> list[int]:
    path = None if folder is None else folder / f"{part}.txt"
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"split: the vinyals split needs a folder with train.txt, val.txt and test.txt, got {folder}; "
            "https://github.com/jakesnell/prototypical-networks has them in data/omniglot/splits/vinyals"
        )
    index = {name: i for i, name in enumerate(names)}
    characters = {"/".join(line.split("/")[:2]) for line in path.read_text().split()}
    if unknown := characters - set(index):
        raise ValueError(f"split: {path} lists {min(unknown)}, which the data does not hold")
    return sorted(index[character] for character in characters)
