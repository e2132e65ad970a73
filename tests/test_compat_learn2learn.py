"""Scripts written for learn2learn give the numbers of the loop that they are, whenever they look."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import random
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import Learner, built, gradients, meta_sgd, mlp, same
from torch import Tensor, nn

import maml_fast as mf
import maml_fast.compat.learn2learn as l2l
from maml_fast.compat import plain
from maml_fast.compat.recorder import RECORDER

MAML = l2l.algorithms.MAML
TASKS = 6


pytestmark = pytest.mark.usefixtures("nothing_waits")


def sine() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


def conv() -> nn.Module:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    )


def data(*shape: int, classes: int = 3, tasks: int = TASKS, seed: int = 0, n: int = 6) -> list[tuple[Tensor, Tensor]]:
    """A support and a query set of each task, in one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, 2 * n, *shape, generator=g, dtype=torch.float64)
    return list(zip(x, torch.randint(classes, (tasks, 2 * n), generator=g), strict=True))


def fused(learner: Any) -> int:
    """Tasks that ran in fused calls."""
    return sum(learner._home.report.tasks.values()) if "_home" in vars(learner) else 0


def compared(
    script: Callable[[Any, nn.Module], Any], make: Callable[[], nn.Module] = mlp, at_least: int = 0, **options: Any
) -> Any:
    """Run a script with ours and with the textbook; both give the same, and the same gradients and parameters."""
    results = []
    for kind in (MAML, Learner):
        model = built(make)
        learner = kind(model, lr=0.1, **options)
        found = script(learner, model)
        results.append((found, gradients(model), [p.detach().clone() for p in model.parameters()]))
        if kind is MAML:
            ours = learner
            assert fused(learner) >= at_least, learner.explain()
    same(*results)
    return ours


def losses(learner: Any, x: Tensor, y: Tensor, steps: int = 1, loss: Any = F.cross_entropy) -> Any:
    """The query loss of a task after some steps, and the query outputs."""
    mine = learner.clone()
    half = len(x) // 2
    for _ in range(steps):
        mine.adapt(loss(mine(x[:half]), y[:half]))
    outputs = mine(x[half:])
    return loss(outputs, y[half:]), outputs


# ---- whole scripts ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5])
def test_sinusoid_script(steps: int) -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        optimizer, lossfn, log = torch.optim.Adam(maml.parameters(), 1e-2), nn.MSELoss(reduction="mean"), []
        for iteration in range(4):
            g = torch.Generator().manual_seed(iteration)
            batch = torch.randn(2, 16, 20, 1, generator=g, dtype=torch.float64)
            meta_train_loss = 0.0
            for i in range(16):
                learner = maml.clone()
                x, y = batch[0][i], batch[1][i]
                x_support, y_support, x_query, y_query = x[::2], y[::2], x[1::2], y[1::2]
                for _ in range(steps):
                    learner.adapt(lossfn(learner(x_support), y_support))
                meta_train_loss += lossfn(learner(x_query), y_query)
            meta_train_loss = meta_train_loss / 16
            if iteration % 2 == 0:
                log.append(meta_train_loss.item() * 1.0)
            optimizer.zero_grad()
            meta_train_loss.backward()
            optimizer.step()
        return [float(v) for v in log]

    maml = compared(script, sine, allow_unused=True)
    assert f"{steps} inner steps: 63 tasks in 4 fused calls" in maml.explain()
    assert "plain autograd: 1 task: the first of its kind" in maml.explain()


def accuracy(predictions: Tensor, targets: Tensor) -> Tensor:
    predictions = predictions.argmax(dim=1).view(targets.shape)
    return (predictions == targets).sum().float() / targets.size(0)


def fast_adapt(batch: Any, learner: Any, loss: Any, steps: int, shots: int, ways: int, device: Any) -> Any:
    """As in the examples of learn2learn: every second sample is of the support set."""
    samples, labels = batch[0].to(device), batch[1].to(device)
    support = np.zeros(samples.size(0), dtype=bool)
    support[np.arange(shots * ways) * 2] = True
    query, support = torch.from_numpy(~support), torch.from_numpy(support)
    for _ in range(steps):
        learner.adapt(loss(learner(samples[support]), labels[support]))
    predictions = learner(samples[query])
    return loss(predictions, labels[query]), accuracy(predictions, labels[query])


