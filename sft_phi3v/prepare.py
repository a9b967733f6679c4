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

from sft_phi3v.usage import check_recipe

if __name__ == "__main__":
    check_recipe()  # before torch is imported

import hashlib
import json
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, Image, LargeList, List, Value, load_from_disk
from datasets.info import DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from filelock import FileLock, Timeout
from huggingface_hub import DatasetCardData, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from tqdm import tqdm

from sft_phi3v.checking import BLOCK, LINE, PICTURES, Job, check_blocks
from sft_phi3v.data import Reader, Template, read_source
from sft_phi3v.deciding import Decision, decide, refuse_empty
from sft_phi3v.engine import Run, count_workers, engine, stopped
from sft_phi3v.fetch import Store
from sft_phi3v.recipe import Recipe, TaskArguments, load_recipe

STRIPE = 16  # blocks that one process takes at a time: a slow host then holds up their end, not each of them
SHARD = 128 << 20  # bytes
_INTERNAL = ("colours", "question", "answer", "group", "stratum")


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
            with engine(settings, min(jobs[0].workers, blocks)) as run:
                files, requests = _check(jobs, run)
                decision = decide(jobs, files, recipe, before)
                _write_manifest(jobs, files, decision, work / "manifest.parquet")
                refuse_empty(decision, recipe, work / "manifest.parquet")
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
                workers=count_workers(settings, remote=any(_is_text(rows.features[column]) for column in columns)),
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
            columns |= {name: lines[name] for name in LINE.names if name not in columns and name not in _INTERNAL}
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
            if stopped():
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
