"""A task's parameters stand in the places of the module's own for one call, and nothing of them stays."""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from textbook import ALL, LR, SLOW, STEPS, Two, agrees, distance, labelled, made, observed, textbook
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as weight_norm_by_hook

import maml_fast as mf
from maml_fast.graph.leftovers import untouched
from maml_fast.graph.model import Model
from maml_fast.graph.stand_ins import exchanged

pytestmark = pytest.mark.filterwarnings("ignore:maml_fast falls back", "ignore:.*weight_norm:FutureWarning")

# ---- one tensor in several places --------------------------------------------------------------


class Twice(nn.Module):
    """The layers stand in a Sequential too, and one of them in a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.Linear(8, 3)
        self.net = nn.Sequential(self.features, self.head)
        self.named = nn.ModuleDict({"again": self.head})

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.named["again"](self.features(x))


class Once(nn.Module):
    """What `Twice` computes, every layer at one place."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.head(self.features(x))


class Shared(nn.Module):
    """One parameter and one buffer belong to two modules, the parameter under two names of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight
        self.alias = self.a.weight
        self.register_buffer("scale", torch.linspace(1, 2, 4))
        self.b.register_buffer("scale", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)) * self.scale
        return self.head(torch.tanh(self.b(h) @ self.alias) * self.b.scale)


class Plain(Shared):
    """What `Shared` computes, from one place."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)) * self.scale
        h = torch.nn.functional.linear(h, self.a.weight, self.b.bias)
        return self.head(torch.tanh(h @ self.a.weight) * self.scale)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(("build", "same"), [(Twice, Once), (Shared, Plain)])
def test_every_place_is_filled_once(
    build: Callable[[], nn.Module], same: Callable[[], nn.Module], backend: str
) -> None:
    model, batch = made(build), labelled(4)
    twin = made(same)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if k in twin.state_dict()})
    agrees(model, backend, batch, textbook(twin, batch))


@pytest.mark.parametrize("backend", ALL)
def test_tied_and_untied_later(backend: str) -> None:
    model, batch = (
        made(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))),
        labelled(4),
    )
    maml = mf.MAML(model, LR, steps=STEPS, backend=backend)

    def right() -> bool:
        return distance(observed(maml, batch, list(model.parameters())), textbook(model, batch)) < 1e-9

    assert right()
    model[2].weight = model[0].weight
    assert right()
    model[2].weight = nn.Parameter(2 * model[0].weight.detach())
    assert right()
    model[2].bias = model[0].bias
    assert right()


# ---- nothing stays ------------------------------------------------------------------------------


class Leaves(nn.Module):
    """Forward leaves what it computed in attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 8, batch_first=True), weight_norm_by_hook(nn.Linear(8, 3))
        self.seen: list[Tensor] = []
        self.found: dict[str, Any] = {"features": None}
        self.calls = 0
        self.raises = -1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = torch.tanh(self.rnn(x.unsqueeze(1))[0][:, -1])
        self.features = h
        self.seen.append(h)
        self.found["features"] = h
        self.table = torch.ones(8, dtype=h.dtype)
        if self.calls == self.raises:
            raise KeyError("in forward")
        return self.head(h * self.table)


def held(model: nn.Module) -> list[Any]:
    """Everything that the modules hold, but for numbers: identities, and lists and dicts by content."""
    found: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, dict):
                found.append((name, [(k, id(v)) for k, v in value.items()]))
            elif isinstance(value, list):
                found.append((name, [id(v) for v in value]))
            elif not isinstance(value, int):
                found.append((name, id(value)))
    return found


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_of_a_task_stays_in_the_module(backend: str) -> None:
    model, (x_s, y_s, x_q, y_q) = made(Leaves), labelled(4)
    model(x_s[0])
    model.features, model.found["features"] = None, None  # type: ignore[assignment]
    model.seen.clear()
    before, calls = held(model), model.calls
    maml = mf.MAML(model, LR, steps=STEPS, backend=backend)
    maml.backward(x_s, y_s, x_q, y_q)
    maml(x_s, y_s, x_q).sum().backward()
    with torch.no_grad():
        maml.meta_loss(x_s, y_s, x_q, y_q)
    maml.adapt(x_s, y_s)(x_q)
    maml.explain(x_s, y_s, x_q, y_q)
    assert held(model) == before
    assert model.calls > calls, "a counter goes on as in a plain call"


@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("backend", SLOW)
def test_an_exception_leaves_the_module_as_it_was(at: int, backend: str) -> None:
    model, batch = made(Two), labelled(4)
    before, calls = held(model), 0

    def stop(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= at:
            raise KeyError("in forward")

    maml = mf.MAML(model, LR, steps=STEPS, backend=backend)
    maml.backward(*batch)
    model.b.register_forward_pre_hook(stop)
    with pytest.raises((KeyError, RuntimeError), match="in forward"):
        maml.backward(*batch)
    model.b._forward_pre_hooks.clear()
    assert [h for h in held(model) if h[0] != "_forward_pre_hooks"] == [
        h for h in before if h[0] != "_forward_pre_hooks"
    ]
    assert all(type(p) is nn.Parameter for p in model.parameters())


class Cached(Two):
    """Forward makes a constant table, a buffer and a parameter at its first call, and remembers that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.table = torch.linspace(1, 2, 8, dtype=x.dtype)
            self.register_buffer("scale", torch.full((8,), 0.5, dtype=x.dtype))
            self.ready = True
        return self.b(torch.tanh(self.a(x)) * self.table * self.scale)