def omniglot(maml: Any, model: nn.Module, shape: tuple[int, ...], steps: int) -> Any:
    """The Omniglot example: training and validation tasks in turn, `.item()` after each."""
    device = torch.device("cpu")
    optimizer, loss, log = torch.optim.Adam(maml.parameters(), 3e-3), nn.CrossEntropyLoss(reduction="mean"), []
    for iteration in range(3):
        optimizer.zero_grad()
        sums = [0.0] * 4
        train, valid = (data(*shape, classes=5, tasks=8, seed=2 * iteration + i, n=5) for i in range(2))
        for task in range(8):
            learner = maml.clone()
            error, right = fast_adapt(train[task], learner, loss, steps, 1, 5, device)
            error.backward()
            sums[0] += error.item()
            sums[1] += right.item()
            learner = maml.clone()
            error, right = fast_adapt(valid[task], learner, loss, steps, 1, 5, device)
            sums[2] += error.item()
            sums[3] += right.item()
        log.append([float(f"{s / 8:.17g}") for s in sums])
        for p in maml.parameters():
            p.grad.data.mul_(1.0 / 8)
        optimizer.step()
    return log


@pytest.mark.parametrize(("make", "shape", "steps"), [(mlp, (4,), 1), (mlp, (4,), 3), (conv, (1, 8, 8), 2)])
def test_classification_script(make: Any, shape: Any, steps: int) -> None:
    def network() -> nn.Module:
        return nn.Sequential(make(), nn.Linear(3, 5)) if make is mlp else make()

    maml = compared(lambda m, model: omniglot(m, model, shape, steps), network)
    assert f"meta-gradients, {steps} inner steps: 23 tasks in 3 fused calls" in maml.explain()
    assert "query outputs without gradients: 24 tasks in 3 fused calls" in maml.explain()


def test_meta_sgd_script() -> None:
    found = []
    for make in (lambda m: l2l.algorithms.MetaSGD(m, lr=0.1), lambda m: meta_sgd(m, 0.1)):
        model = built(mlp)
        maml = make(model)
        optimizer = torch.optim.SGD(maml.parameters(), 0.1)
        log = []
        for seed in range(3):
            optimizer.zero_grad()
            for x, y in data(4, seed=seed):
                loss, _ = losses(maml, x, y, steps=2)
                loss.backward()
                log.append(loss.item())
            optimizer.step()
        found.append(([float(v) for v in log], [p.detach().clone() for p in maml.parameters()]))
        if isinstance(maml, nn.Module):
            assert "meta-gradients, 2 inner steps: 17 tasks in 3 fused calls" in maml.explain()
    same(*found)


def test_first_order_and_its_argument() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for x, y in data(4):
            for first_order in (True, False):
                learner = maml.clone()
                learner.adapt(F.cross_entropy(learner(x[:6]), y[:6]), first_order=first_order)
                F.cross_entropy(learner(x[6:]), y[6:]).backward()

    maml = compared(script, at_least=10)
    assert "10 tasks in 2 fused calls" in maml.explain()
    compared(lambda m, _: [losses(m, x, y, 2)[0].backward() for x, y in data(4)], first_order=True, at_least=5)


# ---- every way to derive ------------------------------------------------------------------------


def summed(total: Any, loss: Tensor) -> Any:
    return loss if total is None else total + loss


@pytest.mark.parametrize(
    "whole",
    [
        lambda ls: sum(ls) / len(ls),
        lambda ls: torch.stack(ls).mean(),
        lambda ls: torch.stack(ls).logsumexp(0),
        lambda ls: 0.5 * ls[0] - 2 * ls[1] + 3 - ls[2] / 4 + (-ls[3]) + ls[4] * ls[5],
        lambda ls: torch.cat([v.reshape(1) for v in ls]).square().sum(),
        lambda ls: max(ls),
        lambda ls: torch.stack(ls)[2:].var(),
        lambda ls: (ls[0] * torch.tensor(2.0, dtype=torch.float64) + ls[3]).exp(),
    ],
    ids=["mean", "stack", "logsumexp", "mixed", "cat", "max", "var", "tensor"],
)
def test_functions_of_several_losses(whole: Any) -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for _ in range(2):
            total = whole([losses(maml, x, y)[0] for x, y in data(4)])
            total.backward()
        return total.item() * 1.0

    compared(lambda m, model: float(script(m, model)), at_least=5)


