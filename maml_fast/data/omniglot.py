"""Omniglot (Lake et al., 2015) at 28 × 28, read from its official layout."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .archives import files_of
from .episodes import LabelledSet
from .storage import read_regular, remove_temporaries, write_atomically

SIZE = 28
CHARACTERS = 1623
DRAWINGS = 20
"""Of each character."""
LARGEST_SIDE = 1024
"""Pixels of a drawing's side; Omniglot's have 105."""
LARGEST_LIST = 1 << 22
"""Bytes of a text file of a split."""
LARGEST_CACHE = 1 << 25
"""Bytes of the cached data, packed or not."""
RANDOM_SPLIT = {"train": 1100, "val": 100, "test": 423}
SPLITS = ("random", "vinyals")

_PARTS = ("images_background", "images_evaluation")
_PNG = re.compile(rf"(?:^|/)(?:{'|'.join(_PARTS)})/([^/]+/character\d+)/[^/.][^/]*\.png$")
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
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
        ValueError: the data is not the whole of Omniglot, or damaged; the message names the file.
        OSError: something cannot be read; the error names it.
    """
    sources = _find_sources(Path(folder))
    key = _fingerprint(sources)
    beside = sources[0].parent / "omniglot28.npz"
    elsewhere = _user_cache() / f"omniglot28-{key[:16]}.npz"
    for cache in (beside, elsewhere):
        if (cached := _read_cache(cache, key)) is not None:
            return cached
    _log.info("decoding Omniglot from %s (once)", ", ".join(str(s) for s in sources))
    images, counts, names = _decode(sources)
    _check_whole(counts, names, folder)
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
        ValueError: unknown split, wrong number of names, or a listed name that is unknown or in two parts.
        FileNotFoundError: a text file is missing.
    """
    if split == "random":
        if len(names) != CHARACTERS:
            raise ValueError(f"names: expected {CHARACTERS} characters, got {len(names)}")
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        parts = order.split(list(RANDOM_SPLIT.values()))
        return {name: sorted(part.tolist()) for name, part in zip(RANDOM_SPLIT, parts, strict=True)}
    if split == "vinyals":
        found = {name: _listed(names, folder, name) for name in RANDOM_SPLIT}
        for one, other in combinations(found, 2):
            if common := set(found[one]) & set(found[other]):
                raise ValueError(f"split: {one}.txt and {other}.txt in {folder} both list {names[min(common)]}")
        return found
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


def _decode(sources: Iterable[Path]) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.str_]]:
    """Images (M, 28, 28) sorted by character and file, counts (C,) and names (C,) of the characters."""
    found = []
    for source in sources:
        for path, png in files_of(source, ".png"):
            if match := _PNG.search(path):
                found.append((match[1], path.rsplit("/", 1)[1], _shrink(png, f"{source}: {path}")))
    found.sort(key=lambda drawing: drawing[:2])
    names, counts = np.unique([name for name, _, _ in found], return_counts=True)
    images = np.stack([image for _, _, image in found]) if found else np.empty((0, SIZE, SIZE), np.uint8)
    return images, counts.astype(np.int64), names


def _check_whole(counts: NDArray[np.int64], names: NDArray[np.str_], folder: Path) -> None:
    """Refuse a data set that is still being unpacked, or mixed with another."""
    if len(names) != CHARACTERS:
        raise ValueError(f"data: expected {CHARACTERS} characters of Omniglot, found {len(names)} in {folder}")
    for name, count in zip(names, counts, strict=True):
        if count != DRAWINGS:
            raise ValueError(
                f"data: expected {DRAWINGS} drawings of each character, found {count} of {name} in {folder}"
            )


def _shrink(png: bytes, name: str) -> NDArray[np.uint8]:
    from PIL import Image

    # A PNG's first chunk holds its size: Pillow would reserve the memory of all its pixels
    if not png.startswith(_PNG_START) or png[12:16] != b"IHDR":
        raise ValueError(f"data: {name}: expected a PNG image")
    if not png.endswith(_PNG_END):
        raise ValueError(f"data: {name}: damaged: its end is missing")
    width, height = struct.unpack(">II", png[16:24].ljust(8, b"\0"))
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
        raise ValueError(f"data: {name}: expected at most {LARGEST_SIDE} pixels a side, got {width} × {height}")
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            ink = np.asarray(image.convert("L")) < 128
    except Exception as error:  # what Pillow raises on damaged files is not its promise
        raise ValueError(f"data: {name}: damaged: {error}") from error
    rows, columns = (((np.arange(SIZE) + 0.5) * (side / SIZE)).astype(np.int64) for side in ink.shape)
    return ink[np.ix_(rows, columns)].astype(np.uint8)


# ---- the cache --------------------------------------------------------------------------------------


def _fingerprint(sources: list[Path]) -> str:
    """Changes when a source is moved or replaced, or a folder of it gains or loses a file."""
    facts = [(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in _dated(sources)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _dated(sources: list[Path]) -> Iterator[Path]:
    """The archives; of folders, also the alphabets and characters in them: a folder's date is that of its names."""
    for source in sources:
        yield source
        if source.is_dir():
            yield from sorted(source.glob("*/"))
            yield from sorted(source.glob("*/character*/"))


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maml_fast"


def _read_cache(path: Path, key: str) -> tuple[LabelledSet, list[str]] | None:
    """The data set, if the file is intact, whole, and of these sources."""
    try:
        content = read_regular(path, LARGEST_CACHE)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST_CACHE or archive.testzip() is not None:
                return None
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            bits, counts, names = (np.asarray(file[name]) for name in ("bits", "counts", "names"))
        _check_whole(counts, names, path)
        images = np.unpackbits(bits, axis=1, count=SIZE * SIZE).reshape(CHARACTERS * DRAWINGS, SIZE, SIZE)
        return _labelled(images, counts, names)
    except Exception:  # whatever a damaged file makes its readers raise: the cache is made again
        return None


def _write_cache(path: Path, arrays: dict[str, object]) -> bool:
    """Whether the cache could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Asked of the mode, because root may write where the owner of the data said no.
        if not path.parent.stat().st_mode & stat.S_IWUSR:
            return False
        remove_temporaries(path.parent, [path.name])
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]
    except OSError:
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
    characters = {"/".join(line.split("/")[:2]) for line in _text(path).split()}
    if not characters:
        raise ValueError(f"split: {path} lists no characters")
    if unknown := characters - set(index):
        raise ValueError(f"split: {path} lists {min(unknown)}, which the data does not hold")
    return sorted(index[character] for character in characters)


def _text(path: Path) -> str:
    content = read_regular(path, LARGEST_LIST)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"split: {path}: expected a text file, got {error}") from error
