"""Batches of as many rows as a budget of tokens holds, planned before training: `max_tokens_per_batch`.

Rows of like length make a class. What a batch is made of is planned once, in classes; each epoch then gives the places
of a class to its rows at random. So every epoch has as many batches, and none is ever over the budget:

    rows        900  880  610  600  590  310  40  35        a budget of 1,600 tokens
    classes      A    A    B    B    B    C   D   D         as large as the longest row in them: 900, 610, 310, 40
    batches     A B D   A B D   B C                         1,550, 1,550 and 920 tokens, or a little less

Where rows are padded to the longest of their batch, a batch costs its rows times its longest row, and rows of like
length go together; else it costs the sum of its rows. The batches that several processes compute at the same time cost
nearly the same, and there are as many for each: batches are cut in two for that, no row comes twice. Only where every
batch is a single row, the last ones of an epoch fill it up, and nothing is learned from these.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler

CLASSES = 64  # a class is as wide as this part of a mean row: narrower ones fill batches better, wider ones mix better
MANY = 128  # classes, of which each batch is no longer made the fullest that there is: it takes long and gains nothing
TRIES = 12  # budgets tried to spread rows evenly over batches
SHOWN = 10  # rows that an error names

Batch = tuple[int, ...]  # the class of each of its rows, the largest first


@dataclass(frozen=True, eq=False)
class Plan:
    """
    Which rows make a batch, up to chance.

    Args:
        budget (`int`): Most tokens of a batch.
        processes (`int`): For so many at the same time.
        padded (`bool`): Whether rows are padded to the longest of their batch.
        multiple (`int`): What lengths are padded up to.
        tokens (`np.ndarray`): Of each row; int64 `(rows,)`.
        classes (`np.ndarray`): Of each row; `(rows,)`.
        slots (`np.ndarray`): Class of each place, batch after batch; `(rows,)`.
        starts (`np.ndarray`): Where in these each batch starts; int64 `(batches,)`, without those that only fill up.
    """

    budget: int
    processes: int
    padded: bool
    multiple: int
    tokens: np.ndarray
    classes: np.ndarray
    slots: np.ndarray
    starts: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.tokens)

    @property
    def steps(self) -> int:
        """Batches of each process in an epoch."""
        return math.ceil(len(self.starts) / self.processes)

    @property
    def missing(self) -> int:
        """Processes, the last ones, whose last batch of an epoch only fills it up."""
        return self.steps * self.processes - len(self.starts)

    @property
    def full(self) -> float:
        """Share of the budget that is tokens of rows."""
        return float(self.tokens.sum() / (len(self.starts) * self.budget))

    @cached_property
    def imbalance(self) -> float:
        """How much longer the costliest of the batches that run at the same time is than their mean, in the mean."""
        costs = np.append(self.costs(self.assigned(0, 0)), 0)[self.grouped(0, 0)]
        return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum() - 1)

    @cached_property
    def _places(self) -> np.ndarray:
        return np.argsort(self.slots, kind="stable")

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.diff(self.starts, append=self.rows)

    def costs(self, rows: np.ndarray) -> np.ndarray:
        """What each batch costs with these rows in its places, in tokens."""
        if not self.padded:
            return np.add.reduceat(self.tokens[rows], self.starts)
        longest = np.maximum.reduceat(self.tokens[rows], self.starts)
        return self._sizes * (-(-longest // self.multiple) * self.multiple)

    def assigned(self, seed: int, epoch: int) -> np.ndarray:
        """The row in each place in this epoch, at random."""
        rows = np.random.default_rng([seed, epoch, 0]).permutation(self.rows)
        found = np.empty_like(rows)
        found[self._places] = rows[np.argsort(self.classes[rows], kind="stable")]
        return found

    def grouped(self, seed: int, epoch: int) -> np.ndarray:
        """
        The batches of an epoch: `(steps, processes)`, those of a step cost nearly the same.

        What only fills up the last step is -1, and stands last.
        """
        draw = np.random.default_rng([seed, epoch, 1])
        batches = draw.permutation(len(self.starts))
        batches = batches[np.argsort(-self.costs(self.assigned(seed, epoch))[batches], kind="stable")]
        # The step that is filled up is any of them, else the shortest rows would always come last.
        last = int(draw.integers(self.steps)) if self.missing else self.steps - 1
        end = (last + 1) * self.processes - self.missing
        short = draw.permutation(batches[end - self.processes + self.missing : end])
        groups = np.delete(batches, np.s_[end - len(short) : end]).reshape(-1, self.processes)
        groups = draw.permuted(draw.permutation(groups), axis=1)
        groups = np.vstack([groups, np.append(short, np.full(self.missing, -1))])
        return groups if self.missing else draw.permutation(groups)

    def batches(self, seed: int, epoch: int, process: int) -> Iterator[list[int]]:
        """The rows of each batch of one process in an epoch."""
        rows = self.assigned(seed, epoch)
        ends = self.starts + self._sizes
        for batch in self.grouped(seed, epoch)[:, process].tolist():
            if batch < 0:
                yield [int(self.tokens.argmin())]
            else:
                yield rows[self.starts[batch] : ends[batch]].tolist()

    def most(self, values: Sequence[int]) -> int:
        """The most that a number which each row has can come to in a batch, whichever rows of its classes it gets."""
        found = np.asarray(values)
        order = np.lexsort((-found, self.classes))  # the largest of each class first
        firsts = np.searchsorted(self.classes[order], self.slots)
        places = np.arange(self.rows)
        new = np.diff(self.slots, prepend=-1) != 0
        new[self.starts] = True
        nth = places - np.maximum.accumulate(np.where(new, places, 0))  # of its class in its batch
        return int(np.add.reduceat(found[order][firsts + nth], self.starts).max())

    def worst(self) -> tuple[int, int]:
        """Rows of the batch that takes most memory, and what one of them then has in tokens."""
        longest = np.zeros(int(self.classes.max()) + 1, np.int64)
        np.maximum.at(longest, self.classes, -(-self.tokens // self.multiple) * self.multiple)
        lengths = longest[self.slots]
        most = np.maximum.reduceat(lengths, self.starts)
        costs = self._sizes * most if self.padded else np.add.reduceat(lengths, self.starts)
        rows = int(self._sizes[np.argmax(costs * most)])  # of equal costs, attention costs more on long rows
        return rows, math.ceil(int(costs.max()) / rows)

    def __str__(self) -> str:
        apart = f", costs of processes within {self.imbalance:.1%} on average" if self.processes > 1 else ""
        return (
            f"{len(self.starts):,} planned of at most {self.budget:,} tokens, {self.rows / len(self.starts):,.1f} rows "
            f"and {self.full:.1%} full on average{apart}"
        )


def plan_batches(
    tokens: Sequence[int],
    budget: int,
    *,
    padded: bool,
    processes: int = 1,
    multiple: int | None = None,
    names: Sequence[Any] | None = None,
) -> Plan:
    """
    Plans the batches of all epochs. It depends on nothing but the lengths that there are.

    Args:
        tokens (sequence of `int`): Of each row.
        budget (`int`): `max_tokens_per_batch`.
        padded (`bool`): Whether rows are padded to the longest of their batch.
        processes (`int`, *optional*, defaults to `1`): The number of batches is a multiple of these.
        multiple (`int`, *optional*): `pad_to_multiple_of`.
        names (sequence, *optional*): What an error calls the rows; else their positions.

    Returns:
        [`Plan`]: The plan.

    Raises:
        ValueError: If a row alone is longer than the budget; names it.
    """
    multiple = multiple or 1
    lengths = np.asarray(tokens, np.int64)
    needed = -(-lengths // multiple) * multiple
    if over := np.flatnonzero(needed > budget).tolist():
        over.sort(key=lambda row: -needed[row])
        named = ", ".join(f"{row if names is None else names[row]} has {needed[row]:,}" for row in over[:SHOWN])
        more = f" and {len(over) - SHOWN} more" if len(over) > SHOWN else ""
        raise ValueError(
            f"`max_tokens_per_batch` is {budget:,}, expected {needed.max():,} or more: {len(over)} of {len(lengths):,} "
            f"rows alone are longer: row {named}{more}. A row is never cut. Raise max_tokens_per_batch, lower "
            f"num_crops, or leave these rows out with `max_length: {budget}` and `overlong: drop`."
        )
    width = math.ceil(max(1, int(lengths.mean()) // CLASSES) / multiple) * multiple
    _, classes, counts = np.unique(-(-lengths // width), return_inverse=True, return_counts=True)
    sizes = np.zeros(len(counts), np.int64)
    np.maximum.at(sizes, classes, needed if padded else lengths)

    def made(most: int) -> dict[Batch, int]:
        ways = [_cut] if padded else [_filled, _fullest] if len(counts) <= MANY else [_filled]
        return min((way(sizes.tolist(), counts.tolist(), most) for way in ways), key=lambda one: sum(one.values()))

    found = _evenly(made, budget // multiple * multiple, int(sizes.max()), processes)
    _split(found, sizes.tolist(), processes, padded=padded)
    pieces = [(np.asarray(batch, classes.dtype), times) for batch, times in found.items()]
    starts = np.cumsum([0, *np.repeat([len(batch) for batch, _ in pieces], [times for _, times in pieces])])[:-1]
    kind = np.min_scalar_type(len(counts))  # numpy sorts 16 bits in a tenth of the time
    slots = np.concatenate([np.tile(batch, times) for batch, times in pieces])
    return Plan(budget, processes, padded, multiple, lengths, classes.astype(kind), slots.astype(kind), starts)


def _filled(sizes: list[int], counts: list[int], budget: int) -> dict[Batch, int]:
    """Batches whose sums are at most the budget: first fit decreasing, and equal batches all at once."""
    kinds, sizes, left = list(range(len(sizes))), list(sizes), list(counts)
    found: dict[Batch, int] = {}
    while kinds:
        space, used, end = budget, list[tuple[int, int]](), len(kinds)
        while end := bisect_right(sizes, space, 0, end):
            end -= 1
            rows = min(left[end], space // sizes[end])
            used.append((end, rows))
            space -= rows * sizes[end]
        batch = tuple(kinds[one] for one, rows in used for _ in range(rows))
        times = min(left[one] // rows for one, rows in used)
        found[batch] = found.get(batch, 0) + times
        for one, rows in used:  # from the largest down, so that none moves before its turn
            left[one] -= times * rows
            if not left[one]:
                del kinds[one], sizes[one], left[one]
    return found


def _fullest(sizes: list[int], counts: list[int], budget: int) -> dict[Batch, int]:
    """
    As [`_filled`], but each batch is the fullest that the largest row left can be in: where few rows make a batch, some
    three parts in a hundred are gained.

    Bit n of a whole number says whether rows can come to n tokens.
    """
    left = dict(enumerate(counts))
    found: dict[Batch, int] = {}
    while left:
        largest = max(left)
        reached, tried = 1 << sizes[largest], list[tuple[int, int, int]]()
        for kind in sorted(left, reverse=True):
            most = min(left[kind] - (kind == largest), (budget - sizes[largest]) // sizes[kind])
            rows = 1
            while most > 0:  # 1, 2, 4, … of them, and the rest: together any number
                rows = min(rows, most)
                tried.append((kind, rows, reached))
                reached |= (reached << rows * sizes[kind]) & ((2 << budget) - 1)
                most -= rows
                rows *= 2
        tokens, used = reached.bit_length() - 1, {largest: 1}
        for kind, rows, before in reversed(tried):
            if not before >> tokens & 1:
                used[kind] = used.get(kind, 0) + rows
                tokens -= rows * sizes[kind]
        batch = tuple(kind for kind in sorted(used, reverse=True) for _ in range(used[kind]))
        times = min(left[kind] // rows for kind, rows in used.items())
        found[batch] = found.get(batch, 0) + times
        for kind, rows in used.items():
            left[kind] -= times * rows
            if not left[kind]:
                del left[kind]
    return found


def _cut(sizes: list[int], counts: list[int], budget: int) -> dict[Batch, int]:
    """Batches whose rows times longest row are at most the budget: sorted by length, and cut."""
    left, kind = list(counts), len(sizes) - 1
    found: dict[Batch, int] = {}
    while kind >= 0:
        rows = budget // sizes[kind]
        times, rest = divmod(left[kind], rows)
        if times:
            found[(kind,) * rows] = times
        left[kind] = 0
        batch, kind = [kind] * rest, kind - 1
        while batch and kind >= 0 and len(batch) < rows:
            taken = min(left[kind], rows - len(batch))
            batch += [kind] * taken
            left[kind] -= taken
            kind -= not left[kind]
        if batch:
            found[tuple(batch)] = found.get(tuple(batch), 0) + 1
    return found


def _evenly(made: Callable[[int], dict[Batch, int]], budget: int, longest: int, processes: int) -> dict[Batch, int]:
    """With the smallest budget that makes no more steps: so the last batch is not a small one."""
    best = made(budget)
    most = math.ceil(sum(best.values()) / processes) * processes
    low, high = longest, budget
    for _ in range(TRIES):
        if low >= high:
            break
        middle = (low + high) // 2
        found = made(middle)
        if sum(found.values()) <= most:
            best, high = found, middle
        else:
            low = middle + 1
    return best


def _split(found: dict[Batch, int], sizes: list[int], processes: int, *, padded: bool) -> None:
    """Cuts the costliest batches in two until all processes have as many, or every batch is a single row."""

    def entry(batch: Batch) -> tuple[int, Batch]:
        return -(len(batch) * sizes[batch[0]] if padded else sum(sizes[one] for one in batch)), batch

    extra = -sum(found.values()) % processes
    queue = [entry(batch) for batch in found if len(batch) > 1] if extra else []
    heapq.heapify(queue)
    while extra and queue:
        _, batch = heapq.heappop(queue)
        times = min(extra, found.pop(batch)) if found[batch] <= extra else extra
        if batch in found:
            found[batch] -= times
        extra -= times
        for half in (batch[::2], batch[1::2]):
            if half not in found and len(half) > 1:
                heapq.heappush(queue, entry(half))
            found[half] = found.get(half, 0) + times


class Planned(BatchSampler):
    """
    The planned batches of one process: its share already, which Accelerate must not share out once more.

    Args:
        plan ([`Plan`]): The plan.
        seed (`int`): Decides, with the epoch, which rows are together and in which order they come.
        process (`int`, *optional*, defaults to `0`): Its number.
    """

    def __init__(self, plan: Plan, *, seed: int, process: int = 0) -> None:
        self.plan, self.seed, self.process, self.epoch = plan, seed, process, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.plan.steps

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.batches(self.seed, self.epoch, self.process)