def test_weights_of_each_task() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for i, (x, y) in enumerate(data(4)):
            (losses(maml, x, y)[0] * (i + 1) / 7).backward()

    assert "5 tasks in 1 fused call" in compared(script).explain()


def test_a_sum_in_place() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        total, seen = 0.0, []
        for x, y in data(4):
            loss = losses(maml, x, y)[0]
            total += loss
            loss /= 2
            seen.append(loss.item())
        total.div_(3)
        total.backward()
        return [float(total.detach()), *map(float, seen)]

    assert "5 tasks in 1 fused call" in compared(script).explain()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
        lambda z, y: 0.5 * F.cross_entropy(z, y, reduction="sum"),
        lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
        lambda z, y: ((z - F.one_hot(y, 3)) ** 2).sum(-1).mean() + 0.1 * z.abs().mean(),
        lambda z, y: z.norm(),
        lambda z, y: -z.log_softmax(-1).gather(1, y[:, None]).mean(),
        lambda z, y: F.smooth_l1_loss(z, F.one_hot(y, 3).double()),
        lambda z, y: F.mse_loss(z.argmax(1).double() * z.sum(1), y.double()),
    ],
)
def test_losses(loss: Any) -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        for x, y in data(4):
            value, outputs = losses(maml, x, y, steps=2, loss=loss)
            value.backward()
            found += [value.item(), outputs.detach().max().item()]
        return list(map(float, found))

    compared(script, at_least=5)


def test_another_query_loss() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for x, y in data(4):
            _, outputs = losses(maml, x, y)
            (1 - outputs.softmax(-1).gather(1, y[6:, None])).mean().backward()

    assert "gradients through query outputs: 5 tasks in 1 fused call" in compared(script).explain()


def test_a_loss_of_two_query_sets() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for x, y in data(4):
            learner = maml.clone()
            learner.adapt(F.cross_entropy(learner(x[:6]), y[:6]))
            (F.cross_entropy(learner(x[6:9]), y[6:9]) + F.cross_entropy(learner(x[9:]), y[9:])).backward()

    compared(script, at_least=5)


def test_steps_on_other_data_run_plainly() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for x, y in data(4):
            learner = maml.clone()
            for part in (slice(0, 3), slice(3, 6)):
                learner.adapt(F.cross_entropy(learner(x[part]), y[part]))
            F.cross_entropy(learner(x[6:]), y[6:]).backward()

    maml = compared(script)
    assert re.search(r"plain autograd: 5 tasks: inner steps adapt on different data \(.*:\d+\)", maml.explain())


def test_the_same_data_cut_anew_in_every_step_is_fused() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for x, y in data(4):
            learner = maml.clone()
            for _ in range(3):
                learner.adapt(F.cross_entropy(learner(x[torch.arange(6)]), y[torch.arange(6)]))
            F.cross_entropy(learner(x[6:]), y[6:]).backward()

    compared(script, at_least=5)


def test_no_steps() -> None:
    compared(lambda m, _: [losses(m, x, y, steps=0)[0].backward() for x, y in data(4)])


def test_tasks_of_different_shapes() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        for _ in range(2):
            for n in (3, 4, 3, 5, 4, 3):
                ((x, y),) = data(4, n=n, tasks=1)
                loss, _ = losses(maml, x, y)
                loss.backward()
                found.append(loss.item())
        return list(map(float, found))

    compared(script, at_least=9)


# ---- whoever looks sees what the loop would have shown ------------------------------------------


def test_gradients_in_the_middle_of_a_loop() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        seen, held = [], list(model.parameters())
        for i, (x, y) in enumerate(data(4, tasks=8)):
            losses(maml, x, y)[0].backward()
            if i == 3:
                seen += [held[0].grad.norm().item(), model[2].bias.grad.sum().item()]
            if i == 5:
                held[1].grad.zero_()
        return seen

    compared(script, at_least=7)


@pytest.mark.parametrize("none", [True, False])
def test_zeroing_gradients(none: bool) -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for i, (x, y) in enumerate(data(4, tasks=8)):
            losses(maml, x, y)[0].backward()
            if i == 4:
                model.zero_grad(set_to_none=none)

    compared(script)


