"""float32's error against PyTorch's own, both held against float64, over many random networks and meta-batches.

    python benchmarks/accuracy.py [--seeds 100] [case …]

Per seed the relative error of the meta-gradient (Euclidean norm, all parameters together) of the core and of PyTorch's
loop, both in float32, and their ratio: median (minimum to maximum). A ratio of 1 is PyTorch's own accuracy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from rich.progress import track
from torch import Tensor, nn

from maml_fast.cases import Case
from maml_fast.nn.networks import conv4, resnet12


def case(name: str, network: Callable[[], nn.Module], image: tuple[int, ...], steps: int, lr: float) -> Case:
    return Case(name, network, image, (5,), "cross_entropy", tasks=2, support=5, query=15, steps=steps, lr=lr)


CONV4, RESNET12 = partial(conv4, 1, 64, 5, 64), partial(resnet12, 3, 16, 32, 64, 128, classes=5)
CASES = {
    "conv4-k1": case("conv4-k1", CONV4, (1, 28, 28), 1, 0.4),
    "conv4-k5": case("conv4-k5", CONV4, (1, 28, 28), 5, 0.1),
    "resnet12": case("resnet12", RESNET12, (3, 32, 32), 1, 0.1),
}


def meta_gradient(case: Case, seed: int, dtype: torch.dtype, backend: str) -> Tensor:
    problem = case.build(dtype, seed=seed)
    problem.maml(backend).backward(*problem.batch)
    return torch.cat([p.grad.double().flatten() for p in problem.model.parameters() if p.grad is not None])


def errors(case: Case, seed: int) -> tuple[float, float]:
    """Of the core and of PyTorch's loop."""
    exact = meta_gradient(case, seed, torch.float64, "reference")
    single = (meta_gradient(case, seed, torch.float32, backend) for backend in ("cpu", "reference"))
    ours, theirs = ((g - exact).norm().item() / exact.norm().item() for g in single)
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--seeds", type=int, default=100)
    given = parser.parse_args()
    for name in given.cases or CASES:
        pairs = [errors(CASES[name], seed) for seed in track(range(given.seeds), name, transient=True)]
        ratios = [ours / theirs for ours, theirs in pairs]
        ours, theirs = (median(column) for column in zip(*pairs, strict=True))
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:10} {len(pairs)} seeds   error {ours:.2e}   PyTorch's {theirs:.2e}   ratio {spread}")


if __name__ == "__main__":
    main()
