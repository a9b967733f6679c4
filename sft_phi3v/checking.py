"""Rows of the source become lines about them: kept or not, why, and what their pictures are.

A block of rows is fetched, decoded and checked by one process, many rows at a time, and its lines are written down as
one small file whose name says what they depend on. What is written down already is not done again.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Image, LargeList, List

from sft_phi3v.data import Reader
from sft_phi3v.engine import progress, stopped
from sft_phi3v.fetch import Fetcher, Limits, Refusal, Store, shown
from sft_phi3v.pictures import check_picture
from sft_phi3v.recipe import PrepareArguments

BLOCK = 256  # rows that are checked and noted down together
VERSION = 1  # of what a block means: a later one does not take over lines of an earlier one
PICTURES = "__pictures__"
# Reasons that another attempt may not meet; the others are properties of the row.
FETCHING = re.compile(r"http_\d+|timeout|connection|redirects|address|content_type|too_large|no_file")


PICTURE_FIELDS = {
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
LINE = pa.schema(
    [
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("notes", pa.list_(pa.string())),
        ("attempts", pa.int32()),
        *((name, pa.list_(kind)) for name, kind in PICTURE_FIELDS.items()),
        *((name, pa.uint64()) for name in ("question", "answer", "group", "stratum", "key")),
    ]
)


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
        while not stopped():
            await asyncio.sleep(0.5)
        assert main is not None
        main.cancel()

    async def one(checker: "_Checker", row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            line = await checker.line(row, index)
        finally:
            under_way.release()
        progress(line["reason"] or "")
        return line

    async def note_down(path: Path, lines: list[dict[str, Any]], tasks: list[asyncio.Task[dict[str, Any]]]) -> int:
        found = await asyncio.gather(*tasks)
        lines = sorted([*lines, *found], key=lambda line: line["row"])
        _write_whole(pa.Table.from_pylist(lines, schema=LINE), path)
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
                    progress(line["reason"] or "")
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
        line |= {name: [] for name in PICTURE_FIELDS} | dict.fromkeys(("question", "answer", "group", "stratum"), 0)
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