@pytest.mark.parametrize("backend", ALL)
def test_constants_that_forward_caches(backend: str) -> None:
    fresh, known, batch = made(Cached), made(Cached), labelled(4)
    known(batch[0][0])
    wanted = textbook(known, batch)
    maml = mf.MAML(fresh, LR, steps=STEPS, backend="auto" if backend == "vmap" else backend)
    for _ in range(3):
        assert distance(observed(maml, batch, list(fresh.parameters())), wanted) < 1e-9
    assert (
        distance(observed(mf.MAML(known, LR, steps=STEPS, backend=backend), batch, list(known.parameters())), wanted)
        < 1e-9
    )


class Auxiliary(Two):
    """Forward leaves a term that the loss reads from the model."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        self.aux = h.square().mean()
        return self.b(h)


@pytest.mark.parametrize("backend", ALL)
def test_a_loss_reads_what_forward_left(backend: str) -> None:
    model, batch = made(Auxiliary), labelled(4)
    loss = lambda o, y: nn.functional.cross_entropy(o, y) + model.aux  # noqa: E731
    wanted = textbook(model, batch, loss)
    del model.aux
    agrees(model, backend, batch, wanted, loss=loss)
    assert not hasattr(model, "aux")
    copy.deepcopy(model)


def test_parametrizations_cached_outside_are_not_the_tasks() -> None:
    model, batch = (
        made(lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 3))),
        labelled(4),
    )
    maml = mf.MAML(model, LR, steps=STEPS, backend="reference")
    expected = observed(maml, batch, list(model.parameters()))
    with parametrize.cached():
        own = model[0].weight
        assert distance(observed(maml, batch, list(model.parameters())), expected) < 1e-12
        assert model[0].weight is own


# ---- the exchange itself ------------------------------------------------------------------------


def test_exchanged_by_tensor_and_back_in_order() -> None:
    model = made(Shared)
    keys = [list(m._parameters) for m in model.modules()]
    other = torch.zeros(4, 4)
    with exchanged(list(model.modules()), {id(model.a.weight): other}):
        assert model.a.weight is other
        assert model.b.weight is other
        assert model.alias is other
        del model.b.weight
    assert model.alias is model.b.weight is model.a.weight is not other
    assert [list(m._parameters) for m in made(Shared).modules()] == keys


def test_untouched_puts_everything_back() -> None:
    model = made(Leaves)
    before = held(model)

    def use() -> None:
        with untouched(list(model.modules())):
            model.raises = 2
            model(torch.randn(2, 4, dtype=torch.float64))
            model.extra = nn.Linear(2, 2)
            model(torch.randn(2, 4, dtype=torch.float64))

    with pytest.raises(KeyError):
        use()
    assert held(model) == before
    assert (model.calls, model.raises) == (0, -1)


def test_scripted_modules_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting is deprecated
        scripted = nn.Sequential(nn.Linear(4, 4), torch.jit.trace(nn.Linear(4, 3), torch.randn(1, 4)))
    with pytest.raises(TypeError, match="model: expected modules in Python, got a TopLevelTracedModule in '1'"):
        mf.MAML(scripted, LR)


# ---- others at the same time --------------------------------------------------------------------


class Inner(nn.Module):
    """Forward calls MAML on the very model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Two()
        self.maml: list[mf.MAML] = []
        self.batch = labelled(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.maml:
            self.maml[0].meta_loss(*self.batch)
        return self.net(x)


@pytest.mark.parametrize("backend", SLOW)
@pytest.mark.parametrize("inner", ["auto", "reference"])
def test_a_call_inside_the_models_forward_is_refused(backend: str, inner: str) -> None:
    model, batch = made(Inner), labelled(4)
    maml = mf.MAML(model, LR, steps=STEPS, backend=backend)
    maml.backward(*batch)
    model.maml.append(mf.MAML(model.net, LR, backend=inner))
    with pytest.raises(RuntimeError, match="no call of MAML inside the forward or the loss of the same model"):
        maml.backward(*batch)
    with pytest.raises(RuntimeError, match="no call of MAML inside"):
        mf.MAML(model, LR, loss=lambda o, y: mf.MAML(model, LR).meta_loss(*batch), backend=backend).backward(*batch)
    model.maml.clear()
    maml.backward(*batch)


def test_a_call_on_another_model_inside_forward() -> None:
    model, other, batch = made(Inner), made(Two, seed=5), labelled(4)
    wanted = textbook(model, batch)
    model.maml.append(mf.MAML(other, LR))
    maml = mf.MAML(model, LR, steps=STEPS, backend="reference")
    assert distance(observed(maml, batch, list(model.parameters())), wanted) < 1e-9


@pytest.fixture
def _quick_switches() -> Iterator[None]:
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_quick_switches")
def test_threads_do_not_see_each_others_stand_ins() -> None:
    """Several objects over one model; also a backend that takes no stand-ins reads its parameters."""
    model, batch = made(Two), labelled(4)
    backends = ["reference", "vmap", "cpu", "reference"]
    mamls = [mf.MAML(model, LR, steps=STEPS, backend=b) for b in backends]
    wanted = textbook(model, batch)[0]
    for maml in mamls:
        maml.meta_loss(*batch)
    wrong: list[Any] = []

    def work(maml: mf.MAML) -> None:
        try:
            for _ in range(15):
                value = maml.meta_loss(*batch).detach()
                if not torch.allclose(value, wanted, rtol=1e-9, atol=0):
                    wrong.append(value)
        except Exception as error:  # a thread's own would be lost
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(m,)) for m in mamls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong


