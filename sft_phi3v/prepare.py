"""Whatever holds labelled pictures becomes a checked local data set: `python -m sft_phi3v.prepare RECIPE`.

    rows of `source`, in blocks
      → many processes: fetch, decode, check     → one line per row: kept or not, why, size, hashes
      → one process: duplicates, contradictions, the split
      → many processes: rows that are kept, with their pictures
    → `dataset_name`/data/train-00000-of-00012.parquet …, manifest.parquet, README.md

Beside it, `dataset_name`.work holds what was fetched and checked: a run that was cut, by whatever, goes on from there,
and a later one fetches only what is new or failed. The data set itself appears whole, by a rename, or not at all.
Nothing in it depends on which process was faster: equal sources and recipes give equal files.
"""

import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, LargeList, List, Value, load_from_disk
from datasets.info import DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from filelock import FileLock, Timeout
from huggingface_hub import DatasetCardData, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from tqdm import tqdm

from sft_phi3v.data import Reader, Template, read_source
from sft_phi3v.fetch import Fetcher, Limits, Refusal, Store, shown
from sft_phi3v.pictures import check_picture
from sft_phi3v.recipe import PrepareArguments, Recipe, TaskArguments, load_recipe
from sft_phi3v.splitting import Contents, clusters, held_out_rows, look_alikes, same_rows

BLOCK = 256  # rows that are checked and noted down together
STRIPE = 16  # blocks that one process takes at a time: a slow host then holds up their end, not each of them
SHARD = 128 << 20  # bytes
VERSION = 1  # of what a block means: a later one does not take over lines of an earlier one
PICTURES = "__pictures__"
# Reasons that another attempt may not meet; the others are properties of the row.
FETCHING = re.compile(r"http_\d+|timeout|connection|redirects|address|content_type|too_large|no_file")

Run = Callable[..., Iterator[tuple[int, Any]]]  # what `_engine` gives

_PICTURE_FIELDS = {
    "picture": pa.string(),  # URL or path, as the source has it
    "sha256": pa.string(),
    "bytes": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "pixels": pa.string(),
    "perceptual_hash": pa.uint64(),
    "stored_sha256": pa.string(),
    "stored_bytes": pa.int64(),
    "colours": pa.binary(48),
}
_LINE = pa.schema(
    [
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("notes", pa.list_(pa.string())),
        ("attempts", pa.int32()),
        *((name, pa.list_(kind)) for name, kind in _PICTURE_FIELDS.items()),
        *((name, pa.uint64()) for name in ("question", "answer", "group", "stratum", "key")),
    ]
)
_INTERNAL = ("colours", "question", "answer", "group", "stratum")


@dataclass(frozen=True)
class Job:
    """
    What every process must know to prepare the rows of one split of the source.

    Args:
        rows (`Dataset`): The rows; memory-mapped, so that it costs nothing to hand it on.
        split (`str`): The split's name.
        folder (`Path`, *optional*): Where paths count from.
        columns (`tuple[str, ...]`): The columns with pictures.
        output (`str`): The column of the data set that gets them.
        reader ([`~sft_phi3v.data.Reader`]): Makes question and answer of a row.
        settings ([`~sft_phi3v.recipe.PrepareArguments`]): The recipe's keys.
        num_crops (`int`, *optional*): The recipe's.
        work (`Path`): The folder for what was fetched and checked.
        workers (`int`): Processes that share the bounds on connections.
    """

    rows: Dataset
    split: str
    folder: Path | None
    columns: tuple[str, ...]
    output: str
    reader: Reader
    settings: PrepareArguments
    num_crops: int | None
    work: Path
    workers: int

    def read(self, rows: slice | list[int]) -> list[dict[str, Any]]:
        """Rows as they stand in the source, pictures undecoded, class names for class numbers."""
        bare = _undecoded(self.rows)
        columns = bare[rows]
        found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for name, kind in self.rows.features.items():
            if isinstance(kind, ClassLabel):
                for row in found:
                    row[name] = kind.int2str(row[name]) if row[name] is not None and row[name] >= 0 else None
        return found

    def references(self, row: Mapping[str, Any]) -> list[Any]:
        """Where the row's pictures are: URLs, paths or bytes."""
        found = []
        for name in self.columns:
            value = row[name]
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, dict):
                    one = one["bytes"] if one.get("bytes") is not None else one.get("path")
                if one is None or (isinstance(one, str) and not one.strip()):
                    continue
                found.append(one.strip() if isinstance(one, str) else one)
        return found

    def path(self, reference: str) -> Path:
        """The file that a path in the source means: counted from the table's folder, or else from here."""
        inside = self.folder / reference if self.folder else Path(reference)
        return inside if inside.is_file() else Path(reference)

    def named(self, reference: Any) -> str:
        """A reference as anybody may see it: no path of this machine in it, and no password."""
        if not isinstance(reference, str):
            return ""
        for base in (self.folder, Path.cwd()):
            if base is not None and Path(reference).is_absolute() and Path(reference).is_relative_to(base.absolute()):
                return str(Path(reference).relative_to(base.absolute()))
        return Path(reference).name if Path(reference).is_absolute() else shown(reference)

    @property
    def identity(self) -> str:
        """What a line of a block depends on besides its row."""
        settings = {
            key: value
            for key, value in asdict(self.settings).items()
            if key
            in ("group_column", "stratify_column", "placeholders", "min_side", "max_pixels", "max_bytes", "downscale")
        }
        templates = [template and template.text for template in (self.reader.prompt, self.reader.answer)]
        return json.dumps([VERSION, settings, self.num_crops, self.columns, templates])


