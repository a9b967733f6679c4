"""Train rows that are read from their files as they are needed: `dataset_streaming: true`.

Rows are read in blocks (of Parquet files: row groups). Each epoch puts the blocks into an order of its own and cuts it
into equal shares, one for each worker of each process, wherever in a block a cut may fall:

    blocks    d d d d|a a a a|c c c c|b b b b|e e e      an epoch of 19 rows
    shares    0 0 0 0 0|1 1 1 1 1|2 2 2 2 2|3 3 3 3 0    two processes with two workers each; its first row fills it up

In a share, the rows of some blocks at a time are shuffled. So all processes have the same number of batches, whatever
the sizes of files, and each row goes to one of them; the numbers of rows stand in the files' footers, so that `Trainer`
knows how long an epoch is; and a run that goes on passes over rows by counting them. `datasets` and Accelerate would
share out whole files, and processes end their epochs apart from each other, or let each process read everything.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetInfo, Features, IterableDataset, concatenate_datasets, load_dataset
from datasets.fingerprint import Hasher
from datasets.iterable_dataset import ExamplesIterable
from datasets.table import InMemoryTable, table_cast
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.scripts.utils import DatasetConfig

from sft_phi3v.data import (
    ROW,
    Part,
    Reader,
    as_rows,
    check_prepared,
    counts,
    data_sets,
    held_out_count,
    join,
    load_part,
    parquet_files,
    reading,
    say_held_out,
    split_names,
    tests_of,
    where_from,
)
from sft_phi3v.recipe import Recipe

WINDOW, WINDOW_BYTES = 1000, 128 << 20  # most rows, and about how many bytes, that a worker shuffles at a time

Example = dict[str, Any]


def load_stream(recipe: Recipe) -> tuple["Stream", Dataset]:
    """
    As [`~sft_phi3v.data.load_splits`], without reading the train rows.

    Parquet is read where it lies, on this machine or on the Hub. Of other files `datasets` first makes an Arrow file.

    Args:
        recipe ([`~sft_phi3v.recipe.Recipe`]): As there.

    Returns:
        `tuple[Stream, Dataset]`: Train rows, and held-out rows, which are the same as there.

    Raises:
        ValueError: As there, as far as footers and the first rows tell; a data set on the Hub that is not Parquet.
    """
    check_prepared(recipe)
    parts = [_part(entry, recipe) for entry in data_sets(recipe)]
    blocks = [part.train for part in parts]
    stream = Stream(blocks, recipe)
    if tests := tests_of(parts):
        say_held_out(parts, recipe, None)
        return stream, join(tests, recipe)
    count = held_out_count(len(stream), recipe)
    say_held_out(parts, recipe, f"{count} of the {len(stream)} rows of {where_from(recipe)}")
    drawn = np.random.default_rng(recipe.training.seed).permutation(len(stream))[:count]  # as `train_test_split` does
    return Stream(blocks, recipe, held_out=np.sort(drawn)), stream.at(drawn)


class Stream(IterableDataset):
    """
    Train rows as examples. Of several processes each gets its share from [`Stream.shard`], which Accelerate calls.

    Args:
        parts (sequence of [`Blocks`]): The train rows of each data set.
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its seed, batch size and templates are read.
        held_out (`np.ndarray`, *optional*): Positions of rows that are left out, sorted.

    Attributes:
        fits (`Callable`, *optional*): Whether an example may be trained on. Those that may not are counted in
            `left_out`, and other rows of the share come twice in their place, so that the number of steps stays.
        passed (`tuple[int, int]`): An epoch, and how many of its batches were trained on already. Their rows are
            `None`.
    """

    def __init__(self, parts: Sequence["Blocks"], recipe: Recipe, *, held_out: np.ndarray | None = None) -> None:
        super().__init__(ExamplesIterable(iter, {}))  # what `datasets` would read; here `__iter__` does
        training = recipe.training
        self.parts = parts
        self.held_out = np.array([], np.int64) if held_out is None else held_out
        self.seed = training.seed if training.data_seed is None else training.data_seed
        self.shuffled = training.train_sampling_strategy != "sequential"
        self.batch_size = training.per_device_train_batch_size
        self.process, self.processes = 0, 1
        self.fits: Callable[[Example], bool] | None = None
        self.passed = (0, 0)
        self.left_out = torch.zeros(max(1, training.dataloader_num_workers), dtype=torch.int64).share_memory_()
        self.last: tuple[int, Dataset] | None = None  # the block read last

        first = join([part.read(0, None) for part in parts], recipe)
        self.reader = Reader.of(first, recipe)
        self.kinds = Features({name: first.features[name] for name in [*self.reader.columns, ROW]})
        most = counts([int(part.sizes.sum()) for part in parts], recipe)
        sizes = [
            np.diff(np.minimum(part.sizes.cumsum(), end), prepend=0) for part, end in zip(parts, most, strict=True)
        ]
        self.firsts = np.cumsum([0, *map(len, sizes)])  # the first block of each data set
        self.ends = np.concatenate(sizes).cumsum()  # positions where blocks end
        self.sizes = np.diff(self.ends - np.searchsorted(self.held_out, self.ends), prepend=0)
        row_bytes = max(part.row_bytes for part in parts)
        self.window = max(self.batch_size, min(WINDOW, int(WINDOW_BYTES / max(row_bytes, 1))))

    def __len__(self) -> int:
        return -(-self.num_shards // self.processes)

    @property
    def num_shards(self) -> int:
        """Into how many shares it can be divided."""
        return int(self.sizes.sum())

    def shard(self, num_shards: int, index: int, contiguous: bool = True) -> "Stream":
        """The share of one process."""
        share = object.__new__(Stream)
        share.__dict__.update(self.__dict__, process=index, processes=num_shards)
        return share

    def __iter__(self) -> Iterator[Example | None]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        batches = math.ceil(len(self) / self.batch_size)
        rows = [
            len(range(one, batches, workers)) * self.batch_size for one in range(workers)
        ]  # `DataLoader` takes turns
        rows[(batches - 1) % workers] -= batches * self.batch_size - len(self)  # the last batch may be smaller
        epoch, passed = self.passed
        passed = len(range(worker, passed, workers)) * self.batch_size if epoch == self.epoch else 0
        return self._examples(worker, self.process * len(self) + sum(rows[:worker]), rows[worker], passed)

    def _examples(self, worker: int, first: int, count: int, passed: int) -> Iterator[Example | None]:
        """The share of one worker: `count` examples, of which the first `passed` are `None`."""
        if self.fits is None:
            yield from itertools.repeat(None, passed)
            yield from self._rows(first, count, passed)
            return
        given = self.left_out[worker] = 0
        for again in itertools.count():
            before = given
            for example in self._rows(first, count):
                if self.fits(example):
                    yield example if given >= passed else None
                    given += 1
                    if given == count:
                        return
                elif not again:
                    self.left_out[worker] += 1
            if given == before:
                raise ValueError("`overlong: drop` leaves no row to train on. Raise max_length or lower num_crops.")

    def _rows(self, first: int, count: int, passed: int = 0) -> Iterator[Example]:
        """Examples from position `first` of this epoch on, shuffled; the first `passed` of them are not given."""
        epoch = self.epoch
        order = self._order(epoch)
        for start in range(0, count, self.window):
            size = min(self.window, count - start)
            if start + size <= passed:
                continue
            rows = self.reader.undecoded(self._window(order, first + start, size))
            places = np.arange(size)
            if self.shuffled:
                places = np.random.default_rng([self.seed, epoch, first + start]).permutation(size)
            for place in places[max(passed - start, 0) :]:
                example = self.reader.example(rows[int(place)])
                # After the epoch's last row comes its first again, so that all processes have as many batches.
                yield example | ({"repeated": True} if first + start + place >= self.num_shards else {})

    def _order(self, epoch: int) -> np.ndarray:
        """The blocks in the order of an epoch."""
        blocks = np.arange(len(self.sizes))
        return np.random.default_rng([self.seed, epoch]).permutation(blocks) if self.shuffled else blocks

    def _window(self, order: np.ndarray, first: int, count: int) -> Dataset:
        """`count` rows from position `first` of an epoch on; after its last row comes its first."""
        ends, pieces = self.sizes[order].cumsum(), []
        while count:
            position = first % int(ends[-1])
            index = int(np.searchsorted(ends, position, side="right"))
            size = min(count, int(ends[index]) - position)
            block = int(order[index])
            start = position - int(ends[index]) + int(self.sizes[block])
            if self.last is None or self.last[0] != block:
                self.last = block, self.read(block, self.reader.columns)
            pieces.append(self.last[1].select(range(start, start + size)))
            first, count = first + size, count - size
        return concatenate_datasets(pieces)

    def read(self, block: int, columns: Sequence[str]) -> Dataset:
        """The rows of a block that are trained on, in some of the columns that examples are made of."""
        part = int(np.searchsorted(self.firsts, block, side="right")) - 1
        rows = self.parts[part].read(block - int(self.firsts[part]), columns)
        for name in set(columns) - set(rows.column_names):  # as when text-only conversations are mixed in
            rows = rows.add_column(name, [None] * len(rows), feature=self.kinds[name])
        end = int(self.ends[block])
        start = int(self.ends[block - 1]) if block else 0
        if len(rows) != self.sizes[block]:
            rows = rows.select(np.setdiff1d(np.arange(start, end), self.held_out) - start)
        return rows.select_columns([*columns, ROW])

    def sample(self) -> Dataset:
        """The first rows of the first epoch, as many as are shuffled at a time."""
        return self._window(self._order(0), 0, min(self.window, self.num_shards))

    def texts(self) -> Iterator[Dataset]:
        """The columns that answers are made of, of all rows, in the order of the first epoch."""
        return (self.read(int(block), self.reader.answer_columns) for block in self._order(0) if self.sizes[block])

    def at(self, positions: np.ndarray) -> Dataset:
        """Rows by their positions, in an Arrow file that `datasets` makes once."""
        ordered = np.sort(positions)
        identity = Hasher.hash([[part.identity for part in self.parts], ordered.tolist(), str(self.kinds)])
        made = Dataset.from_generator(
            self._at, features=self.kinds, gen_kwargs={"positions": ordered}, fingerprint=identity
        )
        return made.select(np.searchsorted(ordered, positions))

    def _at(self, positions: np.ndarray) -> Iterator[dict[str, Any]]:
        blocks = np.searchsorted(self.ends, positions, side="right")
        for block in np.unique(blocks):
            rows = self.reader.undecoded(self.read(int(block), self.reader.columns))
            start = int(self.ends[block - 1]) if block else 0
            yield from rows.select(positions[blocks == block] - start)


class Blocks(Protocol):
    """The train rows of one data set, in blocks that can be read each on its own."""

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each block."""

    @property
    def row_bytes(self) -> float:
        """Bytes of a row, on average."""

    @property
    def identity(self) -> str:
        """Another one if the rows are others."""

    def read(self, block: int, columns: Sequence[str] | None) -> Dataset:
        """Rows as [`~sft_phi3v.data.as_rows`] makes them; all of their columns, or which of these there are."""


