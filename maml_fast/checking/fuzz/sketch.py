"""A network under construction: lines of Python, and the shapes that they give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.sine import Sine

NAMES = {"torch": torch, "nn": nn, "F": F, "Sine": Sine}
"""What the lines may use."""

_SAMPLES = 3  # of the run that finds out shapes


class Value(NamedTuple):
    """A value of forward: its name and the shape of one sample."""

    name: str
    shape: tuple[int, ...]


class Unfit(Exception):
    """PyTorch does not take this line: the generator drops it."""


class Sketch:
    """Lines for `__init__` and `forward`, each executed on tensors without elements as it is added.

    Attributes:
        values: of forward so far, the input first.
        layers: the input shape of every layer's first use.
    """

    def __init__(self, in_shape: tuple[int, ...]) -> None:
        self.inits: list[str] = []
        self.lines: list[str] = []
        self.values = [Value("v0", in_shape)]
        self.layers: dict[str, tuple[int, ...]] = {}
        self._self = SimpleNamespace()
        self._tensors: dict[str, Tensor] = {"v0": torch.empty(_SAMPLES, *in_shape, device="meta")}

    def layer(self, code: str) -> str:
        """Add a layer made by the expression; how forward calls it."""
        name = f"l{len(self.inits)}"
        with torch.device("meta"):
            setattr(self._self, name, self._evaluated(code))
        self.inits.append(f"self.{name} = {code}")
        return f"self.{name}"

    def module(self, layer: str) -> nn.Module:
        return getattr(self._self, layer.removeprefix("self."))

    def apply(self, layer: str, x: Value) -> Value:
        """Call a layer."""
        self.layers.setdefault(layer, x.shape)
        return self.call(f"{layer}({x.name})")

    def call(self, code: str) -> Value:
        """Add a line to forward that evaluates the expression."""
        name = f"v{len(self.values)}"
        with torch.device("meta"), torch.no_grad():
            result = self._evaluated(code)
        if not isinstance(result, Tensor) or result.dim() < 2 or result.shape[0] != _SAMPLES or not result.numel():
            raise Unfit(code)
        self._tensors[name] = result
        self.lines.append(f"{name} = {code}")
        self.values.append(Value(name, tuple(result.shape[1:])))
        return self.values[-1]

    def _evaluated(self, code: str) -> object:
        try:
            return eval(code, {**NAMES, "self": self._self, **self._tensors})
        except Exception as error:
            raise Unfit(f"{code}: {error}") from error

    def source(self, output: Value) -> str:
        """The class as text."""
        inits = self.inits or ["pass"]
        return "\n".join(
            [
                "class Net(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *[f"        {line}" for line in inits],
                "",
                "    def forward(self, v0):",
                *[f"        {line}" for line in self.lines],
                f"        return {output.name}",
            ]
        )
