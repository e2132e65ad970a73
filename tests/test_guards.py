"""A plan holds only in the Python state that it was made in; capturing leaves that state as it was."""

from __future__ import annotations

import contextvars
import copy
import functools
import os
import random
import warnings
from collections import UserDict, deque
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.algorithms.goal import Mode

SCALE = 1.0
TABLE = {"scale": 1.0}


class Config:
    """Settings in a class, as scripts have them."""

    scale = 1.0


class Smaller(Config):
    """One that overrides nothing yet."""


class Slotted:
    """Settings without a `__dict__`."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Scaler:
    """An object whose method reads what stands elsewhere."""

    def __init__(self) -> None:
        self.scale = 1.0

    def scaled(self, h: Tensor) -> Tensor:
        return h * self.scale * SCALE


ARGS = SimpleNamespace(scale=1.0, inner=SimpleNamespace(scale=1.0), more=[SimpleNamespace(scale=1.0)])
SLOTTED, SCALER, CONFIG = Slotted(), Scaler(), Config()
OTHER = ModuleType("other")
exec("SCALE = 1.0\ndef scaled(h): return h * SCALE", vars(OTHER))


class Tabled:
    """Settings behind square brackets."""

    def __init__(self) -> None:
        self.held = {"scale": 1.0}

    def __getitem__(self, name: str) -> float:
        return self.held[name]


class Steeper(nn.LeakyReLU):
    """A layer of another class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


LAYER, USERS, TABLED = nn.LeakyReLU(0.1), UserDict(scale=1.0), Tabled()
THEIRS = OTHER.scaled


def helper(h: Tensor) -> Tensor:
    return h * SCALE


@functools.lru_cache
def cached() -> float:
    return SCALE


def _clear(model: Net) -> None:
    globals()["SCALE"] = 0.5
    cached.cache_clear()


IN_CONTEXT = contextvars.ContextVar("scale", default=1.0)


def by_arguments(h: Tensor) -> Tensor:
    return h * ARGS.scale


def with_default(h: Tensor, scale: list[float] = [1.0]) -> Tensor:  # noqa: B006
    return h * scale[0]


def of(holder: Any, name: str, value: Any = 0.5) -> Callable[[Any], None]:
    return lambda model: setattr(holder, name, value)


class Net(nn.Module):
    """A small network whose forward is given, with many kinds of state to read in it."""

    kind = 1.0

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(4, 6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64)
        self.c = nn.Linear(4, 6, dtype=torch.float64)
        self.act = nn.LeakyReLU(0.1)
        self.norm = nn.BatchNorm1d(6, dtype=torch.float64)
        self.scale, self.unread, self.calls = 1.0, 0, 0
        self.scales, self.config = [1.0, 2.0], {"deep": [{"scale": 1.0}]}
        self.settings = SimpleNamespace(inner=SimpleNamespace(scale=1.0))
        self.small = np.float64(1.0)
        self.table = np.ones(3)
        self.chosen = {"a"}
        self.log: list[Any] = []
        self.random, self.generator = random.Random(0), np.random.default_rng(0)
        self.features: Tensor | None = None
        self.scaler, self.slotted = Scaler(), Slotted()
        self.acts, self.queue = [nn.LeakyReLU(0.1)], deque([1.0])
        self.register_buffer("late", None)
        self.partial = functools.partial(torch.mul, other=2.0)
        self.partial_of_list = functools.partial(with_default, scale=[1.0])

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x))

    @property
    def global_scale(self) -> float:
        return SCALE

    @staticmethod
    def scaled(h: Tensor) -> Tensor:
        return h * ARGS.scale

    @classmethod
    def scaled_by_class(cls, h: Tensor) -> Tensor:
        return h * Config.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self, x))


def batch() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randn(2, n, 4, generator=g, dtype=torch.float64)  # noqa: E731
    labels = lambda n: torch.randint(0, 3, (2, n), generator=g)  # noqa: E731
    return draw(5), labels(5), draw(4), labels(4)


def call(maml: mf.MAML) -> tuple[float, Tensor]:
    maml.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = maml.backward(*batch())
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in maml.module.parameters()]
    return loss.item(), torch.cat([g.reshape(-1) for g in gradients])


def backend_of(maml: mf.MAML) -> str:
    return maml.explain(*batch()).splitlines()[0].split()[-1]


def set_to(path: str, value: Any) -> Callable[[Net], None]:
    def change(model: Net) -> None:
        *owners, last = path.split(".")
        owner = model
        for name in owners:
            owner = getattr(owner, name)
        setattr(owner, last, value)

    return change