@dataclass(frozen=True)
class RowGroups:
    """The row groups of Parquet files, on this machine or behind a URL."""

    files: Sequence[str]
    groups: np.ndarray  # of each: the file's number, its own number in it, its rows
    row_bytes: float
    identity: str
    features: Features
    entry: DatasetConfig
    recipe: Recipe
    folder: Path | None

    @classmethod
    def of(cls, files: Sequence[str], entry: DatasetConfig, recipe: Recipe, folder: Path | None) -> "RowGroups":
        """Reads the footers of the files."""
        with ThreadPoolExecutor(16) as threads:
            footers = list(threads.map(_footer, files))
        groups = [
            (number, index, rows)
            for number, footer in enumerate(footers)
            for index, rows in enumerate(footer.rows)
            if rows
        ]
        if not groups:
            raise ValueError(f"it has no rows in split {entry.split!r}")
        features = Features.from_arrow_schema(footers[0].schema)
        if missing := [name for name in entry.columns or () if name not in features]:
            raise ValueError(f"`columns`: there is no {', '.join(missing)} in {', '.join(features)}")
        return cls(
            files=files,
            groups=np.array(groups, dtype=np.int64),
            row_bytes=sum(footer.bytes for footer in footers) / sum(rows for *_, rows in groups),
            identity=str([footer.identity for footer in footers]),
            features=Features({name: features[name] for name in entry.columns or features}),
            entry=entry,
            recipe=recipe,
            folder=folder,
        )

    @property
    def sizes(self) -> np.ndarray:
        return self.groups[:, 2]

    def read(self, block: int, columns: Sequence[str] | None) -> Dataset:
        number, group, _ = self.groups[block].tolist()
        kinds = Features({name: kind for name, kind in self.features.items() if columns is None or name in columns})
        with fsspec.open(self.files[number]) as file:
            table = pq.ParquetFile(file).read_row_group(group, columns=list(kinds), use_threads=False)
        rows = Dataset(
            InMemoryTable(table_cast(table, kinds.arrow_schema)),
            DatasetInfo(features=kinds),
            fingerprint=str(block),  # else it would be made of all bytes
        )
        return as_rows(rows, self.entry, self.recipe, self.folder, first=int(self.sizes[:block].sum()))