def test_reading_everything_between_the_steps() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        seen = []
        for x, y in data(4):
            learner = maml.clone()
            for _ in range(3):
                outputs = learner(x[:6])
                loss = F.cross_entropy(outputs, y[:6])
                seen += [loss.item(), outputs.tolist(), outputs.detach().numpy().copy().sum(), bool(loss > 1)]
                learner.adapt(loss)
            loss = F.cross_entropy(learner(x[6:]), y[6:])
            seen.append(loss.item() + 0.0)
            loss.backward()
        return [float(np.sum(s)) for s in seen]

    compared(script)


def test_printing() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        texts = []
        for x, y in data(4, tasks=3):
            loss, outputs = losses(maml, x, y)
            item = loss.item()
            texts += [f"{item:.3f} {loss:.4f}", "%.3f" % item, str(round(item, 2))]  # noqa: UP031
            texts += [repr(loss), str(outputs.detach())]
            texts.append(f"{item}"[:12])
        return texts

    ours, theirs = (script(kind(built(mlp), lr=0.1), nn.Identity()) for kind in (MAML, Learner))
    assert ours == theirs


def test_a_number_is_like_a_float() -> None:
    maml, tasks = MAML(built(mlp), lr=0.1), data(4)
    losses(maml, *tasks[0])
    loss, _ = losses(maml, *tasks[1])
    number, value = loss.item(), losses(Learner(built(mlp), lr=0.1), *tasks[1])[0].item()
    assert isinstance(number, float) and type(number) is not float
    assert number + 1 - 0.5 * number / 2 == pytest.approx(value + 1 - 0.25 * value, rel=1e-12)
    loss, _ = losses(maml, *tasks[1])
    number = loss.item()
    for function in (math.sqrt, float, bool, int, str, round, abs, hash, np.sqrt, lambda v: v**2, lambda v: 2 // v):
        assert function(losses(maml, *tasks[1])[0].item()) == function(float(number))
    assert np.mean([number, 1.0]) == np.mean([float(number), 1.0])
    assert pickle.loads(pickle.dumps(number)) == copy.deepcopy(number) == number
    assert json.dumps(float(number))
    assert sorted([number, 0.0, 9.0]) == [0.0, number, 9.0] and max(number, 0) is number
    total = sum(losses(maml, x, y)[0].item() for x, y in tasks)
    assert total == pytest.approx(sum(losses(maml, x, y)[0].tolist() for x, y in tasks))


def test_a_number_keeps_what_it_was() -> None:
    """A tensor that changes in place after `.item()`, and one of which another shares the memory."""

    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        for x, y in data(4):
            loss, outputs = losses(maml, x, y)
            before = loss.item()
            shared = loss.detach()
            loss *= 2
            found += [before, loss.item(), shared.item()]
            part = outputs.detach()[0]
            part[0] = 7.0
            found += [outputs[0, 0].item(), part.sum().item()]
        return list(map(float, found))

    compared(script)


def test_parameters_changed_between_tasks() -> None:
    """In every way that there is: each task is computed with those it was cloned from."""
    changes: list[Callable[[nn.Module], Any]] = [
        lambda m: m[0].weight.data.mul_(1.1),
        lambda m: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}),
        lambda m: nn.init.constant_(m[2].bias, 0.3),
        lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach() + 1)),
        lambda m: m[0].weight.detach().numpy().__imul__(0.9),
        lambda m: m.__setitem__(1, nn.ReLU()),
        lambda m: torch._foreach_add_(list(m.parameters()), 0.01) if True else None,
    ]

    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        for i, (x, y) in enumerate(data(4, tasks=10)):
            found.append(losses(maml, x, y)[0])
            if 1 < i < 2 + len(changes):
                with torch.no_grad():
                    changes[i - 2](model)
            if isinstance(maml, Learner):
                maml.theta = dict(model.named_parameters())
        return [v.tolist() for v in found]

    compared(script)


def test_a_loss_is_derived_after_its_parameters_changed() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        kept = [losses(maml, x, y)[0] for x, y in data(4)]
        with torch.no_grad():
            model[0].weight.add_(1.0)
        for loss in kept[1:]:
            loss.backward()
        return [v.tolist() for v in kept]

    compared(script)


