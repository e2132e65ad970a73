"""Whether a device that a person named is there."""

from __future__ import annotations

import re
import warnings

import torch


def usable(device: str) -> str:
    """`device`, which is "cpu", "cuda" or "cuda:N" and can be used here.

    Raises:
        ValueError: it is another word, or there is no such device.
    """
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    if device == "cpu":
        return device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a broken driver warns; the error says the same
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(f"device: PyTorch finds no CUDA device here, got {device!r}")
    if torch.device(device).index not in (None, *range(count)):
        raise ValueError(f"device: expected cuda:0 to cuda:{count - 1}, got {device!r}")
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise ValueError(f"device: {device} cannot be used: {str(error).splitlines()[0]}") from error
    return device
