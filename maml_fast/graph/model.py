"""A module seen as a function of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .graph import Untraceable
from .guards import Guards
from .snapshot import Snapshot
from .stand_ins import exchanged

MOST_CONSTANTS = 512

Adapts = Callable[[str, nn.Parameter], bool] | Iterable[str] | None


class Model(Snapshot):
    """A snapshot of a module's structure: which parameters it has and which of them adapt.

    Frozen parameters (`requires_grad=False`) are constants: neither adapted nor given a meta-gradient.

    Args:
        module: the user's network.
        adapts: names of the parameters that the inner loop updates, or a predicate
            `(name, parameter) -> bool`; None for all.
        learns: likewise, which get meta-gradients.
    """

    def __init__(self, module: nn.Module, adapts: Adapts = None, learns: Adapts = None) -> None:
        super().__init__(module)
        self.module = module
        self.graphs: dict[Any, Any] = {}  # what trace() found, by shapes
        self.guards = Guards(module)
        self.constants: dict[str, Tensor] = {}  # what plans read that is neither a parameter nor a buffer
        self.draws: bool | None = None  # whether captures have drawn random numbers; None where none came to its end
        self.reads_values = False  # a capture has found that forward reads elements that differ between tasks
        named = dict(zip(self.names, self.parameters(), strict=True))
        chosen, learned = choose(named, adapts), choose(named, learns, "learns")
        self.adapts = tuple(c and t for c, t in zip(chosen, self.trainable, strict=True))
        self.learns = tuple(c and t for c, t in zip(learned, self.trainable, strict=True))

    def name_constant(self, tensor: Tensor, found_as: str) -> str:
        """A name in `constants`, the same whenever it is asked for."""
        for name, held in self.constants.items():
            if held is tensor:
                return name
        if len(self.constants) >= MOST_CONSTANTS:
            raise Untraceable(f"forward has read more than {MOST_CONSTANTS} constants that are not buffers")
        name = f"{found_as} (constant {len(self.constants)})"
        self.constants[name] = tensor
        return name

    def call(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor) -> Any:
        """The module's output with these parameters and buffers, by name, in place of its own."""
        with self.standing_in(parameters, buffers):
            return self.module(x)

    @contextmanager
    def standing_in(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the module holds these parameters and buffers, by name."""
        own: dict[str, Tensor] = {**dict(zip(self.names, self.parameters(), strict=True)), **self.buffers()}
        stand_ins = {id(own[name]): value for name, value in {**parameters, **buffers}.items()}
        with exchanged(self.modules, stand_ins, keep_new=False):
            yield


def choose(named: Mapping[str, nn.Parameter], adapts: Adapts, argument: str = "adapts") -> tuple[bool, ...]:
    """Which of the parameters an argument chooses.

    Raises:
        TypeError, ValueError: it is a string, or names a parameter that is not there.
    """
    if adapts is None:
        return (True,) * len(named)
    if callable(adapts):
        return tuple(bool(adapts(name, p)) for name, p in named.items())
    if isinstance(adapts, str):
        raise TypeError(f"{argument}: expected an iterable of parameter names or a predicate, got a str")
    chosen = set(adapts)
    if unknown := chosen - set(named):
        raise ValueError(f"{argument}: no parameter named {sorted(unknown)[0]!r}; the model has {', '.join(named)}")
    return tuple(name in chosen for name in named)