def item(get: Callable[[Net], Any], key: Any, value: Any) -> Callable[[Net], None]:
    return lambda model: get(model).__setitem__(key, value)


def in_module(name: str, value: Any) -> Callable[[Net], None]:
    return lambda model: globals().__setitem__(name, value)


def _hook(model: Net) -> None:
    model.a.register_forward_hook(lambda module, args, output: output * 3)


def _hook_on(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 3)


def _freeze(model: Net) -> None:
    model.a.weight.requires_grad_(False)


def _tie(model: Net) -> None:
    model.c.weight = model.a.weight


def _new_forward(model: Net) -> None:
    model.forward = lambda x: model.b(torch.sigmoid(model.a(x)))


def _closure() -> tuple[Callable[[Net, Tensor], Tensor], Callable[[Net], None]]:
    factor = 1.0

    def function(m: Net, x: Tensor) -> Tensor:
        return m.hidden(x) * factor

    def change(model: Net) -> None:
        nonlocal factor
        factor = 0.5

    return function, change


CHANGED: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[Net], None]]] = {
    "attribute": (lambda m, x: m.hidden(x) * m.scale, set_to("scale", 0.5)),
    "attribute-to-int": (lambda m, x: m.hidden(x) * m.scale, set_to("scale", 2)),
    "class-attribute": (lambda m, x: m.hidden(x) * m.kind, lambda m: setattr(type(m), "kind", 0.5)),
    "by-getattr": (lambda m, x: m.hidden(x) * getattr(m, "sca" + "le"), set_to("scale", 0.5)),
    "by-vars": (lambda m, x: m.hidden(x) * vars(m)["scale"], set_to("scale", 0.5)),
    "list": (lambda m, x: m.hidden(x) * m.scales[0], item(lambda m: m.scales, 0, 0.5)),
    "list-longer": (lambda m, x: m.hidden(x) / len(m.scales), lambda m: m.scales.append(1.0)),
    "nested": (lambda m, x: m.a(x) * m.config["deep"][0]["scale"], item(lambda m: m.config["deep"][0], "scale", 3)),
    "object": (lambda m, x: m.hidden(x) * m.settings.inner.scale, set_to("settings.inner.scale", 0.5)),
    "numpy-number": (lambda m, x: m.hidden(x) * float(m.small), set_to("small", np.float64(0.5))),
    "numpy-array": (lambda m, x: m.hidden(x) * float(m.table[1]), item(lambda m: m.table, 1, 0.5)),
    "set": (lambda m, x: m.hidden(x) * (2.0 if "b" in m.chosen else 1.0), lambda m: m.chosen.add("b")),
    "global": (lambda m, x: m.hidden(x) * SCALE, in_module("SCALE", 0.5)),
    "global-of-helper": (lambda m, x: helper(m.hidden(x)), in_module("SCALE", 0.5)),
    "global-table": (lambda m, x: m.hidden(x) * TABLE["scale"], lambda m: TABLE.update(scale=0.5)),
    "global-object": (lambda m, x: m.hidden(x) * ARGS.scale, of(ARGS, "scale")),
    "object-in-global-object": (lambda m, x: m.hidden(x) * ARGS.inner.scale, of(ARGS.inner, "scale")),
    "object-in-list-of-global": (lambda m, x: m.hidden(x) * ARGS.more[0].scale, of(ARGS.more[0], "scale")),
    "global-object-of-helper": (lambda m, x: by_arguments(m.hidden(x)), of(ARGS, "scale")),
    "global-slots": (lambda m, x: m.hidden(x) * SLOTTED.scale, of(SLOTTED, "scale")),
    "global-class": (lambda m, x: m.hidden(x) * Config.scale, of(Config, "scale")),
    "base-of-global-class": (lambda m, x: m.hidden(x) * Smaller.scale, of(Config, "scale")),
    "global-class-hides-its-base": (lambda m, x: m.hidden(x) * Smaller.scale, of(Smaller, "scale")),
    "global-object-hides-its-class": (lambda m, x: m.hidden(x) * CONFIG.scale, of(CONFIG, "scale")),
    "method-of-global-object": (lambda m, x: SCALER.scaled(m.hidden(x)), of(SCALER, "scale")),
    "global-in-method-of-global-object": (lambda m, x: SCALER.scaled(m.hidden(x)), in_module("SCALE", 0.5)),
    "module": (lambda m, x: m.hidden(x) * OTHER.SCALE, of(OTHER, "SCALE")),
    "global-of-module": (lambda m, x: OTHER.scaled(m.hidden(x)), of(OTHER, "SCALE")),
    "function-of-module": (lambda m, x: OTHER.scaled(m.hidden(x)), of(OTHER, "scaled", lambda h: h * 0.5)),
    "inner-function": (lambda m, x: (lambda h: h * ARGS.scale)(m.hidden(x)), of(ARGS, "scale")),
    "default": (lambda m, x: with_default(m.hidden(x)), lambda m: with_default.__defaults__[0].__setitem__(0, 0.5)),
    "property": (lambda m, x: m.hidden(x) * m.global_scale, in_module("SCALE", 0.5)),
    "static-method": (lambda m, x: m.scaled(m.hidden(x)), of(ARGS, "scale")),
    "class-method": (lambda m, x: m.scaled_by_class(m.hidden(x)), of(Config, "scale")),
    "method-of-held-object": (lambda m, x: m.scaler.scaled(m.hidden(x)), in_module("SCALE", 0.5)),
    "held-slots": (lambda m, x: m.hidden(x) * m.slotted.scale, set_to("slotted.scale", 0.5)),
    "partial": (lambda m, x: m.partial(m.hidden(x)), lambda m: m.partial.keywords.update(other=0.5)),
    "list-in-partial": (
        lambda m, x: m.partial_of_list(m.hidden(x)),
        lambda m: m.partial_of_list.keywords["scale"].__setitem__(0, 0.5),
    ),
    "global-layer": (lambda m, x: LAYER(m.a(x)), of(LAYER, "negative_slope")),
    "layer-in-list": (lambda m, x: m.acts[0](m.a(x)), lambda m: setattr(m.acts[0], "negative_slope", 0.5)),
    "hook-of-layer-in-list": (lambda m, x: m.acts[0](m.a(x)), lambda m: _hook_on(m.acts[0])),
    "library-object": (lambda m, x: m.hidden(x) * USERS["scale"], lambda m: USERS.update(scale=0.5)),
    "buffer-appears": (lambda m, x: m.hidden(x) * (1.0 if m.late is None else 0.5), set_to("late", torch.ones(1))),
    "dynamic-name": (lambda m, x: m.hidden(x) * getattr(ARGS, "sca" + "le"), of(ARGS, "scale")),
    "attribute-appears": (lambda m, x: m.hidden(x) * (0.5 if hasattr(CONFIG, "flag") else 1.0), of(CONFIG, "flag")),
    "subscripted-object": (lambda m, x: m.hidden(x) * TABLED["scale"], lambda m: TABLED.held.update(scale=0.5)),
    "function-has-attribute": (lambda m, x: m.hidden(x) * by_arguments.scale, of(by_arguments, "scale")),
    "defaults-replaced": (lambda m, x: with_default(m.hidden(x)), of(with_default, "__defaults__", ([0.5],))),
    "cached-function": (lambda m, x: m.hidden(x) * cached(), _clear),
    "deque": (lambda m, x: m.hidden(x) * m.queue[0], lambda m: m.queue.__setitem__(0, 0.5)),
    "class-of-layer": (lambda m, x: m.act(m.a(x)), lambda m: setattr(m.act, "__class__", Steeper)),
    "closure": _closure(),
    "function-attribute": (lambda m, x: m.hidden(x), set_to("function", lambda m, x: torch.sin(m.a(x)))),
    "forward-of-instance": (lambda m, x: m.hidden(x), _new_forward),
    "method-of-class": (lambda m, x: m.hidden(x), lambda m: setattr(type(m), "hidden", lambda s, x: s.a(x).sigmoid())),
    "slope": (lambda m, x: m.act(m.a(x)), set_to("act.negative_slope", 0.4)),
    "eps": (lambda m, x: m.norm(m.a(x)), set_to("norm.eps", 0.5)),
    "eval": (lambda m, x: m.norm(m.a(x)), lambda m: m.eval()),
    "eval-of-one-layer": (lambda m, x: m.norm(m.a(x)), lambda m: m.norm.eval()),
    "layer-replaced": (lambda m, x: m.act(m.a(x)), set_to("act", nn.Tanh())),
    "hook": (lambda m, x: m.hidden(x), _hook),
    "frozen": (lambda m, x: m.hidden(x), _freeze),
    "tied": (lambda m, x: m.hidden(x) + m.c(x), _tie),
    "parameter-replaced": (lambda m, x: m.hidden(x), set_to("a.bias", nn.Parameter(torch.ones(6).double()))),
}  # fmt: skip


