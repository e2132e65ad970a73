"""Samplers in the workers of a DataLoader."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from maml_fast.data import Episodes, LabelledSet, MetaBatch, Sampler, Sinusoids


def episodes(seed: int = 0) -> Episodes:
    data = LabelledSet(torch.arange(120.0).view(60, 2), torch.full((6,), 10))
    return Episodes(data, 2, 3, 1, 2, seed=seed, ahead=3)


def sinusoids(seed: int = 0) -> Sinusoids:
    return Sinusoids(2, 3, 4, seed=seed, ahead=3)


class Endless(IterableDataset[MetaBatch]):
    """What people write around an iterator."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[MetaBatch]:
        return iter(self.sampler)


class Indexed(torch.utils.data.Dataset[MetaBatch]):
    """What people write who know map-style sets only."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> MetaBatch:
        return next(self.sampler)


class Ending(IterableDataset[MetaBatch]):
    """Leaves a worker with nothing to send when it exits, where PyTorch's sending thread may abort a spawned one."""

    def __init__(self, sampler: Sampler, per_worker: int) -> None:
        self.sampler, self.per_worker = sampler, per_worker

    def __iter__(self) -> Iterator[MetaBatch]:
        return islice(self.sampler, self.per_worker)


class MadeThere(IterableDataset[MetaBatch]):
    """The sampler is made in the worker."""

    def __init__(self, sampler: Sampler) -> None:
        pass

    def __iter__(self) -> Iterator[MetaBatch]:
        return iter(sinusoids())


class Stateful(IterableDataset[Any]):
    """Gives each meta-batch with the state after it, as loaders that can be resumed keep it; starts at given states."""

    def __init__(self, sampler: Sampler, states: dict[int, Any]) -> None:
        self.sampler, self.states = sampler, states

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info().id
        if worker in self.states:
            self.sampler.load_state_dict(self.states[worker])
        for batch in self.sampler:
            yield batch, worker, self.sampler.state_dict()


def loader(data: Any, workers: int, **settings: Any) -> DataLoader[MetaBatch]:
    return DataLoader(data, batch_size=None, num_workers=workers, **settings)


def key(batch: MetaBatch) -> bytes:
    return b"".join(part.numpy().tobytes() for part in batch)


def take(batches: Any, number: int) -> list[bytes]:
    stream = iter(batches)
    return [key(next(stream)) for _ in range(number)]


SAMPLERS = pytest.mark.parametrize("make", [episodes, sinusoids])


@SAMPLERS
@pytest.mark.parametrize("wrap", [lambda sampler: sampler, Endless, Indexed])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_stream_is_the_same_for_any_number_of_workers(make: Any, wrap: Any, workers: int) -> None:
    assert take(loader(wrap(make()), workers), 14) == take(make(), 14)
    assert take(loader(wrap(make(seed=1)), workers), 14) == take(make(seed=1), 14) != take(make(), 14)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_three_workers_share_the_stream_too() -> None:
    assert take(loader(episodes(), 3), 14) == take(episodes(), 14)


def test_samplers_made_in_the_workers_share_the_stream_too() -> None:
    assert take(loader(MadeThere(sinusoids()), 2), 8) == take(sinusoids(), 8)


def test_workers_go_on_from_the_position_of_the_sampler() -> None:
    sampler, straight = episodes(), take(episodes(), 20)
    assert take(sampler, 5) == straight[:5]
    assert take(loader(sampler, 2), 15) == straight[5:]


@SAMPLERS
def test_every_pass_takes_other_meta_batches_and_is_reproducible(make: Any) -> None:
    batches = loader(make(), 2)
    passes = [take(batches, 6) for _ in range(3)]
    assert len({each for one in passes for each in one}) == 18
    again = loader(copy.deepcopy(make()), 2)
    assert [take(again, 6) for _ in range(3)] == passes


@pytest.mark.no_sanitizer
def test_spawned_workers_are_the_same_as_forked_ones() -> None:
    def passes(**settings: Any) -> list[list[bytes]]:
        batches = loader(Ending(episodes(), 2), 2, **settings)
        return [[key(batch) for batch in batches] for _ in range(2)]

    assert passes(multiprocessing_context="spawn") == passes()


def test_workers_that_stay_go_on_with_the_stream() -> None:
    batches = loader(episodes(), 2, persistent_workers=True)
    assert len({*take(batches, 6), *take(batches, 6)}) == 12


def test_states_taken_in_the_workers_continue_them() -> None:
    straight, states = take(sinusoids(), 20), {}
    stream = iter(loader(Stateful(sinusoids(), {}), 2))
    for _ in range(8):
        _, worker, states[worker] = next(stream)
    stream = iter(loader(Stateful(sinusoids(), states), 2))
    assert [key(next(stream)[0]) for _ in range(12)] == straight[8:]


def test_state_that_workers_left_behind_is_refused() -> None:
    sampler = episodes()
    sampler.state_dict()
    take(loader(sampler, 1), 1)
    with pytest.raises(RuntimeError, match="DataLoader workers drew from copies of this sampler"):
        sampler.state_dict()


def test_state_of_another_worker_is_refused() -> None:
    stream = iter(loader(Stateful(sinusoids(), {}), 2))
    _, _, state = next(stream)
    with pytest.raises(ValueError, match="worker: the state is that of worker 0 of 2, this is no worker"):
        sinusoids().load_state_dict(state)


@SAMPLERS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_copies_go_on_where_the_original_was(make: Any, duplicate: Any) -> None:
    sampler = make()
    take(sampler, 4)
    assert take(duplicate(sampler), 6) == take(sampler, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"next": -1}, "next: expected an integer from 0 to 3, got -1"),
        ({"next": 4}, "next: expected an integer from 0 to 3, got 4"),
        ({"next": True}, "next: expected an integer"),
        ({"ahead": 2}, "ahead: the state was saved with 2"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, "generator: expected the state of one on cpu"),
        ({"generator": None}, "generator: expected the state"),
    ],
)
def test_states_that_are_none_are_refused_and_change_nothing(change: dict[str, Any], message: str) -> None:
    sampler, straight = sinusoids(), take(sinusoids(), 8)
    take(sampler, 2)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(sampler.state_dict() | change)
    with pytest.raises(ValueError, match="state: expected a sampler's, which has next"):
        sampler.load_state_dict({"generator": None, "ahead": 3})
    assert take(sampler, 6) == straight[2:]