def test_inputs_changed_after_they_were_used() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        array = np.zeros((12, 4))
        buffer, found = torch.from_numpy(array), []
        for x, y in data(4):
            array[:] = x.numpy()
            learner = maml.clone()
            learner.adapt(F.cross_entropy(learner(buffer[:6]), y[:6]))
            whole = learner(buffer)
            found.append(F.cross_entropy(whole, y))
            found[-1].backward()
            array[:] = 0
            y.fill_(0)
        return [v.item() * 1.0 for v in found]

    compared(lambda m, model: [float(v) for v in script(m, model)], at_least=5)


def test_modes_changed_after_they_were_used() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))

    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        for _ in range(2):
            model.eval()
            found += [losses(maml, x, y)[0].item() for x, y in data(4)]
            model.train()
        return [float(v) for v in found]

    compared(script, network, at_least=11)


def test_evaluation_without_gradients() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        for x, y in data(4):
            learner = maml.clone()
            learner.adapt(F.cross_entropy(learner(x[:6]), y[:6]))
            with torch.no_grad():
                outputs = learner(x[6:])
                found += [F.cross_entropy(outputs, y[6:]), (outputs.argmax(1) == y[6:]).double().mean()]
            assert not outputs.requires_grad
        return [v.item() * 1.0 for v in found]

    ours, theirs = (script(kind(built(mlp), lr=0.1), nn.Identity()) for kind in (MAML, Learner))
    same([float(v) for v in ours], theirs)


# ---- what cannot be fused -----------------------------------------------------------------------


def test_dropout_runs_in_the_order_of_the_loop() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))

    def script(maml: Any, model: nn.Module) -> Any:
        torch.manual_seed(0)
        return [(losses(maml, x, y)[0].backward(), torch.rand(1).item())[1] for x, y in data(4)]

    assert "random numbers are drawn (dropout)" in compared(script, network).explain()


def test_running_statistics_end_as_in_the_loop() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def script(maml: Any, model: nn.Module) -> Any:
        for x, y in data(4):
            losses(maml, x, y)[0].backward()
        return [b.clone() for b in model.buffers()]

    assert "running statistics" in compared(script, network).explain()


def test_parameters_of_a_learner() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        for x, y in data(4):
            learner = maml.clone()
            learner.adapt(F.cross_entropy(learner(x[:6]), y[:6]))
            penalty = sum(p.square().sum() for p in learner.parameters())
            loss = F.cross_entropy(learner(x[6:]), y[6:]) + 0.1 * penalty
            loss.backward()
            found.append(loss.item())
        return found

    class Ours(Learner):
        def parameters(self) -> list[Tensor]:
            return list(self.theta.values())

    ours, theirs = (script(kind(built(mlp), lr=0.1), nn.Identity()) for kind in (MAML, Ours))
    same(ours, theirs)
    maml = MAML(built(mlp), lr=0.1)
    script(maml, nn.Identity())
    assert re.search(r"'parameters' of a learner is used \(.*test_compat_learn2learn.py:\d+\)", maml.explain())


def test_unused_and_frozen_parameters() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return self.used(x)

    def script(maml: Any, model: nn.Module) -> Any:
        for x, y in data(4):
            losses(maml, x, y)[0].backward()

    maml = compared(script, Half, allow_unused=True, at_least=5)
    assert maml.module.unused.weight.grad is None
    frozen = []
    for kind, options in ((MAML, {"allow_nograd": True}), (Learner, {})):
        model = built(mlp)
        model[0].weight.requires_grad_(False)
        learner = kind(model, lr=0.1, **options)
        script(learner, model)
        frozen.append(gradients(model))
    same(*frozen)
    assert frozen[0][0] is None
    with pytest.raises(RuntimeError, match=r"unused|not have been used"):
        losses(MAML(built(Half), lr=0.1), *data(4)[0])
    model = built(mlp)
    model[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="allow_nograd=True"):
        losses(MAML(model, lr=0.1), *data(4)[0])


def test_hooks() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        seen: list[float] = []
        model[0].register_forward_hook(lambda *_: seen.append(1.0))
        for x, y in data(4, tasks=2):
            losses(maml, x, y)[0].backward()
        return seen

    assert "a module has hooks" in compared(script).explain()

    def on_tensors(maml: Any, model: nn.Module) -> Any:
        seen = []
        for x, y in data(4):
            loss, outputs = losses(maml, x, y)
            outputs.register_hook(lambda g: seen.append(g.sum().item()))
            loss.backward()
        return seen

    compared(on_tensors)

    def on_parameters(maml: Any, model: nn.Module) -> Any:
        seen = []
        for i, (x, y) in enumerate(data(4)):
            losses(maml, x, y)[0].backward()
            if i == 2:
                model[0].weight.register_hook(lambda g: seen.append(g.sum().item()) or 2 * g)
        return seen

    compared(on_parameters)


