"""Windows: an epoch misses nothing and repeats nothing, a few source lengths, and slices as numpy cuts them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charseq2seq.windows import FULL_SOURCE_PROBABILITY, WindowSampler, gather, ids_on_device, source_lengths, tile


def sampler(length: int = 1000, source: int = 7, target: int = 5, batch: int = 4, seed: int = 0) -> WindowSampler:
    """A sampler of windows of a text of this length."""
    return WindowSampler(length, source, target, batch, seed)


def batches(windows: WindowSampler, count: int) -> list[tuple[list[int], int]]:
    """The next batches: where their targets begin, and their source length."""
    return [(starts.tolist(), length) for starts, length in (windows.next_batch() for _ in range(count))]


def one_epoch(windows: WindowSampler) -> list[int]:
    """Where the targets begin, batch by batch until the epoch is over; the last batch may reach into the next one."""
    epoch, starts = windows.epoch, []
    while windows.epoch == epoch:
        starts += windows.next_batch()[0].tolist()
    return starts


# --- the order


@given(
    source=st.integers(1, 12),
    target=st.integers(1, 12),
    extra=st.integers(0, 60),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=100, deadline=None)
def test_in_one_epoch_a_character_is_a_target_at_most_once(
    source: int, target: int, extra: int, batch: int, seed: int
) -> None:
    length = source + target + extra
    one_by_one = one_epoch(sampler(length, source, target, 1, seed))
    in_batches = one_epoch(sampler(length, source, target, batch, seed))
    assert in_batches[: len(one_by_one)] == one_by_one, "the batch size does not change the order"
    targets = Counter(start + i for start in one_by_one for i in range(target))
    assert max(targets.values()) == 1
    assert len(targets) > extra + target - 2 * target, "and nearly every character is one"
    assert source <= min(targets) <= max(targets) < length, "there is always a full source before it"


def test_every_epoch_is_shuffled_and_has_an_offset_of_its_own() -> None:
    windows = sampler(batch=1)
    epochs = [one_epoch(windows) for _ in range(20)]
    assert windows.epoch == 20
    assert all(starts != sorted(starts) for starts in epochs)
    assert all(len({start % 5 for start in starts}) == 1 for starts in epochs), "targets lie end to end"
    assert {starts[0] % 5 for starts in epochs} == set(range(5)), "from a random offset"
    assert len({tuple(starts) for starts in epochs}) == 20


@given(
    seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10**6), position=st.integers(0, 150), other=st.integers(1, 99)
)
@settings(max_examples=50, deadline=None)
def test_windows_depend_on_seed_epoch_and_position_alone(seed: int, epoch: int, position: int, other: int) -> None:
    """So a run has the same windows on every device: no device's random numbers or state are asked."""
    results = []
    for global_seed in (0, other):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        state = torch.get_rng_state()
        results.append(batches(WindowSampler(1000, 7, 5, 9, seed, epoch, position), 3))
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1] != batches(sampler(batch=9, seed=seed + 1), 3)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_processes_share_a_batch_without_gap_or_overlap(size: int) -> None:
    alone, ranks = sampler(batch=11), [sampler(batch=11) for _ in range(size)]
    for _ in range(60):
        starts, length = alone.next_batch()
        parts = [windows.next_batch(rank, size) for rank, windows in enumerate(ranks)]
        assert {part_length for _, part_length in parts} == {length}, "shapes are the same in all processes"
        together = torch.empty_like(starts)
        for rank, (part, _) in enumerate(parts):
            together[rank::size] = part
        assert torch.equal(together, starts)


# --- source lengths


def test_the_source_lengths_are_the_full_one_and_its_halves_down_to_none() -> None:
    assert source_lengths(64) == [0, 4, 8, 16, 32, 64]
    assert source_lengths(7) == [0, 1, 3, 7]
    assert source_lengths(1) == [0, 1]


@pytest.mark.parametrize("source", [1, 7, 64])
def test_only_these_source_lengths_occur_and_mostly_the_full_one(source: int) -> None:
    windows, count = sampler(100_000, source=source, batch=8), 4000
    lengths = Counter(length for _, length in batches(windows, count))
    *shorter, full = source_lengths(source)
    assert set(lengths) == {*shorter, full}
    assert FULL_SOURCE_PROBABILITY == 0.8

    def five_deviations(probability: float) -> float:
        return 5 * float(count * probability * (1 - probability)) ** 0.5

    assert lengths[full] == pytest.approx(0.8 * count, abs=five_deviations(0.8))
    for length in shorter:
        probability = 0.2 / len(shorter)
        assert lengths[length] == pytest.approx(probability * count, abs=five_deviations(probability))


# --- slices


@pytest.mark.parametrize(
    ("dtype", "largest"), [(np.uint8, 255), (np.uint16, 255), (np.uint16, 65_535), (np.uint32, 1_114_112)]
)
@given(
    source=st.integers(0, 9),
    target=st.integers(1, 9),
    picks=st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_slices_are_those_of_numpy(
    dtype: type[np.unsignedinteger], largest: int, source: int, target: int, picks: list[int], seed: int
) -> None:
    text = np.random.default_rng(seed).integers(0, largest, 60, endpoint=True).astype(dtype)
    text[::7] = largest
    starts = [source + pick % (60 - source - target + 1) for pick in picks]
    ids = ids_on_device(text, "cpu")
    assert ids.shape == (60,) and ids.element_size() == text.itemsize, "a text keeps its size in memory"
    sources, targets = gather(ids, torch.tensor(starts), source, target)
    assert sources.dtype == targets.dtype == torch.int64
    assert sources.shape == (len(starts), source) and targets.shape == (len(starts), target)
    assert sources.tolist() == [text[start - source : start].tolist() for start in starts]
    assert targets.tolist() == [text[start : start + target].tolist() for start in starts]


def test_a_text_that_is_read_only_or_every_other_id_is_taken_too() -> None:
    text = np.arange(100, dtype=np.uint16)
    text.flags.writeable = False
    assert gather(ids_on_device(text[::2], "cpu"), torch.tensor([3]), 3, 2)[1].tolist() == [[6, 8]]


# --- tiles for evaluation


@given(
    first=st.integers(0, 50),
    count=st.integers(1, 80),
    source=st.integers(1, 9),
    target=st.integers(1, 9),
    batch=st.integers(1, 5),
)
@settings(max_examples=100, deadline=None)
def test_tiles_cover_every_character_once_with_all_the_context_there_is(
    first: int, count: int, source: int, target: int, batch: int
) -> None:
    covered: Counter[int] = Counter()
    for starts, source_length, target_length in tile(first, first + count, source, target, batch):
        assert starts.dtype == torch.int64 and 1 <= len(starts) <= batch
        for start in starts.tolist():
            assert source_length == min(start, source), "the whole source, but at the beginning of a text"
            assert target_length == target or start + target_length == first + count, "only the last one is short"
            covered.update(range(start, start + target_length))
    assert covered == Counter(range(first, first + count))
