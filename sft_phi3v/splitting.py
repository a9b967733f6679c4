"""Which rows are the same, which look the same, and on which side of the split each one stands.

Rows that share a picture, a nearly equal picture or a group form a cluster, which stands on one side as a whole.
Its side follows from a hash of its own content and the seed, not from its position: the same rows give the same split
on every machine, and rows that are added later leave the others where they are.

    row 0  scarf.jpg              product 8031 ┐
    row 1  scarf_small.jpg        product 8031 ┴ one cluster: 0.07 of 1, below `held_out: 0.1` → test
    row 2  coat.jpg               product 8110   another:     0.62                             → train
"""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd  # type: ignore[import-untyped]
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

COLOUR_DISTANCE = 16  # levels of 255; re-encoding moves the mean colour of a sixteenth of a picture by 2 or 3
Bits = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Contents:
    """
    What decides about the usable rows, in source order; 64-bit hashes stand for contents.

    Args:
        question (`np.ndarray`): Of pictures and question, uint64 `(rows,)`.
        answer (`np.ndarray`): Of the answer, uint64 `(rows,)`.
        group (`np.ndarray`): Of the group, uint64 `(rows,)`; 0 for none.
        stratum (`np.ndarray`): Of the stratum, uint64 `(rows,)`.
        key (`np.ndarray`): What names the row to the draw: its group, or its first picture, or its text; `(rows,)`.
        picture_row (`np.ndarray`): The row that each picture stands in, int64 `(pictures,)`.
        pixels (`np.ndarray`): Of each picture's pixels, uint64 `(pictures,)`.
        perceptual (`np.ndarray`): Perceptual hash of each picture, uint64 `(pictures,)`.
        colours (`np.ndarray`): Mean colours of each, uint8 `(pictures, 48)`.
    """

    question: Bits
    answer: Bits
    group: Bits
    stratum: Bits
    key: Bits
    picture_row: Indices
    pixels: Bits
    perceptual: Bits
    colours: npt.NDArray[np.uint8]


def same_rows(contents: Contents) -> tuple[Indices, npt.NDArray[np.bool_]]:
    """
    Rows that put the same question to the same pictures.

    Args:
        contents ([`Contents`]): The rows.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The first such row of each row (itself if there is none before), int64
        `(rows,)`; and whether the answers contradict each other, bool `(rows,)`.
    """
    _, first, inverse = np.unique(contents.question, return_index=True, return_inverse=True)
    answers = np.unique(np.stack([inverse.astype(np.uint64), contents.answer]), axis=1)[0]
    contradicting = np.bincount(answers.astype(np.int64), minlength=len(first)) > 1
    return first[inverse], contradicting[inverse]


def look_alikes(contents: Contents, distance: int | None) -> Indices:
    """
    Pictures that look the same: perceptual hashes a few bits apart, and about the same colours; and what looks the same
    as these.

    Two hashes at most `distance` bits apart agree in one of `distance + 1` bands of their bits, so only pictures that
    share a band are compared. Memory grows with the pictures, not with the pairs that are compared.

    Args:
        contents ([`Contents`]): The pictures.
        distance (`int`, *optional*): Most bits in which hashes may differ. `None`: only equal pixels look the same.

    Returns:
        `np.ndarray`: For each picture the first one that looks like it (itself if there is none before), int64
        `(pictures,)`.
    """
    if distance is None:
        _, first, inverse = np.unique(contents.pixels, return_index=True, return_inverse=True)
        return first[inverse]
    alike = np.column_stack([contents.perceptual.view(np.uint8).reshape(-1, 8), contents.colours])
    _, unique, inverse = np.unique(alike, axis=0, return_index=True, return_inverse=True)  # no bit tells them apart
    hashes, colours = contents.perceptual[unique], contents.colours[unique].astype(np.int16)
    label = np.arange(len(unique))
    edges = np.linspace(0, 64, distance + 2).astype(np.uint64)
    for low, high in itertools.pairwise(edges):
        band = (hashes >> low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        left, ones, others = np.arange(len(order) - 1), list[Indices](), list[Indices]()
        for step in range(1, len(order)):  # each with its next neighbour in the band, then with the one after that
            left = left[left + step < len(order)]
            left = left[band[order[left]] == band[order[left + step]]]
            if not len(left):
                break
            one, other = order[left], order[left + step]
            apart = label[one] != label[other]
            one, other = one[apart], other[apart]
            close = np.bitwise_count(hashes[one] ^ hashes[other]) <= distance
            one, other = one[close], other[close]
            close = (np.abs(colours[one] - colours[other]) <= COLOUR_DISTANCE).all(axis=1)
            ones.append(one[close])
            others.append(other[close])
            if sum(map(len, ones)) > len(unique):
                label = _linked(label, ones, others)
                ones, others = [], []
        label = _linked(label, ones, others)
    _, first, inverse = np.unique(label[inverse.ravel()], return_index=True, return_inverse=True)
    return first[inverse]


def _linked(label: Indices, ones: list[Indices], others: list[Indices]) -> Indices:
    """The components that pairs make of those that `label` names, each named by its first member again."""
    left, right = np.concatenate([np.arange(len(label)), *ones]), np.concatenate([label, *others])
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(len(label), len(label)))
    _, first, inverse = np.unique(
        connected_components(graph, directed=False)[1], return_index=True, return_inverse=True
    )
    return first[inverse]