def test_second_backward_and_retained_graphs() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for i, (x, y) in enumerate(data(4)):
            loss, outputs = losses(maml, x, y)
            loss.backward(retain_graph=i % 2 == 0)
            if i % 2 == 0:
                (loss + outputs.square().mean()).backward()
            else:
                with pytest.raises(RuntimeError, match="second time"):
                    loss.backward()

    compared(script)


def test_two_losses_of_one_learner() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for x, y in data(4):
            loss, outputs = losses(maml, x, y)
            loss.backward(retain_graph=True)
            outputs.square().mean().backward()

    compared(script)


def test_errors_are_raised_where_they_are_made() -> None:
    maml = MAML(built(mlp), lr=0.1)
    for x, y in data(4):
        losses(maml, x, y)[0].backward()
    learner = maml.clone()
    x, y = data(4)[0]
    with pytest.raises(RuntimeError, match=r"shape|size"):
        learner(x[:, :3])
    outputs = maml.clone()(x)
    with pytest.raises(RuntimeError, match="size"):
        outputs + torch.ones(5, 2)
    with pytest.raises(ValueError, match="batch_size"):
        F.cross_entropy(outputs, y[:3])
    with pytest.raises(RuntimeError, match="scalar outputs"):
        outputs.backward()
    with pytest.raises(RuntimeError, match="does not require grad"):
        outputs.detach().sum().backward()
    with pytest.raises(RuntimeError, match="scalar outputs"):
        maml.clone().adapt(maml.clone()(x))
    with pytest.raises(IndexError):
        outputs[50]
    losses(maml, x, y)[0].backward()
    assert model_gradients_finite(maml)


def model_gradients_finite(maml: Any) -> bool:
    return all(torch.isfinite(p.grad).all() for p in maml.parameters())


def test_labels_out_of_range_are_an_error() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for x, y in data(4):
            losses(maml, x, torch.where(torch.arange(12) % 4 == 0, -100, y))[0].backward()

    compared(script)
    maml = MAML(built(mlp), lr=0.1)
    x, y = data(4)[0]
    losses(maml, x, y)[0].backward()
    losses(maml, x, y + 7)[0].backward()
    with pytest.raises(IndexError, match="out of bounds"):
        maml.module[0].weight.grad.sum()


def test_an_exception_in_the_middle_of_a_loop() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        def loop() -> None:
            for i, (x, y) in enumerate(data(4)):
                losses(maml, x, y)[0].backward()
                if i == 3:
                    raise KeyError(i)

        with pytest.raises(KeyError):
            loop()
        for x, y in data(4, seed=1):
            losses(maml, x, y)[0].backward()

    compared(script, at_least=9)


def test_an_interrupt_loses_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from maml_fast.compat import fused as running

    def script(maml: Any, model: nn.Module) -> Any:
        for i, (x, y) in enumerate(data(4)):
            losses(maml, x, y)[0].backward()
            if i == 3 and isinstance(maml, MAML):
                monkeypatch.setattr(running, "_gradients", _interrupted)
                with pytest.raises(KeyboardInterrupt):
                    model[0].weight.grad  # noqa: B018
                monkeypatch.undo()

    compared(script)


def _interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


# ---- learners as modules ------------------------------------------------------------------------


def test_a_clone_of_a_clone() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        for x, y in data(4):
            learner = maml.clone()
            learner.adapt(F.cross_entropy(learner(x[:6]), y[:6]))
            second = learner.clone()
            second.adapt(F.cross_entropy(second(x[:6]), y[:6]))
            loss = F.cross_entropy(second(x[6:]), y[6:]) + F.cross_entropy(learner(x[6:]), y[6:])
            loss.backward()
            found.append(loss.item())
        return found

    compared(script)