by_arguments.scale = 1.0  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    hidden = Net.hidden
    yield
    globals()["SCALE"], Net.kind, Net.hidden = 1.0, 1.0, hidden
    TABLE["scale"] = 1.0
    for holder in (ARGS, ARGS.inner, ARGS.more[0], SLOTTED, SCALER, Config):
        holder.scale = 1.0
    for holder in (CONFIG, Smaller):
        if "scale" in vars(holder):
            del holder.scale
    LAYER.negative_slope, by_arguments.scale = 0.1, 1.0  # type: ignore[attr-defined]
    USERS["scale"] = TABLED.held["scale"] = 1.0
    vars(CONFIG).pop("flag", None)
    with_default.__defaults__ = ([1.0],)
    OTHER.SCALE, OTHER.scaled, with_default.__defaults__[0][0] = 1.0, THEIRS, 1.0


@pytest.mark.parametrize(("function", "change"), CHANGED.values(), ids=CHANGED)
def test_plans_follow_the_state_that_forward_reads(
    function: Callable[[Net, Tensor], Tensor], change: Callable[[Net], None], core: Any
) -> None:
    model = Net(function)
    maml = mf.MAML(model, 0.3, steps=2)
    before, _ = call(maml)
    assert backend_of(maml) == "cpu"
    change(model)
    loss, gradient = call(maml)
    wanted, reference = call(mf.MAML(model, 0.3, steps=2, backend="reference"))
    assert loss != before
    assert abs(loss - wanted) <= 1e-12 * abs(wanted)
    assert (gradient - reference).norm() <= 1e-11 * reference.norm()
    assert backend_of(maml) == "cpu"