class Waiting(Two):
    """Forward tells that it is running, and goes on when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.leave = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.inside.set()
        self.leave.wait(0.2)
        return super().forward(x)


@pytest.mark.no_sanitizer
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
def test_a_fork_in_the_middle_of_a_call() -> None:
    """The child finds the model's own parameters and no lock that nobody gives back."""
    model, batch = made(Waiting), labelled(4)
    own = [p.detach().clone() for p in model.parameters()]
    maml = mf.MAML(model, LR, steps=STEPS, backend="reference")
    thread = threading.Thread(target=maml.backward, args=batch)
    thread.start()
    assert model.inside.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own, about forks beside threads
        child = os.fork()
    if child == 0:
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), own, strict=True))
        with exchanged(list(model.modules()), {}):
            os._exit(0 if same and all(type(p) is nn.Parameter for p in model.parameters()) else 1)
    model.leave.set()
    thread.join(60)
    assert os.waitpid(child, 0)[1] == 0


def test_what_changes_a_models_structure() -> None:
    """`restructured` sees whatever moves names, slots or kinds, and nothing else."""
    changes: dict[str, Callable[[nn.Module], Any]] = {
        "replaced layer": lambda m: setattr(m, "b", nn.Linear(8, 5).double()),
        "same kind of layer": lambda m: setattr(m, "b", nn.Linear(8, 3).double()),
        "new layer": lambda m: m.add_module("c", nn.Linear(2, 2).double()),
        "new parameter": lambda m: m.register_parameter("shift", nn.Parameter(torch.zeros(3).double())),
        "parameter in a layer without any": lambda m: m.act.register_parameter("s", nn.Parameter(torch.zeros(1))),
        "bias gone": lambda m: setattr(m.b, "bias", None),
        "renamed": lambda m: (m.add_module("z", m.b), delattr(m, "b")),
        "tied": lambda m: setattr(m.c, "bias", m.a.bias),
        "frozen": lambda m: m.a.weight.requires_grad_(False),
        "dtype": lambda m: m.float(),
        "swapped": lambda m: (lambda a, b: (setattr(m, "a", b), setattr(m, "c", a)))(m.a, m.c),
    }
    same: dict[str, Callable[[nn.Module], Any]] = {
        "nothing": lambda m: None,
        "numbers": lambda m: m.a.weight.data.zero_(),
        "another tensor of the kind": lambda m: setattr(m.a, "weight", nn.Parameter(torch.ones(8, 4).double())),
        "a buffer": lambda m: m.register_buffer("k", torch.zeros(1)),
    }

    class Net(Two):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.c = nn.Tanh(), nn.Linear(4, 8)

    for expected, cases in ((True, changes), (False, same)):
        for name, change in cases.items():
            module = made(Net)
            model = Model(module)
            assert not model.restructured()
            change(module)
            assert model.restructured() is expected, name