def test_copies_pickles_and_state() -> None:
    model = built(mlp)
    maml = MAML(model, lr=0.1)
    for x, y in data(4):
        losses(maml, x, y)[0].backward()
    other = copy.deepcopy(maml)
    third = pickle.loads(pickle.dumps(maml))
    for made in (other, third):
        assert list(made.state_dict()) == list(maml.state_dict()) == [f"module.{k}" for k in model.state_dict()]
        assert all(type(p) is nn.Parameter for p in made.parameters())
        losses(made, *data(4)[0])[0].backward()
    file = io.BytesIO()
    torch.save(maml.state_dict(), file)
    assert made.lr == 0.1 and made.load_state_dict(maml.state_dict())
    learner = maml.clone()
    learner.adapt(F.cross_entropy(learner(x[:6]), y[:6]))
    assert isinstance(learner, MAML) and isinstance(learner, nn.Module) and learner.lr == 0.1
    assert list(learner.state_dict()) == list(maml.state_dict())
    assert not any(p.is_leaf for p in learner.parameters())
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(learner)
    assert other.module[0].weight.grad is None or other.module[0].weight.grad is not model[0].weight.grad


def test_attributes_of_the_module() -> None:
    class Named(nn.Sequential):
        classes = 3

        def twice(self, x: Tensor) -> Any:
            return 2 * self(x)

    maml = MAML(Named(nn.Linear(4, 3)).double(), lr=0.1)
    x, _ = data(4)[0]
    assert maml.classes == 3 and maml.clone().classes == 3
    torch.testing.assert_close(maml.clone().twice(x), 2 * maml(x))


def test_in_threads() -> None:
    found: dict[int, Any] = {}

    models = [built(mlp, seed) for seed in range(3)]

    def work(seed: int) -> None:
        model = models[seed]
        maml = MAML(model, lr=0.1)
        for x, y in data(4, seed=seed):
            losses(maml, x, y)[0].backward()
        found[seed] = gradients(model)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for seed in range(3):
        model = built(mlp, seed)
        for x, y in data(4, seed=seed):
            losses(Learner(model, lr=0.1), x, y)[0].backward()
        same(found[seed], gradients(model))


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from maml_fast.compat import recorder

    monkeypatch.setattr(recorder, "MOST_TASKS", 4)
    maml = compared(lambda m, _: [losses(m, x, y)[0].backward() for x, y in data(4, tasks=13)])
    assert "12 tasks in 3 fused calls" in maml.explain()
    maml, before = MAML(built(mlp), lr=0.1), len(RECORDER.tasks)
    for x, y in data(4):
        losses(maml, x, y)
    assert len(RECORDER.tasks) == before, "tasks whose results nobody holds are gone"


def test_plain() -> None:
    with plain():
        maml = compared(lambda m, _: [losses(m, x, y)[0].backward() for x, y in data(4)])
    assert fused(maml) == 0


def test_a_hidden_operation_is_refused() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    maml = MAML(built(mlp), lr=0.1)
    for x, y in data(4, tasks=2):
        loss, _ = losses(maml, x, y)
        with pytest.raises(RuntimeError, match="hides from __torch_function__"):
            Double.apply(loss).backward()


def test_a_write_through_memory_that_is_shared_is_refused() -> None:
    model = built(mlp)
    maml, alias = MAML(model, lr=0.1), model[0].weight.detach().numpy()
    tasks = data(4)
    losses(maml, *tasks[0])[0].backward()
    losses(maml, *tasks[1])[0].backward()
    alias += 1
    losses(maml, *tasks[2])[0].backward()
    for _ in range(5):
        with pytest.raises(RuntimeError, match="shares its memory"):
            model[0].weight.grad  # noqa: B018
    RECORDER.asked.clear()


# ---- functions on modules -----------------------------------------------------------------------


def test_clone_update_and_detach() -> None:
    model = built(mlp)
    x, y = data(4)[0]
    clone = l2l.clone_module(model)
    found = torch.autograd.grad(F.cross_entropy(clone(x), y), list(clone.parameters()), create_graph=True)
    l2l.update_module(clone, updates=[-0.1 * g for g in found])
    F.cross_entropy(clone(x), y).backward()
    other = built(mlp)
    learner = Learner(other, lr=0.1)
    mine = learner.clone()
    mine.adapt(F.cross_entropy(mine(x), y))
    F.cross_entropy(mine(x), y).backward()
    same(gradients(model), gradients(other))
    clone = l2l.clone_module(model)
    l2l.detach_module(clone, keep_requires_grad=True)
    model.zero_grad()
    F.cross_entropy(clone(x), y).backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in clone.parameters())
    l2l.detach_module(clone)
    assert not any(p.requires_grad for p in clone.parameters())