def test_states_met_before_find_their_plans_again(core: Any) -> None:
    model = Net(lambda m, x: m.norm(m.hidden(x) * m.scale))
    maml = mf.MAML(model, 0.3)
    for scale in (1.0, 0.5, 1.0, 0.5, 1.0):
        model.scale = scale
        call(maml)
    assert len(list(maml._preparer.plans())) == 2


class Logged(Net):
    """A network with methods that forward does not call."""

    history: list[float] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(lambda m, x: m.hidden(x) * ARGS.inner.scale)

    def training_step(self) -> None:
        self.history.append(SCALE)
        print(ARGS.logged, SCALER.scale, OTHER.SCALE)


def test_what_only_other_methods_look_up_changes_nothing(core: Any) -> None:
    model = Logged()
    maml = mf.MAML(model, 0.3)
    before, _ = call(maml)
    for i in range(20):
        ARGS.logged = SCALER.scale = OTHER.SCALE = float(i)
        globals()["SCALE"] = float(i)
        model.history.append(i)
        assert call(maml)[0] == before
    assert len(list(maml._preparer.plans())) == 1
    assert backend_of(maml) == "cpu"
    ARGS.inner.scale = 0.5
    assert call(maml)[0] != before


OUTSIDE: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[], Any], str]] = {
    "environ": (
        lambda m, x: m.hidden(x) * float(os.environ.get("SCALE", "1")),
        lambda: os.environ.update(SCALE="0.5"),
        "names 'environ'",
    ),
    "getenv": (
        lambda m, x: m.hidden(x) * float(os.getenv("SCALE", "1")),
        lambda: os.environ.update(SCALE="0.5"),
        "names 'getenv'",
    ),
    "context-variable": (lambda m, x: m.hidden(x) * IN_CONTEXT.get(), lambda: IN_CONTEXT.set(0.5), "variable 'scale'"),
    "default-dtype": (
        lambda m, x: m.hidden(x) * torch.finfo(torch.get_default_dtype()).bits,
        lambda: torch.set_default_dtype(torch.float64),
        "names 'get_default_dtype'",
    ),
}


