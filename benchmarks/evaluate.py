"""`mf.evaluate`, which runs one inner loop for each meta-batch, against a learner for each number of inner steps.

    python benchmarks/evaluate.py [--rounds 9]

Both measure the query loss, and the accuracy where there are labels, after 0 … 10 steps, on the same meta-batches. They
take turns, the first to go alternating; a ratio is taken within a round: medians (minimum to maximum). Learners made
and planned in every evaluation are what took this place before; those that are kept are timed too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

import maml_fast as mf

STEPS = range(11)
Batches = Sequence[tuple[Any, Any, Any, Any]]


def sinusoid(inner: dict[str, Any]) -> tuple[mf.MAML, Batches]:
    """Two meta-batches as in the recipe's evaluation: 500 tasks, 10 points, 100 queries."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    batches = [tuple(torch.randn(500, n, 1) for n in (10, 10, 100, 100)) for _ in range(2)]
    return mf.MAML(model, loss="mse", **inner), batches  # type: ignore[return-value]


def omniglot(inner: dict[str, Any]) -> tuple[mf.MAML, Batches]:
    """Four meta-batches of 32 tasks of the paper's MLP, 5 support and 75 query drawings."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in ((784, 256), (256, 128), (128, 64), (64, 64)):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    x_y = [(torch.randn(32, n, 1, 28, 28), torch.randint(5, (32, n))) for n in (5, 75) * 4]
    batches = [(*x_y[i], *x_y[i + 1]) for i in range(0, 8, 2)]
    return mf.MAML(nn.Sequential(*layers, nn.Linear(64, 5)), **inner), batches


CASES: dict[str, Callable[[], tuple[mf.MAML, Batches]]] = {
    "sinusoid": lambda: sinusoid({"lr": 0.001}),
    "sinusoid, Adam": lambda: sinusoid({"inner": mf.Adam(0.001)}),
    "Omniglot MLP": lambda: omniglot({"lr": 0.4}),
    "Omniglot MLP, Adam": lambda: omniglot({"inner": mf.Adam(0.01)}),
}


@torch.no_grad()
def one_for_each(learners: dict[int, mf.MAML], batches: Batches) -> None:
    """An inner loop for each number of steps and measure."""
    for x_s, y_s, x_q, y_q in batches:
        for learner in learners.values():
            learner.meta_loss(x_s, y_s, x_q, y_q, reduction="none").double()
            if learner.loss.takes_labels:
                (learner(x_s, y_s, x_q).argmax(-1) == y_q).double().mean(1)


def rounds(ways: Sequence[Callable[[], object]], count: int) -> Iterator[list[float]]:
    """Milliseconds of each way, after a first round that is not counted."""
    for number in range(count + 1):
        taken = [0.0] * len(ways)
        for place in range(len(ways)):
            way = (place + number) % len(ways)
            start = time.perf_counter()
            ways[way]()
            taken[way] = 1e3 * (time.perf_counter() - start)
        if number:
            yield taken


def shown(values: Sequence[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    count = parser.parse_args().rounds
    print(
        "| case | learners made anew, ms | learners made once, ms | mf.evaluate, ms | times as fast | than those kept |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, make in CASES.items():
        torch.manual_seed(0)
        maml, batches = make()
        tasks = sum(len(batch[0]) for batch in batches)
        kept = {k: maml.with_steps(k) for k in STEPS}

        def anew(maml: mf.MAML = maml, batches: Batches = batches) -> None:
            one_for_each({k: maml.with_steps(k) for k in STEPS}, batches)

        def once(kept: dict[int, mf.MAML] = kept, batches: Batches = batches) -> None:
            one_for_each(kept, batches)

        def ours(maml: mf.MAML = maml, batches: Batches = batches, tasks: int = tasks) -> None:
            mf.evaluate(maml, batches, tasks, STEPS)

        found = list(rounds((anew, once, ours), count))
        times = [[r[way] for r in found] for way in range(3)]
        ratios = [[r[way] / r[2] for r in found] for way in range(2)]
        print(f"| {name} | {' | '.join(map(shown, (*times, *ratios)))} |", flush=True)


if __name__ == "__main__":
    main()
