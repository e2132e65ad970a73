"""Every instruction set: it can be forced, it runs, it agrees, and its instructions stay where they belong."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import ModuleType

import pytest
import torch

from maml_fast.cases import Case, select
from maml_fast.checking import verify

ISAS = ("baseline", "avx2", "avx512")
NAMES = [
    "batchnorm-deep",
    "branches",
    "gelu",
    "loss-cross-entropy-smoothed",
    "size-65",
    "rate-per_element",
    "siren-small",
    "conv-everything",
    "conv-groups",
    "groupnorm",
    "maxpool-overlapping",
    "conv4",
    "resnet12",
    "elementary",
    "chosen",
    "attended",
    "reduced",
    "computed-filters",
]
CASES = select(NAMES)
ALONE = [replace(case, tasks=1) for case in select(["strided", "conv4", "groupnorm", "maxpool-overlapping"])]
DTYPES = [torch.float32, torch.float64]

each_isa = pytest.mark.parametrize("isa", ISAS)
each_case = pytest.mark.parametrize("case", CASES, ids=NAMES)


@pytest.fixture
def forced(isa: str, core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction set, forced by name."""
    if isa not in core.available():
        pytest.skip(f"this processor has no {isa}, only {', '.join(core.available())}")
    monkeypatch.setenv("MAML_FAST_ISA", isa)
    return isa


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(case: Case, dtype: torch.dtype = torch.float32) -> list[bytes]:
    """Everything a call can return, as bytes; a new plan each time."""
    results = verify.observe(case.build(dtype), "cpu", first_order=False)
    return [t.detach().contiguous().numpy().tobytes() for values in results.values() for t in values]


@each_isa
def test_forced_by_name(forced: str, core: ModuleType) -> None:
    assert core.choose() == forced
    assert core.available()[0] == "baseline"


@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
def test_widest_by_default(value: str | None, core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAML_FAST_ISA", value or "")
    if value is None:
        monkeypatch.delenv("MAML_FAST_ISA")
    assert core.choose() == core.available()[-1]


@pytest.mark.parametrize("name", ["avx", "AVX2", "avx1024"])
def test_unknown_name_is_an_error(name: str, core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAML_FAST_ISA", name)
    expected = f"MAML_FAST_ISA: expected one of baseline.*got '{name}'"
    with pytest.raises(RuntimeError, match=expected):
        core.choose()
    with pytest.raises(RuntimeError, match=expected):
        bits(CASES[0])


@each_isa
@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_matches_the_reference(forced: str, case: Case, dtype: torch.dtype) -> None:
    errors = verify.compare(case, "cpu", dtype, first_order=False)
    assert not [e for e in errors if not e.ok]


@each_isa
@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_same_bits_for_any_number_of_threads(forced: str, case: Case, dtype: torch.dtype) -> None:
    with threads(1):
        alone = bits(case, dtype)
    for count in (1, 2, 5):
        with threads(count):
            assert bits(case, dtype) == alone, f"{count} threads"


@each_isa
@pytest.mark.parametrize("case", ALONE, ids=lambda c: c.name)
def test_same_bits_where_threads_share_the_task(forced: str, case: Case) -> None:
    with threads(1):
        alone = bits(case)
    with threads(3):
        assert bits(case) == alone


def test_another_name_runs_other_code(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that a plan holds tell the width of their own vectors."""
    seen = {}
    for isa in core.available():
        monkeypatch.setenv("MAML_FAST_ISA", isa)
        problem = select(["size-65"])[0].build(torch.float32)
        maml = problem.maml("cpu")
        maml.backward(*problem.batch)
        (call,) = maml._preparer.plans()
        seen[isa] = call.plan.state["cpu"].core.lanes
    widths = {"baseline": 4, "avx2": 8, "avx512": 16}
    assert seen == {isa: widths[isa] for isa in core.available()}


@pytest.mark.no_sanitizer  # unoptimised code contracts nothing
def test_fused_multiply_adds_give_other_bits(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if core.available() == ["baseline"]:
        pytest.skip("this processor runs the baseline code only")
    case, seen = select(["size-65"])[0], set()
    for isa in core.available()[:2]:
        monkeypatch.setenv("MAML_FAST_ISA", isa)
        seen.add(tuple(bits(case)))
    assert len(seen) == 2


# ---- what the machine code says ----------------------------------------------------------------


@cache
def instructions(library: str) -> dict[str, set[str]]:
    """Registers and VEX mnemonics by the source file, of csrc/isa/*.cpp or "" for all others, that they stem from."""
    symbols = subprocess.run(["readelf", "-Ws", library], check=True, capture_output=True, text=True).stdout
    ranges, file = [], ""
    for line in symbols.partition("'.symtab'")[2].splitlines():
        columns = line.split(maxsplit=7)
        if len(columns) < 4 or not columns[0][:-1].isdigit():
            continue
        name = columns[7] if len(columns) > 7 else ""
        if columns[3] == "FILE":
            file = name.removesuffix(".cpp") if name.removesuffix(".cpp") in ISAS else ""
        elif columns[3] == "FUNC" and columns[6] != "UND":
            face = re.search(r"kernels_(baseline|avx2|avx512)E[fd]$", name)
            start = int(columns[1], 16)
            ranges.append((start, start + int(columns[2], 0), face[1] if face else file))
    assert {owner for *_, owner in ranges} >= set(ISAS), f"{library} has no symbols of csrc/isa: stripped?"
    ranges.sort()
    starts = [start for start, *_ in ranges]

    found: dict[str, set[str]] = {owner: set() for owner in ("", *ISAS)}
    code = subprocess.run(["objdump", "-dw", "--no-show-raw-insn", library], check=True, capture_output=True, text=True)
    for address, mnemonic, operands in re.findall(r"^ *([0-9a-f]+):\t(\S+)(.*)$", code.stdout, re.MULTILINE):
        at = bisect_right(starts, int(address, 16)) - 1
        owner = ranges[at][2] if at >= 0 and int(address, 16) < ranges[at][1] else ""
        found[owner].update(re.findall(r"%([xyz]mm|k[1-7]\b)", operands))
        if mnemonic.startswith("v"):
            found[owner].add(mnemonic)
    return found


@pytest.mark.no_sanitizer
def test_wide_instructions_stay_in_their_file(core: ModuleType) -> None:
    """Nothing that every processor runs was compiled with the flags of some: not even an inline function's copy."""
    if platform.machine() != "x86_64":
        pytest.skip("one instruction set only")
    if not shutil.which("objdump") or not shutil.which("readelf"):
        pytest.skip("no objdump and readelf")
    found = instructions(str(core.__file__))
    for everybody in ("", "baseline"):
        assert found[everybody] <= {"xmm"}, f"csrc/isa/{everybody}.cpp" if everybody else "outside csrc/isa"
    assert {"ymm", "vfmadd231ps"} <= found["avx2"]
    assert not found["avx2"] & {"zmm", "k1"}
    assert {"zmm", "vfmadd231ps"} <= found["avx512"]