@dataclass(frozen=True)
class Mapped:
    """Rows in Arrow files that `datasets` has mapped into memory, some at a time."""

    rows: Dataset
    size: int = 64

    @property
    def sizes(self) -> np.ndarray:
        return np.diff([*range(0, len(self.rows), self.size), len(self.rows)])

    @property
    def row_bytes(self) -> float:
        return float(self.rows.data.nbytes) / len(self.rows)

    @property
    def identity(self) -> str:
        return str(self.rows._fingerprint)

    def read(self, block: int, columns: Sequence[str] | None) -> Dataset:
        start = block * self.size
        rows = self.rows.select(range(start, min(start + self.size, len(self.rows))))
        return rows.select_columns([name for name in rows.column_names if columns is None or name in (*columns, ROW)])


@dataclass(frozen=True)
class _Footer:
    rows: list[int]
    bytes: int
    schema: pa.Schema
    identity: str


def _footer(url: str) -> _Footer:
    system, path = fsspec.url_to_fs(url)
    with system.open(path) as file:
        found = pq.ParquetFile(file)
        groups = [found.metadata.row_group(index) for index in range(found.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        return _Footer([group.num_rows for group in groups], size, found.schema_arrow, system.ukey(path))


def _part(entry: DatasetConfig, recipe: Recipe) -> Part:
    found = parquet_files(entry, recipe)
    if found is None:
        part = load_part(entry, recipe)
        return replace(part, train=Mapped(part.train))
    files, folder = found
    train, test = split_names(list(files), entry, recipe)
    with reading(entry, recipe):
        groups, held_out = RowGroups.of(files[train], entry, recipe, folder), None
        if test:
            held_out = load_dataset("parquet", data_files={test: files[test]}, split=test, columns=entry.columns)
            held_out = as_rows(held_out, replace(entry, split=test), recipe, folder)
    return Part(groups, held_out, [name for name in files if name not in (train, test)])


@dataclass(frozen=True)
class Passing:
    """Makes batches of a stream's examples, but of those that were trained on already: `Trainer` throws these away."""

    collator: Callable[[list[Example]], dict[str, torch.Tensor]]

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """
        Args:
            examples (`list`): Examples, or `None` for each.

        Returns:
            `dict`: The batch; and `rows`, the examples' names.
        """
        if examples[0] is None:
            return {}
        return {**self.collator(examples), "rows": [example["row"] for example in examples]}


class Resume(TrainerCallback):
    """Tells a stream which batches `Trainer` will throw away, so that no picture in them is decoded."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = kwargs["train_dataloader"]
        epoch, steps = divmod(state.global_step, math.ceil(len(batches) / args.gradient_accumulation_steps))
        if isinstance(batches.dataset, Stream) and not args.ignore_data_skip:
            batches.dataset.passed = epoch, steps * args.gradient_accumulation_steps
