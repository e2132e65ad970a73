"""Milliseconds per iteration of scripts for learn2learn and higher, recorded and as the loops that they are.

    python benchmarks/compat.py [--seconds 10] [--script sinusoid]

The loop is the same script inside `maml_fast.compat.plain()`: the libraries' own algorithms by plain autograd, task by
task. The two take turns, iteration by iteration. Data are made before the clock starts. Medians, with minimum and
maximum; `torch.set_num_threads(1)` is in force, as one thread is the fastest for the loops.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_fast.compat import explain, higher, plain
from maml_fast.compat import learn2learn as l2l

Iteration = Callable[[], None]


def dense(*sizes: int, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b, track_running_stats=False)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def conv(ways: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (1, 64, 64):
        layers += [nn.Conv2d(channels, 64, 3), nn.BatchNorm2d(64, momentum=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, ways))


def sinusoid() -> tuple[Any, Iteration]:
    """learn2learn's examples/maml_sine.py: 16 tasks, 5 steps on 10 points."""
    maml = l2l.algorithms.MAML(dense(1, 32, 32, 1), lr=0.01, allow_unused=True)
    optimizer, loss = torch.optim.Adam(maml.parameters(), 1e-3), nn.MSELoss()
    xs, ys = torch.randn(2, 16, 20, 1)

    def iteration() -> None:
        total = 0.0
        for x, y in zip(xs, ys, strict=True):
            learner = maml.clone()
            for _ in range(5):
                learner.adapt(loss(learner(x[::2]), y[::2]))
            total += loss(learner(x[1::2]), y[1::2])
        optimizer.zero_grad()
        (total / 16).backward()
        optimizer.step()

    return maml, iteration


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(dim=1) == labels).sum().float() / labels.size(0)


def omniglot() -> tuple[Any, Iteration]:
    """learn2learn's examples/vision/maml_omniglot.py: its MLP, 32 training and 32 validation tasks, 5-way 1-shot."""
    maml = l2l.algorithms.MAML(dense(784, 256, 128, 64, 64, 5, norm=True), lr=0.5)
    optimizer, loss = torch.optim.Adam(maml.parameters(), 3e-3), nn.CrossEntropyLoss()
    xs, labels = torch.randn(64, 10, 1, 28, 28), torch.arange(5).repeat_interleave(2)

    def fast_adapt(x: Tensor) -> tuple[Tensor, Tensor]:
        learner = maml.clone()
        learner.adapt(loss(learner(x[::2]), labels[::2]))
        outputs = learner(x[1::2])
        return loss(outputs, labels[1::2]), accuracy(outputs, labels[1::2])

    def iteration() -> None:
        optimizer.zero_grad()
        sums = [0.0] * 4
        for task in range(32):
            error, right = fast_adapt(xs[2 * task])
            error.backward()
            sums[0], sums[1] = sums[0] + error.item(), sums[1] + right.item()
            error, right = fast_adapt(xs[2 * task + 1])
            sums[2], sums[3] = sums[2] + error.item(), sums[3] + right.item()
        assert "nan" not in " ".join(f"{s / 32:.4f}" for s in sums)
        for p in maml.parameters():
            p.grad.data.mul_(1.0 / 32)
        optimizer.step()

    return maml, iteration


def higher_omniglot() -> tuple[Any, Iteration]:
    """higher's examples/maml-omniglot.py: its network, 8 tasks (there 32), 5 steps, 5-way 5-shot, 15 queries."""
    net = conv(5)
    optimizer, inner = torch.optim.Adam(net.parameters(), 1e-3), torch.optim.SGD(net.parameters(), lr=0.1)
    x_s, x_q = torch.randn(8, 25, 1, 28, 28), torch.randn(8, 75, 1, 28, 28)
    y_s, y_q = torch.arange(5).repeat(5), torch.arange(5).repeat(15)

    def iteration() -> None:
        optimizer.zero_grad()
        losses, right = [], []
        for i in range(8):
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
                for _ in range(5):
                    diffopt.step(F.cross_entropy(fnet(x_s[i]), y_s))
                outputs = fnet(x_q[i])
                loss = F.cross_entropy(outputs, y_q)
                losses.append(loss.detach())
                right.append((outputs.argmax(dim=1) == y_q).sum().item() / 75)
                loss.backward()
        optimizer.step()
        f"{sum(losses) / 8:.4f} {sum(right) / 8:.4f}"

    return net, iteration


SCRIPTS = {"sinusoid": sinusoid, "omniglot": omniglot, "higher-omniglot": higher_omniglot}


def turns(seconds: float) -> Iterator[None]:
    """At least five, for about so long."""
    end, count = perf_counter() + seconds, 0
    while count < 5 or perf_counter() < end:
        yield
        count += 1


def measure(make: Callable[[], tuple[Any, Iteration]], seconds: float) -> tuple[str, str]:
    """A row of the table, and what ours says of it."""
    torch.manual_seed(0)
    learner, ours = make()
    _, theirs = make()
    times: dict[str, list[float]] = {"ours": [], "loop": []}
    for _ in range(3):
        ours()
    for _ in turns(seconds):
        for name, iteration, mode in (("ours", ours, nullcontext()), ("loop", theirs, plain())):
            with mode:
                start = perf_counter()
                iteration()
                times[name].append(1e3 * (perf_counter() - start))
    ratio = median(b / a for a, b in zip(times["ours"], times["loop"], strict=True))
    cells = [f"{median(v):.3g} ({min(v):.3g}–{max(v):.3g})" for v in times.values()]
    return f"| {make.__doc__} | {cells[1]} | {cells[0]} | {ratio:.1f}× |", explain(learner)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each script")
    parser.add_argument("--script", choices=SCRIPTS, action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| script | loop, ms | recorded, ms | times as fast |\n| --- | --- | --- | --- |")
    for name in arguments.script or SCRIPTS:
        row, said = measure(SCRIPTS[name], arguments.seconds)
        print(row)
        print("\n".join(f"    {line}" for line in said.splitlines()))


if __name__ == "__main__":
    main()