def _undecoded(rows: Dataset) -> Dataset:
    """The same rows, whose pictures read as `{"bytes", "path"}`."""
    rows = rows.select_columns(rows.column_names).with_format(None)
    for name, kind in rows.features.items():
        if isinstance(getattr(kind, "feature", kind), Image):
            bare = Image(decode=False)
            rows.info.features[name] = List(bare) if isinstance(kind, List | LargeList) else bare
    return rows


# --- checking, in worker processes ---


def _silent(reason: str) -> None:
    """What a process does with the outcome of a row where nobody shows a progress bar."""


# Set once when a worker process starts; a task cannot carry them.
_progress: Callable[[str], None] = _silent
_stopped: Callable[[], bool] = bool


def _start_worker(queue: Any, stop: Any) -> None:
    """Connects a worker process to the progress bar, and to the fate of the process that started it."""
    global _progress, _stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and `stop` says it
    parent = multiprocessing.parent_process()
    _progress = queue.put

    def stopped() -> bool:
        return bool(stop.is_set()) or (parent is not None and not parent.is_alive())

    _stopped = stopped


def check_blocks(job: Job, starts: Sequence[int]) -> tuple[dict[int, str], int]:
    """
    Checks blocks of rows; those that are noted down already are taken as they are, but for what could not be fetched.

    Args:
        job ([`Job`]): The source and the settings.
        starts (`Sequence[int]`): First row of each block.

    Returns:
        `tuple[dict[int, str], int]`: The file that holds each block's lines, by its first row; and how many requests
        were made.
    """
    return asyncio.run(_check_blocks(job, starts))