def test_clones_of_shared_parameters_and_recurrent_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.rnn = nn.GRU(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.rnn(self.b(self.a(x))[:, None])[0][:, 0]

    clone = l2l.clone_module(built(Tied))
    assert clone.a.weight is clone.b.weight

    def script(maml: Any, model: nn.Module) -> Any:
        for x, y in data(4):
            losses(maml, x, y)[0].backward()

    compared(script, Tied)


def test_import_costs_nothing() -> None:
    assert mf.compat.learn2learn is l2l
    with pytest.raises(AttributeError, match="keep that import from learn2learn"):
        l2l.vision  # noqa: B018


def test_numbers_as_arguments() -> None:
    """A number that waits, one of NumPy's, and a tensor that is not recorded."""

    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        for x, y in data(4):
            loss, _ = losses(maml, x, y)
            total = torch.zeros((), dtype=torch.float64)
            total += loss
            scaled = loss * loss.item() + np.float64(0.5) * loss + loss * np.float64(2)
            (scaled + total).backward()
            found.append(scaled.tolist())
        return found

    compared(script)


def test_results_made_without_gradients_are_constants_of_a_loss() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        for x, y in data(4):
            loss, outputs = losses(maml, x, y)
            with torch.no_grad():
                weights = outputs.softmax(-1)
            (outputs * weights + outputs.exp() * outputs.detach()).sum().add(loss).backward()

    compared(script, at_least=5)


_scale = [1.0]


def test_state_that_changes_for_every_task() -> None:
    """An attribute, what an attribute holds, and what the code finds outside of the module."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale, self.table = mlp(), 1.0, {"scale": 1.0}

        def forward(self, x: Tensor) -> Any:
            return self.net(x) * self.scale

    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        for i, (x, y) in enumerate(data(4)):
            model.scale = 1.0 + i
            loss, _ = losses(maml, x, y)
            loss.backward()
            found.append(loss.item())
        return list(map(float, found))

    compared(script, Scaled)

    class Held(Scaled):
        def forward(self, x: Tensor) -> Any:
            return self.net(x) * self.table["scale"] * _scale[0]

    for change in (lambda m: m.table.update(scale=3.0), lambda _: _scale.__setitem__(0, _scale[0] + 1)):
        maml = MAML(built(Held), lr=0.1)
        found = [losses(maml, x, y)[0] for x, y in data(4)]
        first = found[1].tolist()
        change(maml.module)
        found[3].backward()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="changed in place after tasks were recorded"):
                maml.module.net[0].weight.grad  # noqa: B018
        assert found[1].tolist() == first
        RECORDER.asked.clear()


def test_a_learner_that_is_older_than_its_parameters() -> None:
    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        for x, y in data(4):
            older = maml.clone()
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)
            older.adapt(F.cross_entropy(older(x[:6]), y[:6]))
            loss = F.cross_entropy(older(x[6:]), y[6:])
            loss.backward()
            found.append(loss.tolist())
        return found

    compared(script)


def test_running_statistics_that_change_under_a_learner() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def script(maml: Any, model: nn.Module) -> Any:
        found = []
        model.eval()
        for x, y in data(4):
            learner = maml.clone()
            learner.adapt(F.cross_entropy(learner(x[:6]), y[:6]))
            with torch.no_grad():
                model[1].running_mean.add_(0.5)
            found.append(F.cross_entropy(learner(x[6:]), y[6:]).tolist())
        return found

    compared(script, network)


def test_a_step_after_a_backward_pass_raises_as_it_does() -> None:
    maml = MAML(built(mlp), lr=0.1)
    for x, y in data(4):
        learner = maml.clone()
        learner.adapt(F.cross_entropy(learner(x[:6]), y[:6]))
        loss = F.cross_entropy(learner(x[6:]), y[6:])
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            learner.adapt(loss)


def test_pythons_random_numbers() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Any:
            return self.net(x) * (1 + random.random())

    def script(maml: Any, model: nn.Module) -> Any:
        random.seed(0)
        found = [losses(maml, x, y)[0] for x, y in data(4)]
        return [v.tolist() for v in found]

    compared(script, Noisy)
