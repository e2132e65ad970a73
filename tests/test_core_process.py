"""The core and the process around it: several Python threads, fork, exit, and a package without the core."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import torch

import maml_fast
from maml_fast.cases import Case, select
from maml_fast.checking import verify

CASES = select(["size-tasks", "batchnorm-deep", "loss-cross-entropy", "rate-per_element"])
PACKAGE = Path(maml_fast.__file__).resolve().parent


def run_python(source: str, *, cwd: Path, package: Path = PACKAGE, **environment: str) -> str:
    """Output of a fresh interpreter that imports the given copy of the package."""
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(source)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, f"exit status {ran.returncode}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


# ---- several Python threads --------------------------------------------------------------------


def gradients(leaves: list[torch.nn.Parameter], maml: maml_fast.MAML, batch: tuple[torch.Tensor, ...]) -> list[bytes]:
    """The loss and its meta-gradient, as bytes. A capture in another thread exchanges what model.parameters() gives."""
    loss = maml.meta_loss(*batch)
    results = [loss, *torch.autograd.grad(loss, leaves)]
    return [t.detach().numpy().tobytes() for t in results]


def in_threads(count: int, work: object) -> None:
    """Run `work(index)` in that many threads, all started at once; raise what one of them raised."""
    barrier, errors = threading.Barrier(count), []

    def body(index: int) -> None:
        try:
            barrier.wait(timeout=60)
            work(index)  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


def test_threads_with_a_module_each(core: ModuleType) -> None:
    problems = [case.build(torch.float32, seed=i) for i, case in enumerate(CASES)]
    mamls = [problem.maml("cpu") for problem in problems]
    leaves = [list(problem.model.parameters()) for problem in problems]
    serial = [gradients(list(p.model.parameters()), m, p.batch) for p, m in zip(problems, mamls, strict=True)]

    def work(index: int) -> None:
        problem, maml = problems[index], mamls[index]
        for _ in range(50):
            assert gradients(leaves[index], maml, problem.batch) == serial[index]

    in_threads(len(CASES), work)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_threads_that_share_a_module(case: Case, core: ModuleType) -> None:
    problem = case.build(torch.float32)
    maml = problem.maml("cpu")
    leaves = list(problem.model.parameters())
    batches = [case.build(torch.float32, seed=seed).batch for seed in range(4)]
    serial = [gradients(leaves, maml, batch) for batch in batches]
    assert len(set(map(tuple, serial))) == len(batches)

    def work(index: int) -> None:
        for i in range(40):
            k = (index + i) % len(batches)
            assert gradients(leaves, maml, batches[k]) == serial[k]

    in_threads(4, work)


def test_threads_share_a_module_from_the_first_call(core: ModuleType) -> None:
    """Plans are made and cached on the first call: four first calls at once."""
    case = CASES[0]
    problem = case.build(torch.float32)
    leaves = list(problem.model.parameters())
    serial = gradients(leaves, problem.maml("cpu"), problem.batch)
    for _ in range(10):
        maml = problem.maml("cpu")
        in_threads(4, lambda _: check(gradients(leaves, maml, problem.batch) == serial))  # noqa: B023


BEGUN, GO_ON = threading.Event(), threading.Event()


def pause() -> None:
    """Tell that forward has begun, and go on when told to."""
    BEGUN.set()
    assert GO_ON.wait(timeout=60)


class Waiting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pause()
        return self.linear(x)


def test_calls_wait_while_another_thread_captures(core: ModuleType) -> None:
    """Whatever model they are of: what PyTorch shares between threads is as before when they run."""
    call, waiting = torch.nn.Module.__call__, Waiting()
    BEGUN.clear()
    GO_ON.clear()
    batch = [torch.randn(2, 3, size) for size in (4, 1, 4, 1)]
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    others = [maml_fast.MAML(model, lr=0.1, loss="mse", backend=backend) for backend in ("reference", "cpu")]
    expected = [maml.meta_loss(*batch).item() for maml in others]
    explained, found = [], []

    def explain(module: torch.nn.Module) -> None:
        explained.append(maml_fast.MAML(module, lr=0.1, loss="mse").explain(*batch))

    def compute() -> None:
        found.extend(maml.meta_loss(*batch).item() for maml in others)

    threads = [threading.Thread(target=explain, args=(waiting,))]
    threads[0].start()
    assert BEGUN.wait(timeout=60)
    assert torch.nn.Module.__call__ is call
    unseen = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Tanh())
    threads += [threading.Thread(target=explain, args=(unseen,)), threading.Thread(target=compute)]
    for thread in threads[1:]:
        thread.start()
    plain = model(batch[0])
    GO_ON.set()
    for thread in threads:
        thread.join(timeout=120)
    assert found == expected
    assert torch.equal(model(batch[0]), plain)
    assert ["backend: cpu" in text for text in explained] == [True, True], explained


def check(good: bool) -> None:
    assert good


# ---- fork, exit --------------------------------------------------------------------------------

SETUP = """
    import os, sys, threading, time
    import torch
    from maml_fast.cases import select

    torch.set_num_threads(3)
    problem = select(["size-tasks"])[0].build(torch.float32)
    maml = problem.maml("cpu")

    def gradients(maml=maml):
        for p in problem.model.parameters():
            p.grad = None
        loss = maml.backward(*problem.batch)
        return [t.detach().numpy().tobytes() for t in (loss, *(p.grad for p in problem.model.parameters()))]

    def forked(expected, rounds=20, again=2):
        child = os.fork()
        if child == 0:
            status = 3
            try:
                good = all(gradients() == expected for _ in range(rounds))
                if good and again > 0:  # a child's child, and the child after it has forked
                    forked(expected, rounds, again - 1)
                    good = gradients() == expected
                status = 0 if good else 4
            finally:
                os._exit(status)
        for _ in range(3000):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"
                return
            time.sleep(0.01)
        os.kill(child, 9)
        raise SystemExit("the child hangs")
