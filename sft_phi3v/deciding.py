"""Lines about rows become decisions: which rows are kept, and on which side of the split each one stands.

One process decides, since a duplicate may stand anywhere; of each row it holds some hashes, and no picture.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq

from sft_phi3v.checking import Job
from sft_phi3v.recipe import Recipe
from sft_phi3v.splitting import Contents, clusters, held_out_rows, look_alikes, same_rows


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


def refuse_empty(decision: Decision, recipe: Recipe, manifest: Path) -> None:
    """
    Refuse a decision that leaves nothing, or nothing on one side of the split.

    Args:
        decision ([`Decision`]): The decision.
        recipe ([`~sft_phi3v.recipe.Recipe`]): The recipe.
        manifest (`Path`): Where to look for reasons.

    Raises:
        ValueError: If so.
    """
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