@pytest.mark.parametrize(("function", "change", "reason"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_no_object_holds_is_not_captured(
    function: Callable[[Net, Tensor], Tensor], change: Callable[[], Any], reason: str, core: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SCALE", "1")
    maml, reference = (mf.MAML(Net(function), 0.3, backend=b) for b in ("auto", "reference"))
    reference.load_state_dict(maml.state_dict())
    before, _ = call(maml)
    try:
        change()
        loss, gradient = call(maml)
        wanted, exact = call(reference)
    finally:
        torch.set_default_dtype(torch.float32)
        IN_CONTEXT.set(1.0)
    assert loss != before
    assert abs(loss - wanted) <= 1e-12 * abs(wanted)
    assert (gradient - exact).norm() <= 1e-11 * exact.norm()
    assert reason in maml.explain(*batch())


def test_what_forward_does_not_read_changes_nothing(core: Any) -> None:
    model = Net(lambda m, x: m.hidden(x))
    maml = mf.MAML(model, 0.3)
    for i in range(30):
        model.unread, model.new = i, i
        model.log.append(i)
        call(maml)
    assert backend_of(maml) == "cpu"
    assert len(list(maml._preparer.plans())) == 1


def test_an_attribute_that_changes_at_every_call_ends_capturing(core: Any) -> None:
    model = Net(lambda m, x: m.hidden(x) * m.scale)
    maml = mf.MAML(model, 0.3, backend="auto")
    for i in range(12):
        model.scale = 1.0 + i
        loss, _ = call(maml)
        assert abs(loss - call(mf.MAML(model, 0.3, backend="reference"))[0]) < 1e-10
    assert "attribute 'scale' of the model changes at every call" in maml.explain(*batch())


def _count(m: Net, x: Tensor) -> Tensor:
    m.calls += 1
    return m.hidden(x)


def _remember(m: Net, x: Tensor) -> Tensor:
    m.log.append(x.shape)
    return m.hidden(x)


def _python_draw(m: Net, x: Tensor) -> Tensor:
    return m.hidden(x) * (0.5 if random.random() < 0.5 else 1.0)


def _numpy_draw(m: Net, x: Tensor) -> Tensor:
    return m.hidden(x) * float(np.random.rand())  # noqa: NPY002


STATEFUL: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "counter": (_count, "updates attribute 'calls'"),
    "list": (_remember, "changes attribute 'log'"),
    "python-random": (_python_draw, "random generator"),
    "numpy-random": (_numpy_draw, "random generator"),
    "own-random": (lambda m, x: m.hidden(x) * m.random.random(), "changes attribute 'random'"),
    "own-generator": (lambda m, x: m.hidden(x) * float(m.generator.random()), "changes attribute 'generator'"),
}


@pytest.mark.parametrize(("function", "reason"), STATEFUL.values(), ids=STATEFUL)
def test_forwards_that_change_their_own_state_are_not_captured(
    function: Callable[[Net, Tensor], Tensor], reason: str
) -> None:
    maml = mf.MAML(Net(function), 0.3, backend="reference")
    graph, reasons = maml._prepare(Mode.META_GRADIENT, *batch()).call.plan.trace
    assert graph is None
    assert reason in reasons[0]


def _keep_features(m: Net, x: Tensor) -> Tensor:
    m.features = m.hidden(x)
    m.new_name = 3
    return m.features


def test_capturing_leaves_the_module_and_generators_as_they_were() -> None:
    model = Net(_keep_features)
    before, draws = dict(vars(model)), (random.getstate(), torch.get_rng_state())
    parameters = [(p, p.detach().clone()) for p in model.parameters()]
    maml = mf.MAML(model, 0.3)
    graph, reasons = maml._prepare(Mode.META_GRADIENT, *batch()).call.plan.trace
    assert graph is not None, reasons
    assert vars(model).keys() == before.keys()
    assert all(value is before[name] for name, value in vars(model).items())
    assert type(model) is Net
    assert random.getstate() == draws[0]
    assert torch.equal(torch.get_rng_state(), draws[1])
    assert all(p is q and torch.equal(p, v) for p, (q, v) in zip(model.parameters(), parameters, strict=True))
    copy.deepcopy(model)


def test_the_guard_in_python_agrees_with_the_core(core: Any) -> None:
    from maml_fast.graph import guards

    held, items = {"a": 1, "b": [2]}, [1, 2]
    cell = (lambda v: lambda: v)(held).__closure__[0]
    shelves = [
        (held, ("a", "b"), (..., held["b"]), False),
        (held, ("a",), (held["a"],), True),
        (items, (), tuple(items), False),
        (cell, (), (held,), False),
        (Net, ("kind",), (Net.kind,), True),
    ]
    changes: list[Callable[[], Any]] = [
        lambda: held.update(c=3), lambda: held.pop("c"), lambda: items.append(3), lambda: items.pop(),
        lambda: setattr(Net, "kind", 7.5), lambda: held.update(a=5), lambda: held.update(b=[2]),
    ]  # fmt: skip
    fast, slow = core.Guard(shelves), guards._Slow(shelves)
    seen = [fast.check()]
    assert slow.check()
    for change in changes:
        change()
        seen.append(fast.check())
        assert slow.check() == seen[-1]
    assert seen == [True, False, True, False, True, False, False, False]