"""


def script(source: str) -> str:
    return textwrap.dedent(SETUP) + textwrap.dedent(source)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@needs_fork
@pytest.mark.no_sanitizer
def test_fork_after_use(core: ModuleType, tmp_path: Path) -> None:
    source = """
        expected = gradients()
        for _ in range(5):
            forked(expected)
            assert gradients() == expected
        print("same")
    """
    assert run_python(script(source), cwd=tmp_path).strip() == "same"


@needs_fork
@pytest.mark.no_sanitizer
def test_fork_before_use(core: ModuleType, tmp_path: Path) -> None:
    source = """
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.write(writing, b"".join(gradients()))
            os._exit(0)
        os.wait()
        expected = b"".join(gradients())
        assert os.read(reading, 1 << 20) == expected
        print("same")
    """
    assert run_python(script(source), cwd=tmp_path).strip() == "same"


@needs_fork
@pytest.mark.no_sanitizer
def test_fork_while_another_thread_computes(core: ModuleType, tmp_path: Path) -> None:
    """The child must not wait for locks that its parent's other threads held."""
    source = """
        expected = gradients()
        other = problem.maml("cpu")
        stop = threading.Event()

        def busy():
            while not stop.is_set():
                with torch.no_grad():
                    other.meta_loss(*problem.batch)

        thread = threading.Thread(target=busy)
        thread.start()
        try:
            for _ in range(30):
                forked(expected, rounds=3, again=0)
        finally:
            stop.set()
            thread.join()
        print("same")
    """
    assert run_python(script(source), cwd=tmp_path).strip() == "same"


@needs_fork
@pytest.mark.no_sanitizer
def test_multiprocessing_with_fork(core: ModuleType, tmp_path: Path) -> None:
    source = """
        import multiprocessing

        def job(_):
            return gradients()

        expected = gradients()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(job, range(8)) == [expected] * 8
        print("same")
    """
    assert run_python(script(source), cwd=tmp_path).strip() == "same"


