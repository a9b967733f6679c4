"""Clusters stay together, the draw follows from contents, and later rows move nothing."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy.sparse.csgraph import connected_components

from sft_phi3v.splitting import Contents, clusters, held_out_rows, look_alikes, same_rows

NONE = pd.Series(dtype=bool)


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
def test_pictures_look_alike_if_comparing_all_pairs_says_so(distance):
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 2**63, 60).astype(np.uint64)
    bits = [rng.choice(64, size=rng.integers(0, 13), replace=False) for _ in range(240)]
    flips = np.array([sum(1 << int(bit) for bit in some) for some in bits], np.uint64)
    hashes = np.concatenate([base, np.repeat(base, 4) ^ flips])
    colours = rng.integers(100, 124, (300, 1)).astype(np.uint8).repeat(48, axis=1)
    given = contents(range(1, 301), perceptual=hashes, colours=colours)
    close = np.bitwise_count(hashes[:, None] ^ hashes) <= distance
    close &= np.abs(colours[:, None, 0].astype(int) - colours[:, 0].astype(int)) <= 16
    _, label = connected_components(close)
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    assert 60 < len(first) < 295
    assert look_alikes(given, distance).tolist() == first[inverse].tolist()


def test_thousands_of_pictures_that_all_look_alike_need_no_more_memory():
    rng = np.random.default_rng(0)
    hashes = np.array([1 << int(bit) for bit in rng.integers(0, 2, 5000)], np.uint64)
    colours = rng.integers(120, 130, (5000, 48)).astype(np.uint8)
    given = contents(range(1, 5001), perceptual=hashes, colours=colours)
    tracemalloc.start()
    assert not look_alikes(given, 4).any()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # its 12,497,500 pairs would take 200 MB


def test_rows_are_linked_by_picture_and_by_group():
    given = contents([1, 2, 1, 3, 4, 5], group=[0, 6, 6, 0, 7, 7])
    assert clusters(given, look_alikes(given, None)).tolist() == [0, 0, 0, 3, 4, 4]


def draw(given, **changes):
    keys = {"share": 0.1, "seed": 0, "stratified": False, "before": NONE} | changes
    return held_out_rows(given, clusters(given, look_alikes(given, None)), **keys)


def test_a_share_follows_from_the_contents_and_not_from_the_order():
    given = contents(range(1, 2001))
    held_out = draw(given)
    assert 0.08 < held_out.mean() < 0.12
    assert (draw(contents(range(2000, 0, -1)))[::-1] == held_out).all()
    assert (draw(contents(range(1, 3001)))[:2000] == held_out).all()  # rows that are added move no other
    assert (draw(given, seed=1) != held_out).any()
    doubled, mirrored = np.repeat(np.arange(1, 1001), 2), np.repeat(np.arange(1000, 0, -1), 2)
    keys = np.arange(1, 2001, dtype=np.uint64)
    one = Contents(**{**vars(contents(doubled)), "key": keys})
    other = Contents(**{**vars(contents(mirrored)), "key": keys[::-1].copy()})
    assert (draw(one) == draw(other)[::-1]).all()  # also of clusters


def test_a_number_and_strata_are_kept_to():
    assert draw(contents(range(1, 1001)), share=50).sum() == 50
    apart = contents(range(1, 41), stratum=range(1, 41))
    assert draw(apart, share=5, stratified=True).sum() == 5
    assert draw(contents(range(1, 4)), share=0.01).sum() == 1  # one at least
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