async def _check_blocks(job: Job, starts: Sequence[int]) -> tuple[dict[int, str], int]:
    settings, share = job.settings, max(1, job.workers)
    connections = max(1, settings.fetch_connections // share)
    limits = Limits(
        connections=connections,
        per_host=max(1, settings.fetch_per_host // share),
        timeout=settings.fetch_timeout,
        attempts=settings.fetch_attempts,
        max_bytes=settings.max_bytes,
    )
    store = Store(job.work / "pictures")
    under_way = asyncio.Semaphore(2 * connections)  # bounds what waits in memory for its turn to be decoded
    main = asyncio.current_task()

    async def watch() -> None:
        while not _stopped():
            await asyncio.sleep(0.5)
        assert main is not None
        main.cancel()

    async def one(checker: "_Checker", row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            line = await checker.line(row, index)
        finally:
            under_way.release()
        _progress(line["reason"] or "")
        return line

    async def note_down(path: Path, lines: list[dict[str, Any]], tasks: list[asyncio.Task[dict[str, Any]]]) -> int:
        found = await asyncio.gather(*tasks)
        lines = sorted([*lines, *found], key=lambda line: line["row"])
        _write_whole(pa.Table.from_pylist(lines, schema=_LINE), path)
        return sum(line["attempts"] for line in found)

    files, ends = dict[int, str](), list[asyncio.Task[int]]()
    with ThreadPoolExecutor(1) as threads:
        async with Fetcher(limits, store) as fetcher:
            watcher = asyncio.create_task(watch())
            checker = _Checker(job, fetcher, store, threads)
            for start in starts:
                rows = job.read(slice(start, min(start + BLOCK, len(job.rows))))
                path = job.work / "blocks" / f"{_fingerprint(job, rows, start)}.parquet"
                files[start] = str(path)
                lines = _noted(path)
                known = {line["row"] for line in lines}
                for line in lines:
                    _progress(line["reason"] or "")
                if len(known) == len(rows):
                    continue
                tasks = []
                for index, row in enumerate(rows, start):
                    if index not in known:
                        await under_way.acquire()
                        tasks.append(asyncio.create_task(one(checker, row, index)))
                ends.append(asyncio.create_task(note_down(path, lines, tasks)))
            requests = sum(await asyncio.gather(*ends))
            watcher.cancel()
    return files, requests


def _noted(path: Path) -> list[dict[str, Any]]:
    """The lines of a block that an earlier run wrote and that need no second look."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return [line for line in lines if not FETCHING.fullmatch(line["reason"] or "")]


def _fingerprint(job: Job, rows: list[dict[str, Any]], start: int) -> str:
    """Changes whenever a line of the block could: with the rows, the files they name, and the settings."""
    digest = hashlib.sha256(f"{job.identity} {job.split} {start} ".encode())
    for row in rows:
        digest.update(json.dumps(row, default=_plain, sort_keys=True).encode())
        for reference in job.references(row):
            if isinstance(reference, str) and "://" not in reference:
                with contextlib.suppress(OSError):
                    found = job.path(reference).stat()
                    digest.update(f" {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


@dataclass(frozen=True)
class _Checker:
    """Turns one row of the source into one line about it."""

    job: Job
    fetcher: Fetcher
    store: Store
    threads: ThreadPoolExecutor

    async def line(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        job = self.job
        line: dict[str, Any] = {"row": index, "reason": None, "detail": None, "notes": [], "attempts": 0}
        line |= {name: [] for name in _PICTURE_FIELDS} | dict.fromkeys(("question", "answer", "group", "stratum"), 0)
        line["key"] = 0
        references = job.references(row)
        line["picture"] = [job.named(reference) for reference in references]
        try:
            question, answer = self._texts({**row, PICTURES: references})
            for reference in references:
                await self._add(reference, line)
        except Refusal as refusal:
            line |= {"reason": refusal.reason, "detail": refusal.detail}
            line["attempts"] += refusal.attempts
            return line
        settings = job.settings
        group = row[settings.group_column] if settings.group_column else None
        line["question"] = _hash([line["pixels"], question])
        line["answer"] = _hash(answer)
        empty = group is None or group != group or not str(group).strip()
        line["group"] = 0 if empty else _hash(group)
        line["stratum"] = _hash(row[settings.stratify_column]) if settings.stratify_column else 0
        line["key"] = line["group"] or _hash(line["pixels"][0] if line["pixels"] else [question, answer])
        return line

    def _texts(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """What is asked and what is to be answered; a `Refusal` if a row has no use as it stands."""
        reader, placeholders = self.job.reader, self.job.settings.placeholders
        if reader.answer is not None:
            for name in dict.fromkeys((*reader.prompt.fields, *reader.answer.fields)):
                value = row[name]
                text = "" if value is None or value != value else str(value).strip()
                if not text:
                    raise Refusal("empty_field", f"column {name!r} is empty")
                if text.lower() in {word.lower() for word in placeholders}:
                    raise Refusal("placeholder", f"column {name!r} holds {text!r}")
            if not row[PICTURES]:
                raise Refusal("no_picture", f"no picture in {', '.join(map(repr, self.job.columns))}")
        try:
            messages = reader.messages(row)
        except ValueError as error:
            raise Refusal("messages", str(error)) from None
        # Every turn of the assistant is learned, and each can contradict the same conversation elsewhere.
        asked = [turn for turn in messages if turn["role"] != "assistant"]
        return asked, [turn for turn in messages if turn["role"] == "assistant"]

    async def _add(self, reference: str | bytes, line: dict[str, Any]) -> None:
        settings, loop = self.job.settings, asyncio.get_running_loop()
        if isinstance(reference, str) and reference.lower().startswith(("http://", "https://")):
            content, attempts = await self.fetcher.fetch(reference)
            line["attempts"] += attempts
        elif isinstance(reference, str):
            content = await loop.run_in_executor(self.threads, self._file, reference)
        else:
            content = reference
        if len(content) > settings.max_bytes:
            raise Refusal("too_large", f"{len(content):,} bytes, more than max_bytes {settings.max_bytes:,}")
        picture = await loop.run_in_executor(
            self.threads,
            lambda: check_picture(
                content,
                min_side=settings.min_side,
                max_pixels=settings.max_pixels,
                num_crops=self.job.num_crops,
                downscale=settings.downscale,
            ),
        )
        stored = picture.converted
        line["notes"] += [note for note in picture.notes if note not in line["notes"]]
        line["sha256"].append(picture.sha256)
        line["bytes"].append(len(content))
        line["width"].append(picture.width)
        line["height"].append(picture.height)
        line["pixels"].append(picture.pixels)
        line["perceptual_hash"].append(picture.perceptual)
        line["stored_sha256"].append(picture.sha256 if stored is None else self.store.put(stored))
        line["stored_bytes"].append(len(content if stored is None else stored))
        line["colours"].append(picture.colours)

    def _file(self, reference: str) -> bytes:
        if "://" in reference:
            raise Refusal("address", f"{shown(reference)} is neither an http or https URL nor a path")
        path = self.job.path(reference)
        try:
            if path.stat().st_size > self.job.settings.max_bytes:
                raise Refusal("too_large", f"{self.job.named(reference)} has {path.stat().st_size:,} bytes")
            return path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise Refusal("no_file", f"{self.job.named(reference)}: {reason}") from None


def _hash(value: Any) -> int:
    """64 bits that stand for a value; never 0, which stands for none."""
    text = value if isinstance(value, str) else json.dumps(value, default=_plain, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") or 1


def _write_whole(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, aside)
    os.replace(aside, path)


# --- deciding, in one process ---


@dataclass(frozen=True)
class Decision:
    """
    What becomes of the rows of the source, one entry per row, the splits one after the other.

    Args:
        reason (`np.ndarray`): Why a row is dropped, `None` for one that is kept.
        detail (`np.ndarray`): The same for people.
        split (`np.ndarray`): The split that a kept row goes to, `None` for one that is dropped.
        near (`np.ndarray`): Whether another picture looks nearly the same.
        cluster (`np.ndarray`): Number of the row that names the row's cluster, -1 for none.
        largest (`int`): Rows of the largest cluster.
        stored_bytes (`np.ndarray`): Bytes of each row's pictures.
        contradicting (`int`): Rows with equal pictures and questions and different answers.
    """

    reason: Any
    detail: Any
    split: Any
    near: Any
    cluster: Any
    largest: int
    stored_bytes: Any
    contradicting: int


def decide(jobs: Sequence[Job], files: Sequence[Sequence[str]], recipe: Recipe, before: pd.Series) -> Decision:
    """
    Finds duplicates, contradictions and what must not be parted, and draws the split.

    Args:
        jobs (`Sequence[Job]`): The source's train split and, if it has one, its test split.
        files (`Sequence[Sequence[str]]`): The blocks of each, in order.
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `held_out`, `seed` and keys of `prepare`.
        before (`pd.Series`): Whether a key was held out by the last preparation.

    Returns:
        [`Decision`]: For each row.
    """
    settings = recipe.prepare
    names = ["reason", "question", "answer", "group", "stratum", "key", "pixels", "perceptual_hash", "colours"]
    tables = [pq.read_table(file, columns=[*names, "stored_bytes"]) for part in files for file in part]
    table = pa.concat_tables(tables)
    rows, train = len(table), recipe.script.dataset_train_split
    test = recipe.script.dataset_test_split
    reason = np.array(table["reason"].to_pylist(), dtype=object)
    detail, split = np.full(rows, None, object), np.full(rows, None, object)
    given = np.repeat([job.split for job in jobs], [len(job.rows) for job in jobs])
    numbers = np.concatenate([np.arange(len(job.rows)) for job in jobs])  # each row's number in its own split
    usable = np.flatnonzero(reason == np.array(None))
    if len(jobs) > 1:  # of equal rows the first is kept: that of the test split, which must not be learned
        usable = usable[np.argsort(given[usable] != test, kind="stable")]
    contents = _contents(table.take(pa.array(usable)))

    first, contradicting = same_rows(contents)
    if settings.duplicates == "drop":
        for row, same, conflict in zip(usable, usable[first], contradicting, strict=True):
            if conflict:
                reason[row], detail[row] = "conflict", "equal pictures and question have other answers elsewhere"
            elif row != same:
                reason[row], detail[row] = "duplicate", f"the same as row {numbers[same]} of split {given[same]!r}"
    usable = usable[reason[usable] == np.array(None)]
    contents = _contents(table.take(pa.array(usable)))
    alike = look_alikes(contents, settings.near_duplicates)
    cluster = clusters(contents, alike)
    kinds = np.unique(np.stack([alike.astype(np.uint64), contents.pixels]), axis=1)[0].astype(np.int64)
    looks = np.zeros(rows, bool)
    looks[usable[contents.picture_row[np.bincount(kinds, minlength=len(alike))[alike] > 1]]] = True

    if len(jobs) > 1:
        held_out = given[usable] == test
        shared = np.isin(cluster, cluster[held_out]) & ~held_out
        split[usable] = given[usable]
        reason[usable[shared]] = "in_test"
        detail[usable[shared]] = f"its picture, a near duplicate of it or its group stands in split {test!r}"
    elif len(usable):
        held_out = held_out_rows(
            contents,
            cluster,
            share=recipe.task.held_out,
            seed=recipe.training.seed,
            stratified=settings.stratify_column is not None,
            before=before,
        )
        split[usable] = np.where(held_out, test, train)
    split[reason != np.array(None)] = None
    clustered = np.full(rows, -1)
    clustered[usable] = usable[cluster]
    stored = table["stored_bytes"].combine_chunks()
    sizes = np.diff(np.concatenate([[0], np.cumsum(stored.flatten().to_numpy())])[stored.offsets.to_numpy()])
    largest = int(np.bincount(cluster).max(initial=0))
    return Decision(reason, detail, split, looks, clustered, largest, sizes, int(contradicting.sum()))


def _contents(table: pa.Table) -> Contents:
    table = table.combine_chunks()
    hashes = {name: table[name].to_numpy() for name in ("question", "answer", "group", "stratum", "key")}
    pixels = table["pixels"].combine_chunks()
    counts = np.diff(pixels.offsets.to_numpy())
    texts = pixels.flatten().to_pylist()
    colours = b"".join(table["colours"].combine_chunks().flatten().to_pylist())
    return Contents(
        **hashes,
        picture_row=np.repeat(np.arange(len(table)), counts),
        pixels=np.array([int(text[:16], 16) for text in texts], np.uint64),
        perceptual=table["perceptual_hash"].combine_chunks().flatten().to_numpy(),
        colours=np.frombuffer(colours, np.uint8).reshape(-1, 48),
    )


def _refuse_empty(decision: Decision, recipe: Recipe, manifest: Path) -> None:
    """Raises a `ValueError` if nothing is left, or nothing on one side of the split."""
    for name in (recipe.script.dataset_train_split, recipe.script.dataset_test_split):
        if (decision.split == name).any():
            continue
        see = f"What became of each row stands in {manifest}."
        kept = sum(reason is None for reason in decision.reason)
        if kept:
            raise ValueError(
                f"`held_out` is {recipe.task.held_out}, and no row is left for split {name!r}: {kept:,} rows are kept, "
                "and rows that share a picture, a near duplicate or a group stay together. Hold out another share, or "
                f"look at `group_column` and `near_duplicates`. {see}"
            )
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in Counter(decision.reason).most_common())
        raise ValueError(f"`source` {recipe.prepare.source}: no row can be used ({dropped}). {see}")


# --- writing, in worker processes ---


@dataclass(frozen=True)
class Shard:
    """
    One Parquet file of the data set, to be.

    Args:
        job ([`Job`]): Where its rows come from.
        path (`Path`): The file.
        rows (`list[int]`): Positions of its rows in the source.
        stored (`list[list[str]]`): SHA-256 of each row's pictures, as they are to be stored.
    """

    job: Job
    path: Path
    rows: list[int]
    stored: list[list[str]]


def features_of(job: Job) -> Features:
    """The columns of the data set: those of the source, with pictures where references or undecoded pictures were."""
    features = job.rows.features
    texts = (Value("string"), Value("large_string"))
    inner = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
    kept = {
        name: kind
        for name, kind in features.items()
        if name != job.output
        and not isinstance(inner[name], Image)
        and (name not in job.columns or inner[name] in texts)
    }
    if not job.columns:
        return Features(kept)
    many = len(job.columns) > 1 or isinstance(features[job.columns[0]], List | LargeList)
    return Features({**kept, job.output: List(Image()) if many else Image()})


def write_shard(shard: Shard) -> tuple[int, int]:
    """
    Writes rows with their pictures, in batches, so that memory holds a few of them.

    Args:
        shard ([`Shard`]): What to write.

    Returns:
        `tuple[int, int]`: Rows and bytes written.

    Raises:
        ValueError: If a picture is no longer what was checked.
    """
    job, store = shard.job, Store(shard.job.work / "pictures")
    features = features_of(job)
    schema = features.arrow_schema
    many = isinstance(features.get(job.output), List)
    shard.path.parent.mkdir(parents=True, exist_ok=True)
    # Chunks cut by content: a later version of the data set uploads to the Hub only what is new in it.
    with pq.ParquetWriter(shard.path, schema, use_content_defined_chunking=True, write_page_index=True) as writer:
        for start in range(0, len(shard.rows), 64):
            if _stopped():
                raise KeyboardInterrupt
            rows = shard.rows[start : start + 64]
            table = job.rows.with_format("arrow")[rows]
            if not job.columns:
                writer.write_table(table.select(schema.names).cast(schema))
                continue
            pictures = []
            for row, digests in zip(table.select(list(job.columns)).to_pylist(), shard.stored[start:], strict=False):
                found = [
                    _stored(job, store, reference, digest)
                    for reference, digest in zip(job.references(row), digests, strict=True)
                ]
                pictures.append(found if many else found[0])
            columns = [
                _presentable(table[name], job) if name in job.columns else table[name] for name in schema.names[:-1]
            ]
            writer.write_table(
                pa.Table.from_arrays([*columns, pa.array(pictures, schema.field(job.output).type)], schema=schema)
            )
    return len(shard.rows), shard.path.stat().st_size


def _presentable(column: pa.ChunkedArray, job: Job) -> pa.ChunkedArray:
    """URLs and paths of pictures without what nobody should see of them."""
    values = [
        [job.named(one) if one else one for one in value] if isinstance(value, list) else value and job.named(value)
        for value in column.to_pylist()
    ]
    return pa.chunked_array([pa.array(values, column.type)])


def _stored(job: Job, store: Store, reference: Any, digest: str) -> dict[str, Any]:
    """The `Image` feature's form of a picture: its bytes, and a file name."""
    content = store.read(digest)
    if content is None and isinstance(reference, bytes):
        content = reference
    elif content is None and "://" not in reference:
        content = job.path(reference).read_bytes()
    if content is None or hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(
            f"The picture {job.named(reference) or digest} has changed since it was checked, or is gone from "
            f"{job.work}. Type the command again; if that does not help, remove {job.work / 'blocks'} first."
        )
    name = re.split(r"[?#]", job.named(reference))[0].rstrip("/").rpartition("/")[2]
    return {"bytes": content, "path": name or f"{digest[:16]}"}


# --- the whole ---


def prepare(recipe: Recipe) -> dict[str, Any]:
    """
    Makes the data set of a recipe, or makes it anew from what its source is now.

    Args:
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `source` is read, the folder `dataset_name` is written.

    Returns:
        `dict`: The summary that is also printed and kept in the data set's card.

    Raises:
        ValueError: If the recipe, the source or the target is not right, or no row can be used.
    """
    settings, started = recipe.prepare, time.monotonic()
    target = _target(recipe)
    work = target.with_name(f"{target.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            if not target.exists() and (work / "old").is_dir():
                (work / "old").rename(target)  # a run was killed between the two renames at its very end
            jobs = _jobs(recipe, work)
            before = _earlier(target, recipe)
            fresh = work / "new"
            shutil.rmtree(fresh, ignore_errors=True)
            blocks = sum(-(-len(job.rows) // BLOCK) for job in jobs)
            with _engine(settings, min(jobs[0].workers, blocks)) as run:
                files, requests = _check(jobs, run)
                decision = decide(jobs, files, recipe, before)
                _write_manifest(jobs, files, decision, work / "manifest.parquet")
                _refuse_empty(decision, recipe, work / "manifest.parquet")
                splits = _write_shards(jobs, files, decision, fresh, recipe, run)
            (work / "manifest.parquet").rename(fresh / "manifest.parquet")
            summary = _summary(jobs, fresh / "manifest.parquet", splits, decision, recipe)
            _write_card(jobs[0], splits, summary, fresh, recipe)
            shutil.rmtree(work / "old", ignore_errors=True)
            if target.exists():
                target.rename(work / "old")
            fresh.rename(target)
            shutil.rmtree(work / "old", ignore_errors=True)
            current = {file for part in files for file in part}
            for block in (work / "blocks").iterdir():
                if str(block) not in current:
                    block.unlink()
    except Timeout:
        raise ValueError(
            f"`dataset_name` {str(target)!r} is being prepared by another process (it holds {work / 'lock'}). Wait "
            "for it, or end it."
        ) from None
    print(_told(summary, target, work, requests, time.monotonic() - started))
    return summary


def _target(recipe: Recipe) -> Path:
    settings, target = recipe.prepare, Path(str(recipe.script.dataset_name)).expanduser()
    if settings.source is None:
        raise ValueError(
            f"`source` is missing in {recipe.path}: say what to prepare (a Hub id, a table, a folder of pictures), "
            "and with `dataset_name` the folder to write."
        )
    if target.resolve() == Path(settings.source).expanduser().resolve():
        raise ValueError(f"`source` and `dataset_name` are both {str(target)!r}: write a new folder's name into one.")
    if target.resolve() in Path(settings.source).expanduser().resolve().parents:
        raise ValueError(
            f"`source` {settings.source!r} lies in `dataset_name` {str(target)!r}, which is written anew. Move "
            "one of them."
        )
    ours = {"data", "manifest.parquet", "summary.json", "README.md", ".cache", ".git", ".gitattributes"}
    if target.is_dir() and (strange := sorted({file.name for file in target.iterdir()} - ours)):
        raise ValueError(
            f"`dataset_name` {str(target)!r} holds {', '.join(strange[:3])}, which this command did not write and "
            "would lose. Give a new folder's name, or move that away."
        )
    if target.exists() and not (target / "manifest.parquet").is_file():
        raise ValueError(
            f"`dataset_name` {str(target)!r} exists and was not made by this command (it has no manifest.parquet). "
            "Give a new folder's name."
        )
    if settings.downscale and recipe.task.num_crops is None:
        raise ValueError("`downscale: true` needs `num_crops`: say how many crops the pictures are to be kept for.")
    return target


def _jobs(recipe: Recipe, work: Path) -> list[Job]:
    """The source's train split and, if it has one, its test split, ready to be checked."""
    settings, script, task = recipe.prepare, recipe.script, recipe.task
    splits, folder = read_source(str(settings.source), recipe, key="source")
    train, test = script.dataset_train_split, script.dataset_test_split
    if train not in splits:
        raise ValueError(f"`dataset_train_split` is {train!r}; {settings.source} has {', '.join(splits)}.")
    if unused := [name for name in splits if name not in (train, test)]:
        print(f"not used: {', '.join(unused)} (to hold one out, name it: `dataset_test_split`)", flush=True)
    jobs = []
    for name in (train, test):
        if name not in splits:
            continue
        rows = splits[name]
        if not rows.cache_files:  # a table in memory would be sent to the workers with every task
            rows.save_to_disk(work / "rows" / name)
            rows = load_from_disk(work / "rows" / name)
        conversations = "messages" in rows.column_names
        output = "images" if conversations else task.image_column
        columns = tuple(settings.source_image_column or [output])
        if conversations and not settings.source_image_column and output not in rows.column_names:
            columns = ()  # text only
        others = [
            name
            for name, kind in rows.features.items()
            if isinstance(getattr(kind, "feature", kind), Image) and name not in columns
        ]
        if others and name == train:
            print(
                f"left out: pictures in {', '.join(others)} (to use them, name them: `source_image_column`)", flush=True
            )
        reads = [("source_image_column", column) for column in columns]
        reads += [(key, getattr(settings, key)) for key in ("group_column", "stratify_column")]
        for key, column in reads:
            if column is not None and column not in rows.column_names:
                raise ValueError(f"`{key}` is {column!r}, and there is no such column: {', '.join(rows.column_names)}.")
        for column in columns:
            if not _may_hold_pictures(rows.features[column]):
                raise ValueError(
                    f"`source_image_column` {column!r} holds {rows.features[column]}, expected URLs, paths, bytes or "
                    "pictures."
                )
        if output in rows.column_names and output not in columns and output not in others:
            raise ValueError(
                f"`image_column` is {output!r}, where the pictures are to go, and the source has such a column that "
                "is not in `source_image_column`. Write another name into `image_column`."
            )
        jobs.append(
            Job(
                rows=rows,
                split=name,
                folder=folder,
                columns=columns,
                output=output,
                reader=_reader(rows, recipe),
                settings=settings,
                num_crops=task.num_crops,
                work=work,
                workers=_workers(settings, remote=any(_is_text(rows.features[column]) for column in columns)),
            )
        )
    if len({str(features_of(job)) for job in jobs}) > 1:
        raise ValueError(f"`source` {settings.source}: the columns of {train!r} and {test!r} differ.")
    return jobs


def _is_text(kind: Any) -> bool:
    return getattr(kind, "feature", kind) in (Value("string"), Value("large_string"))


def _may_hold_pictures(kind: Any) -> bool:
    inner = getattr(kind, "feature", kind)
    if isinstance(inner, dict):
        return {"bytes", "path"} >= set(inner) > set()
    return (
        isinstance(inner, Image) or _is_text(inner) or inner in (Value("binary"), Value("large_binary"), Value("null"))
    )


def _reader(rows: Dataset, recipe: Recipe) -> Reader:
    task = recipe.task
    if "messages" in rows.column_names:
        for key in ("prompt", "answer"):
            if getattr(task, key) != getattr(TaskArguments, key):
                raise ValueError(f"`{key}` is given and the rows hold `messages`, which say it. Remove `{key}`.")
        return Reader(Template(task.prompt, key="prompt"), None, PICTURES)
    if task.answer is None:
        raise ValueError(
            "`answer` is missing: say what is to be learned from a row, such as 'Product: {title}', or give rows with "
            f"`messages`. The columns are {', '.join(rows.column_names)}."
        )
    reader = Reader(Template(task.prompt, key="prompt"), Template(task.answer), PICTURES)
    for template in (reader.prompt, Template(task.answer)):
        template.check_columns(rows.column_names)
    return reader


def _check(jobs: Sequence[Job], run: Run) -> tuple[list[list[str]], int]:
    """Checks all rows; returns the files with the lines about them, in order, and the number of requests made."""
    tasks = []
    for position, job in enumerate(jobs):
        starts = range(0, len(job.rows), BLOCK)
        most = min(STRIPE, -(-len(starts) // job.workers))
        tasks += [(position, job, starts[first : first + most]) for first in range(0, len(starts), most)]
    found: list[dict[int, str]] = [{} for _ in jobs]
    total = sum(len(job.rows) for job in jobs)
    reasons = Counter[str]()
    with tqdm(total=total, desc="check", unit=" rows", mininterval=0.5, smoothing=0.1) as bar:

        def one_more(reason: str) -> None:
            if reason:
                reasons[reason] += 1
                bar.set_postfix_str(
                    " ".join(f"{name} {count}" for name, count in reasons.most_common(4)), refresh=False
                )
            bar.update()

        requests = 0
        for index, (files, made) in run(check_blocks, [(job, starts) for _, job, starts in tasks], one_more):
            found[tasks[index][0]] |= files
            requests += made
        bar.update(total - bar.n)  # on a cluster, rows are counted by the task
    return [[files[start] for start in sorted(files)] for files in found], requests


def _write_shards(
    jobs: Sequence[Job], files: Sequence[Sequence[str]], decision: Decision, folder: Path, recipe: Recipe, run: Run
) -> dict[str, SplitInfo]:
    """Writes the rows that are kept; returns rows and bytes of each split."""
    stored = pa.concat_tables([pq.read_table(file, columns=["stored_sha256"]) for part in files for file in part])[
        "stored_sha256"
    ]
    shards, splits = [], {}
    for name in (recipe.script.dataset_train_split, recipe.script.dataset_test_split):
        rows = np.flatnonzero(decision.split == name)
        size = int(decision.stored_bytes[rows].sum())
        # Small data sets too in several files, so that each process and worker that streams them has its own.
        count = max(-(-size // SHARD), -(-len(rows) // 100_000), min(16, len(rows) // 64), 1)
        for number, part in enumerate(np.array_split(rows, count)):
            job = jobs[0] if part[0] < len(jobs[0].rows) else jobs[1]
            offset = 0 if job is jobs[0] else len(jobs[0].rows)
            path = folder / "data" / f"{name}-{number:05d}-of-{count:05d}.parquet"
            digests = stored.take(pa.array(part)).to_pylist()
            shards.append(Shard(job, path, (part - offset).tolist(), digests))
        splits[name] = SplitInfo(name, num_bytes=0, num_examples=len(rows))
    with tqdm(total=sum(len(shard.rows) for shard in shards), desc="write", unit=" rows", mininterval=0.5) as bar:
        for index, (rows, size) in run(write_shard, [(shard,) for shard in shards]):
            splits[shards[index].path.name.rsplit("-", 3)[0]].num_bytes += size
            bar.update(rows)
    return splits


def _write_manifest(jobs: Sequence[Job], files: Sequence[Sequence[str]], decision: Decision, path: Path) -> None:
    """One line per row of the source, in its order, block by block."""
    position, writer = 0, None
    for job, part in zip(jobs, files, strict=True):
        for file in part:
            lines = pq.read_table(file)
            here = slice(position, position + len(lines))
            position += len(lines)
            details = lines["detail"].to_pylist()
            notes = [
                [*own, "near_duplicate"] if near else own
                for own, near in zip(lines["notes"].to_pylist(), decision.near[here], strict=True)
            ]
            columns: dict[str, Any] = {
                "source_split": pa.array([job.split] * len(lines), pa.string()),
                "row": lines["row"],
                "status": pa.array(["dropped" if reason else "kept" for reason in decision.reason[here]], pa.string()),
                "reason": pa.array(decision.reason[here], pa.string()),
                "detail": pa.array([a or b for a, b in zip(details, decision.detail[here], strict=True)], pa.string()),
                "split": pa.array(decision.split[here], pa.string()),
                "notes": pa.array(notes, pa.list_(pa.string())),
                "cluster": pa.array(decision.cluster[here], pa.int64()),
                "key": lines["key"],
            }
            columns |= {name: lines[name] for name in _LINE.names if name not in columns and name not in _INTERNAL}
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    assert writer is not None
    writer.close()


def _drawn_by(recipe: Recipe) -> dict[str, Any]:
    """What a draw of the split depends on besides the rows."""
    return {
        "held_out": recipe.task.held_out,
        "seed": recipe.training.seed,
        "group_column": recipe.prepare.group_column,
        "stratify_column": recipe.prepare.stratify_column,
        "dataset_test_split": recipe.script.dataset_test_split,
    }


def _earlier(target: Path, recipe: Recipe) -> pd.Series:
    """Which keys the last preparation held out, so that they stay where they are; none if it drew by other settings."""
    manifest, summary = target / "manifest.parquet", target / "summary.json"
    if not (manifest.is_file() and summary.is_file()):
        return pd.Series(dtype=bool)
    drawn, now = json.loads(summary.read_text(encoding="utf-8"))["drawn_by"], _drawn_by(recipe)
    if changed := [key for key in now if drawn.get(key) != now[key]]:
        print(f"the split is drawn anew: {', '.join(changed)} changed since the last time", flush=True)
        return pd.Series(dtype=bool)
    found = pq.read_table(manifest, columns=["key", "split"]).to_pandas().dropna()
    return (found["split"] == recipe.script.dataset_test_split).groupby(found["key"]).min()


def _summary(
    jobs: Sequence[Job], manifest: Path, splits: Mapping[str, SplitInfo], decision: Decision, recipe: Recipe
) -> dict[str, Any]:
    reasons = Counter(reason for reason in decision.reason.tolist() if reason)
    notes, size = Counter[str](), 0
    for batch in pq.ParquetFile(manifest).iter_batches(columns=["status", "notes", "stored_bytes"]):
        for line in batch.to_pylist():
            if line["status"] == "kept":
                notes.update(line["notes"])
                size += sum(line["stored_bytes"])
    return {
        "rows": sum(len(job.rows) for job in jobs),
        "kept": {name: info.num_examples for name, info in splits.items()},
        "dropped": dict(reasons.most_common()),
        "notes": dict(notes.most_common()),
        "picture_bytes": size,
        "largest_cluster": decision.largest,
        "contradicting": decision.contradicting,
        "drawn_by": _drawn_by(recipe) if len(jobs) == 1 else {},
        "downscaled_for_num_crops": jobs[0].num_crops if jobs[0].settings.downscale else None,
    }


def _told(summary: Mapping[str, Any], target: Path, work: Path, requests: int, seconds: float) -> str:
    kept, dropped = summary["kept"], summary["dropped"]
    lines = [
        f"rows in the source  {summary['rows']:>9,}",
        f"kept                {sum(kept.values()):>9,}   " + " · ".join(f"{name} {n:,}" for name, n in kept.items()),
        f"dropped             {sum(dropped.values()):>9,}   "
        + " · ".join(f"{why} {n:,}" for why, n in dropped.items()),
    ]
    if summary["notes"]:
        lines.append(
            f"{'kept, and noted':<20}{'':>9}   " + " · ".join(f"{n} {c:,}" for n, c in summary["notes"].items())
        )
    lines.append(f"pictures            {summary['picture_bytes'] / 1e6:>9,.1f} MB")
    lines.append(
        f"time                {seconds:>9,.1f} s, {summary['rows'] / seconds:,.0f} rows/s; {requests:,} requests"
    )
    total = sum(kept.values())
    if total >= 20 and summary["largest_cluster"] > total / 5:
        lines.append(
            f"look: {summary['largest_cluster']:,} rows look alike or share a group and stand on one side together. If "
            "they are different things, lower `near_duplicates` (null: only equal pictures)."
        )
    lines.append(f"\n{target}: the data set, and manifest.parquet, which says of every row what became of it.")
    lines.append(f"{work}: what was fetched. Keep it to prepare again at little cost; else remove it.")
    return "\n" + "\n".join(lines)


def _write_card(
    job: Job, splits: Mapping[str, SplitInfo], summary: Mapping[str, Any], folder: Path, recipe: Recipe
) -> None:
    """Writes README.md, which `datasets` and the Hub read the columns and splits from, and people the rest."""
    sizes = SplitDict()
    for info in splits.values():
        sizes.add(info)
    size = sum(info.num_bytes for info in splits.values())
    info = DatasetInfo(features=features_of(job), splits=sizes, download_size=size, dataset_size=size)
    files = [{"split": name, "path": f"data/{name}-*"} for name in splits]
    data = DatasetCardData(configs=[{"config_name": "default", "data_files": files}], tags=["image", "sft_phi3v"])
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    source = Path(str(recipe.prepare.source))
    name = source.name if source.exists() else str(source)
    text = (
        f"# {folder.parent.name.removesuffix('.work')}\n\n"
        f"Made by `python -m sft_phi3v.prepare` of `{name}`: every picture was decoded, duplicates and rows that "
        "contradict each other are left out, and no picture stands on both sides of the split. `manifest.parquet` "
        "says of every row of the source what became of it.\n\n"
        f"```json\n{json.dumps(summary, indent=2)}\n```\n"
    )
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(f"---\n{data}\n---\n\n{text}", encoding="utf-8")


# --- many processes ---


def _workers(settings: PrepareArguments, *, remote: bool) -> int:
    """How many processes; where they fetch, no more than may fetch at once from one host."""
    count = settings.workers
    if count is None and settings.engine == "ray":
        count = max(1, int(_ray().cluster_resources().get("CPU", 1)))
    elif count is None:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, settings.fetch_connections, settings.fetch_per_host) if remote else count


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
    except ImportError:
        raise ValueError("`engine: ray` needs Ray: pip install -c constraints.txt -e .[cluster]") from None
    if not ray.is_initialized():
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise ValueError(f"`engine: ray`: this machine belongs to no running Ray cluster ({error}).") from None
    return ray


@contextlib.contextmanager
def _engine(settings: PrepareArguments, workers: int) -> Iterator[Run]:
    """
    What runs a function over tasks in so many processes, and gives each task's number and result when it is done. Its
    third argument is told the outcome of each row, where the engine can.
    """
    if settings.engine == "ray":
        yield partial(_run_on_ray, workers)
        return
    context = multiprocessing.get_context("spawn")
    queue, stop, over = context.SimpleQueue(), context.Event(), threading.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (queue, stop))

    def run(
        function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], one_more: Callable[[str], None] = _silent
    ) -> Iterator[tuple[int, Any]]:
        over.clear()

        def listen() -> None:
            while not (over.is_set() and queue.empty()):
                if queue.empty():
                    time.sleep(0.05)
                else:
                    one_more(queue.get())

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            with _without_ctrl_c():  # a task that is put in may start a process
                futures = {pool.submit(function, *task): index for index, task in enumerate(tasks)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            over.set()
            listener.join(timeout=2)  # a worker that was killed while it wrote leaves half a word

    with pool:
        try:
            yield run
        except BrokenProcessPool:
            raise ValueError(
                "A process that prepares was killed, most likely for want of memory. Nothing is lost: type the command "
                "again, with fewer `workers` or a smaller `max_pixels`."
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that are started in here never see Ctrl-C, which a terminal sends to all at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run_on_ray(
    workers: int,
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    one_more: Callable[[str], None] = _silent,
) -> Iterator[tuple[int, Any]]:
    ray = _ray()
    remote = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(function)
    queued, running = list(enumerate(tasks))[::-1], dict[Any, int]()
    while queued or running:
        while queued and len(running) < workers:  # the bounds on connections are shared among so many
            index, task = queued.pop()
            running[remote.remote(*task)] = index
        done, _ = ray.wait(list(running))
        for future in done:
            yield running.pop(future), ray.get(future)


# --- the command ---


def push(recipe: Recipe) -> str:
    """
    Uploads the data set to the Hub, privately; what is there already is not sent again.

    Args:
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `push` names the data set there, `dataset_name` the folder.

    Returns:
        `str`: The data set's address.
    """
    api, name = HfApi(), str(recipe.prepare.push)
    url = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
    api.upload_folder(
        repo_id=name,
        repo_type="dataset",
        folder_path=str(recipe.script.dataset_name),
        commit_message="Prepared by sft_phi3v",
        delete_patterns=["data/*.parquet"],  # shards of an earlier version have other names
    )
    return str(url)


def _check_push(recipe: Recipe) -> None:
    """Says before the work, not after it, that nothing could be uploaded."""
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise ValueError(f"`push: {recipe.prepare.push}` needs a token with write access: hf auth login") from None
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"`push: {recipe.prepare.push}`: the Hub cannot be reached, or refuses: {error}") from None


def main(argv: list[str] | None = None) -> None:
    """`python -m sft_phi3v.prepare RECIPE [--key value …]`"""
    try:
        recipe = load_recipe(sys.argv[1:] if argv is None else argv)
        if recipe.prepare.push:
            _check_push(recipe)
        prepare(recipe)
        if recipe.prepare.push:
            print(f"uploaded: {push(recipe)}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nstopped. Nothing is lost: type the command again to go on.") from None


if __name__ == "__main__":
    main()