def clusters(contents: Contents, alike: Indices) -> Indices:
    """
    The cluster of each row, named by its first row.

    Args:
        contents ([`Contents`]): The rows.
        alike (`np.ndarray`): From [`look_alikes`].

    Returns:
        `np.ndarray`: int64 `(rows,)`.
    """
    rows = len(contents.question)
    grouped = np.flatnonzero(contents.group)
    _, group = np.unique(contents.group[grouped], return_inverse=True)
    groups_from, end = rows + len(alike), rows + len(alike) + len(grouped)
    left = np.concatenate([contents.picture_row, grouped])
    right = np.concatenate([rows + alike, groups_from + group])
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(end, end))
    labels = connected_components(graph, directed=False)[1][:rows]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]


def held_out_rows(
    contents: Contents, cluster: Indices, *, share: float, seed: int, stratified: bool, before: pd.Series
) -> npt.NDArray[np.bool_]:
    """
    Draws the held-out rows, whole clusters at a time.

    A share takes every cluster whose hash lies below it, and one at least. A number of rows, or strata, take the
    clusters with the lowest hashes until there are enough (of each stratum). What an earlier draw decided stays, so
    that more rows do not move those that a model was trained on into the test split; where a new row joins clusters of
    both sides, train has it.

    Args:
        contents ([`Contents`]): The rows.
        cluster (`np.ndarray`): From [`clusters`].
        share (`float`): Below 1 a share of the rows, else a number of rows.
        seed (`int`): Another seed draws others.
        stratified (`bool`): Whether each stratum gets its own share.
        before (`pd.Series`): Whether a key was held out by an earlier draw, indexed by [`Contents.key`].

    Returns:
        `np.ndarray`: Whether each row is held out, bool `(rows,)`.
    """
    rows = pd.DataFrame({"cluster": cluster, "key": contents.key})
    rows["before"] = rows["key"].map(before).astype("float")
    drawn = rows.groupby("cluster").agg(rows=("key", "size"), before=("before", "min"), key=("key", "min"))
    drawn["hash"] = [_uniform(seed, int(key)) for key in drawn["key"]]
    drawn["stratum"] = contents.stratum[drawn.index] if stratified else 0
    new = drawn["before"].isna()
    held_out = drawn["before"] == 1
    if share < 1 and not stratified:
        held_out |= new & (drawn["hash"] < share)
        if not held_out.any() and new.any():
            held_out[drawn.loc[new, "hash"].idxmin()] = True
        return held_out[cluster].to_numpy()
    sizes = drawn.groupby("stratum")["rows"].sum()
    wanted = sizes * (share if share < 1 else share / len(rows))
    quota = np.floor(wanted)
    for stratum in (
        (wanted - quota).sort_values(ascending=False, kind="stable").index[: round(wanted.sum() - quota.sum())]
    ):
        quota[stratum] += 1  # the largest remainders, so that all strata together have as many as are wanted
    for stratum, clustered in drawn.groupby("stratum"):
        left = quota[stratum] - clustered.loc[held_out[clustered.index], "rows"].sum()
        free = clustered[new[clustered.index]].sort_values("hash")
        taken = free["rows"].cumsum() - free["rows"] / 2 <= left  # the last one if most of it is wanted
        held_out[free.index[taken]] = True
    return held_out[cluster].to_numpy()


def _uniform(seed: int, key: int) -> float:
    """A number from 0 to 1 that is always the same for a key and a seed."""
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
