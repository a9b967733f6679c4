"""Clusters stay together, the draw follows from contents, and later rows move nothing."""

import numpy as np
import pandas as pd
import pytest

from sft_phi3v.splitting import Contents, clusters, held_out_rows, near_pairs, same_rows

NONE = pd.Series(dtype=bool)
NO_PAIRS = (np.empty(0, np.int64), np.empty(0, np.int64))


def contents(pixels, *, perceptual=None, colours=None, answer=None, group=None, stratum=None):
    count = len(pixels)
    pixels = np.array(pixels, np.uint64)
    zeros = np.zeros(count, np.uint64)
    group = zeros if group is None else np.array(group, np.uint64)
    return Contents(
        question=pixels,
        answer=zeros if answer is None else np.array(answer, np.uint64),
        group=group,
        stratum=zeros if stratum is None else np.array(stratum, np.uint64),
        key=np.where(group > 0, group, pixels),
        picture_row=np.arange(count),
        pixels=pixels,
        perceptual=pixels * np.uint64(0x9E3779B97F4A7C15) if perceptual is None else np.array(perceptual, np.uint64),
        colours=np.zeros((count, 48), np.uint8) if colours is None else colours,
    )


def test_equal_rows_are_found_and_contradictions_told_apart():
    first, contradicting = same_rows(contents([7, 8, 7, 8, 9], answer=[1, 2, 1, 3, 4]))
    assert first.tolist() == [0, 1, 0, 1, 4]
    assert contradicting.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("distance", [0, 1, 4, 10])
def test_near_pairs_are_those_that_comparing_all_finds(distance):
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 2**63, 60).astype(np.uint64)
    flips = np.array(
        [sum(1 << int(bit) for bit in rng.choice(64, size=rng.integers(0, 13), replace=False)) for _ in range(240)],
        np.uint64,
    )
    hashes = np.concatenate([base, np.repeat(base, 4) ^ flips])
    colours = rng.integers(100, 124, (300, 1)).astype(np.uint8).repeat(48, axis=1)
    given = contents(range(1, 301), perceptual=hashes, colours=colours)
    ones, others = near_pairs(given, distance)
    found = {frozenset(pair) for pair in zip(ones.tolist(), others.tolist(), strict=True)}
    close = np.bitwise_count(hashes[:, None] ^ hashes) <= distance
    close &= np.abs(colours[:, None, 0].astype(int) - colours[:, 0].astype(int)) <= 16
    expected = {frozenset((a, b)) for a, b in zip(*np.nonzero(close), strict=True) if a != b}
    linked = clusters(given, (ones, others))
    assert found <= expected and len(expected) > 5
    # What no bit tells apart is linked in a chain: the clusters are those of all pairs.
    everything = np.array([sorted(pair) for pair in expected]).T
    assert linked.tolist() == clusters(given, (everything[0], everything[1])).tolist()


def test_rows_are_linked_by_picture_and_by_group():
    given = contents([1, 2, 1, 3, 4, 5], group=[0, 6, 6, 0, 7, 7])
    assert clusters(given, NO_PAIRS).tolist() == [0, 0, 0, 3, 4, 4]


def draw(given, **changes):
    keys = {"share": 0.1, "seed": 0, "stratified": False, "before": NONE} | changes
    return held_out_rows(given, clusters(given, NO_PAIRS), **keys)


def test_a_share_follows_from_the_contents_and_not_from_the_order():
    given = contents(range(1, 2001))
    held_out = draw(given)
    assert 0.08 < held_out.mean() < 0.12
    assert (draw(contents(range(2000, 0, -1)))[::-1] == held_out).all()
    assert (draw(contents(range(1, 3001)))[:2000] == held_out).all()  # rows that are added move no other
    assert (draw(given, seed=1) != held_out).any()


def test_a_number_and_strata_are_kept_to():
    assert draw(contents(range(1, 1001)), share=50).sum() == 50
    stratum = np.repeat([1, 2, 3], [600, 300, 100])
    held_out = draw(contents(range(1, 1001), stratum=stratum), stratified=True)
    assert [held_out[stratum == value].sum() for value in (1, 2, 3)] == [60, 30, 10]


def test_what_was_trained_on_is_never_held_out_later():
    before = draw(contents(range(1, 101)), share=20)
    memory = pd.Series(before, index=np.arange(1, 101, dtype=np.uint64))
    held_out = draw(contents(range(1, 201)), share=30, before=memory)
    assert held_out[:100][before].all() and not held_out[:100][~before].any() and held_out.sum() == 30
    # A new row joins a held-out one with a trained one: train has them all.
    trained, held = int(before.argmin()), int(before.argmax())
    group = np.where(np.isin(np.arange(101), [trained, held, 100]), 900, 0)
    joined = contents(range(1, 102), group=group)
    joined = Contents(**{**vars(joined), "key": joined.pixels})
    assert not draw(joined, share=20, before=memory)[[trained, held, 100]].any()
