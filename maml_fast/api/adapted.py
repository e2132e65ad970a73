"""Per-task parameters after adaptation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algorithms.goal import Mode
from . import checks
from .prepare import Preparer


class Adapted:
    """T copies of the model, one adapted to each task.

    Attributes:
        parameters: name -> (T, *shape), without a graph.
    """

    def __init__(self, preparer: Preparer, parameters: dict[str, Tensor]) -> None:
        self._preparer = preparer
        self.parameters = parameters

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Outputs of each task's parameters on that task's inputs.

        Args:
            x: (T, N, *in), the model's dtype (or indices, where it embeds them) and device.

        Returns:
            (T, N, *out), without a graph.

        Raises:
            TypeError, ValueError: wrong dtype, device, shape or number of tasks.
        """
        values = list(self.parameters.values())
        checks.inputs("x", x, values[0].dtype, values[0].device, self._preparer.model.takes_indices)
        if x.shape[0] != values[0].shape[0]:
            raise ValueError(f"x: expected {values[0].shape[0]} tasks, got {x.shape[0]}")
        prepared = self._preparer.prepare(Mode.APPLY, None, None, x)
        prepared.tensors.adapted = values
        outputs = prepared.run().outputs
        assert outputs is not None
        return outputs