# Daemon threads are not tried: PyTorch's own operators abort in them when the interpreter ends.
@pytest.mark.parametrize("nap", [0.0, 0.05], ids=["helpers awake", "helpers asleep"])
def test_exit_is_clean(nap: float, core: ModuleType, tmp_path: Path) -> None:
    source = f"""
        gradients()
        time.sleep({nap})
        print("bye", flush=True)
    """
    assert run_python(script(source), cwd=tmp_path).strip() == "bye"


# ---- without the core --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package that was never compiled."""
    copy = tmp_path_factory.mktemp("pure") / "maml_fast"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_core*", "__pycache__"))
    return copy


@pytest.mark.no_sanitizer
def test_package_without_core(without_core: Path, tmp_path: Path) -> None:
    source = """
        import sys
        # an editable installation offers its own core to any package of this name
        sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
        import maml_fast
        print(maml_fast.__file__)
        from maml_fast.cases import select
        import torch
        problem = select(["size-tasks"])[0].build(torch.float32)
        print(problem.maml("auto").explain(*problem.batch[:3]))
        print(float(problem.maml("vmap").meta_loss(*problem.batch)))
        try:
            problem.maml("cpu").meta_loss(*problem.batch)
        except RuntimeError as error:
            print("error:", error)
    """
    output = run_python(source, cwd=tmp_path, package=without_core)
    assert output.startswith(str(without_core))
    assert "backend: vmap" in output
    assert "not cpu: maml_fast._core is not built" in output
    assert "error: backend 'cpu' cannot run this model:\n  - maml_fast._core is not built" in output
    problem = select(["size-tasks"])[0].build(torch.float32)
    loss = next(float(line) for line in output.splitlines() if line[:1].isdigit())
    reference = problem.maml("reference").meta_loss(*problem.batch)
    assert verify.relative_error([torch.tensor(loss)], [reference]) < 1e-5


def test_workspace_goes_with_the_last_reference(core: ModuleType) -> None:
    maml = maml_fast.MAML(torch.nn.Linear(3, 2), 0.1, loss="mse", backend="cpu")
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    maml.backward(x, y, x, y)
    (call,) = maml._preparer.plans()
    held = weakref.ref(call.plan.state["cpu"])
    gc.collect()
    gc.disable()
    try:
        del maml, call
        assert held() is None
    finally:
        gc.enable()


def test_another_default_device_changes_nothing(core: ModuleType) -> None:
    problem = select(["unreached"])[0].build(torch.float32)
    with torch.device("meta"):
        problem.maml("cpu").backward(*problem.batch)
    gradients = [p.grad for p in problem.model.parameters()]
    assert all(g is not None and g.device.type == "cpu" for g in gradients)
    assert any(not g.any() for g in gradients), "no parameter that the loss does not reach"


@pytest.mark.no_sanitizer
def test_a_pytorch_without_inductors_allocator(tmp_path: Path) -> None:
    """The allocator is none of PyTorch's public functions: without it the same numbers come out."""
    source = """
        import sys
        import torch
        if {blocked}:
            hidden, sys.modules["torch._C._dynamo.guards"] = sys.modules["torch._C._dynamo.guards"], None
        from maml_fast.backends import cpu
        if {blocked}:
            sys.modules["torch._C._dynamo.guards"] = hidden  # PyTorch itself reads it later
        from maml_fast.cases import select
        problem = select(["batchnorm-deep"])[0].build(torch.float32)
        problem.maml("cpu").backward(*problem.batch)
        print(cpu._empty_strided.__module__, [p.grad.tolist() for p in problem.model.parameters()])
    """
    usual, without = (run_python(source.format(blocked=b), cwd=tmp_path).split(" ", 1) for b in (False, True))
    assert without[0] == "maml_fast.backends.cpu" != usual[0]
    assert usual[1] == without[1]
