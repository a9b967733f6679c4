"""What will be trained on, shown before a GPU second is spent: tokens, over-long rows, steps, an example; does it fit.

`python -m sft_phi3v.preview RECIPE` needs no GPU and loads no weights. Where something would have to be fetched first,
it says what; with `--sizes TABLE` it counts from the sizes of pictures that are not here.
"""

from sft_phi3v.usage import check_recipe

if __name__ == "__main__":
    check_recipe()  # before torch is imported

import gc
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from tqdm import tqdm

from sft_phi3v.batches import Plan, plan_batches
from sft_phi3v.checkpoints import check_output_dir, room
from sft_phi3v.collator import IGNORED, Collator, Lengths
from sft_phi3v.data import ROW, Pictures, Sized, check_rows, load_sizes, load_splits, sized_examples, to_examples
from sft_phi3v.estimate import GB, Setting, Shape, weights_of
from sft_phi3v.features import cache_bytes, distinct, verdict
from sft_phi3v.fit import find_gpu, fit_report, flops_per_row
from sft_phi3v.machine import check_kernels, check_machine
from sft_phi3v.model import load_config, load_processor
from sft_phi3v.recipe import Recipe, load_recipe
from sft_phi3v.streaming import Stream, load_stream

GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"
BINS = 30


@dataclass(frozen=True)
class Prepared:
    """
    What a run trains on and is scored on, read and checked.

    Args:
        collator ([`Collator`]): Makes the batches.
        train (`Dataset` or [`Stream`]): The rows to train on.
        held_out (`Dataset`): The held-out rows.
        overview (`dict`): What `data.json` holds: how many `rows`; held-out rows whose picture is also trained on
            (`leakage`; `None` for a stream, which is not read through); `histograms` of tokens and picture sizes; the
            `supervised_share` of all tokens; and one `example` as the model reads it ([`runs_of`]).
        lengths (`list[Lengths]`): Of the rows to train on; of a stream, of its first rows.
        pictures (`list[Pictures]`): Of the rows to train on; of a stream, of its first rows.
        held_out_pictures (`list[Pictures]`): Of the held-out rows.
        plan ([`~sft_phi3v.batches.Plan`], *optional*): Of the batches, with `max_tokens_per_batch`.
    """

    collator: Collator
    train: Dataset | Stream
    held_out: Dataset
    overview: dict[str, Any]
    lengths: list[Lengths]
    pictures: list[Pictures]
    held_out_pictures: list[Pictures]
    plan: Plan | None = None


def fitting(
    rows: Dataset, recipe: Recipe, collator: Collator, pictures: Sequence[Pictures]
) -> tuple[Dataset, list[Lengths]]:
    """
    Counts the tokens of all rows, without opening a picture, and keeps those that fit.

    Args:
        rows (`Dataset`): Rows as they are in the source.
        recipe ([`Recipe`]): Its `overlong` refuses longer rows (`"error"`) or leaves them out (`"drop"`).
        collator ([`Collator`]): Knows `max_length`.
        pictures (sequence of [`~sft_phi3v.data.Pictures`]): Of each row, from [`~sft_phi3v.data.check_rows`].

    Returns:
        `tuple[Dataset, list[Lengths]]`: The rows that fit, and their lengths.

    Raises:
        ValueError: If a row is too long and `overlong` is `"error"`, or if no row fits.
    """
    quiet = bool(recipe.training.disable_tqdm) or not PartialState().is_main_process
    lengths: list[Lengths] = []
    # The collector of garbage would look through all that torch and its kin have loaded, once every few hundred rows.
    gc.freeze()
    try:
        with tqdm(total=len(rows), desc="count tokens", unit=" rows", disable=quiet) as bar:
            for examples in sized_examples(rows, recipe, pictures):
                lengths += collator.all_lengths(examples)
                bar.update(len(examples))
    finally:
        gc.unfreeze()
    kept = [index for index, found in enumerate(lengths) if collator.fits(found)]
    if len(kept) == len(lengths):
        return rows, lengths
    overlong = [
        (row, found.tokens) for row, found in zip(rows[ROW][:], lengths, strict=True) if not collator.fits(found)
    ]
    overlong.sort(key=lambda one: -one[1])
    named = ", ".join(f"{row} has {tokens}" for row, tokens in overlong[:10])
    more = f" and {len(overlong) - 10} more" if len(overlong) > 10 else ""
    if recipe.task.overlong == "error" or not kept:
        raise ValueError(
            f"max_length: {len(overlong)} of {len(lengths)} rows are longer than {collator.max_length} tokens: row "
            f"{named}{more}. A row is never cut. Raise max_length, lower num_crops, or leave these rows out with "
            "`overlong: drop`."
        )
    print_once(
        f"overlong: left out {len(overlong)} of {len(lengths)} rows with more than {collator.max_length} tokens: row "
        f"{named}{more}."
    )
    return rows.select(kept), [lengths[index] for index in kept]


def data_table(train: Sequence[Lengths], train_rows: int, held_out_rows: int) -> str:
    """Rows, and the smallest, middle and largest numbers of tokens per training row."""
    lines = [f"rows: {train_rows:,} to train on, {held_out_rows:,} held out"]
    for label, key in (("tokens", "tokens"), ("of pictures", "image_tokens"), ("supervised", "supervised")):
        counts = sorted(getattr(found, key) for found in train)
        most = (
            f"   (99 % of the rows: at most {counts[math.ceil(0.99 * len(counts)) - 1]:,})" if key == "tokens" else ""
        )
        middle = statistics.median_low(counts)
        lines.append(f"{label + ' per row:':<20} {counts[0]:>6,} – {middle:,} – {counts[-1]:,}{most}")
    share = sum(found.supervised for found in train) / sum(found.tokens for found in train)
    lines.append(f"{'supervised share:':<20} {share:>6.1%}")
    return "\n".join(lines)


def token_histogram(tokens: Sequence[int]) -> str:
    """
    How many rows have how many tokens, for the terminal.

    Args:
        tokens (sequence of `int`): Of each row.

    Returns:
        `str`: At most a dozen lines, `1,500 – 1,999 ████ 380  12.7%`; none where all rows are within a tenth.
    """
    least, most = min(tokens), max(tokens)
    if most - least <= most / 10:
        return ""
    wide = [mantissa * 10**power for power in range(7) for mantissa in (1, 2, 5)]
    width = next(one for one in wide if most // one - least // one < 12)
    first = least // width
    counts = np.bincount(np.asarray(tokens) // width - first)
    return "\n".join(
        f"{(first + bin) * width:>6,} – {(first + bin + 1) * width - 1:>6,}  "
        f"{'█' * math.ceil(32 * count / counts.max()):<32} {count:>9,} {count / len(tokens):>6.1%}"
        for bin, count in enumerate(counts.tolist())
    )


def planned(train: Dataset, lengths: Sequence[Lengths], recipe: Recipe) -> Plan | None:
    """
    The batches that these rows make for as many processes as there are, with `max_tokens_per_batch`.

    Raises:
        ValueError: If a row alone is longer.
    """
    if recipe.task.max_tokens_per_batch is None:
        return None
    return plan_batches(
        [found.tokens for found in lengths],
        recipe.task.max_tokens_per_batch,
        padded=not recipe.padding_free,
        processes=PartialState().num_processes,
        multiple=None if recipe.padding_free else recipe.training.pad_to_multiple_of,
        names=train[ROW][:],
    )


def steps(rows: int, recipe: Recipe, plan: Plan | None = None) -> tuple[int, int]:
    """
    How many optimiser steps a run takes, as [`~transformers.Trainer`] counts them.

    Args:
        rows (`int`): Rows to train on.
        recipe ([`Recipe`]): Its batch size, accumulation, epochs and `max_steps` are read.
        plan ([`~sft_phi3v.batches.Plan`], *optional*): Of the batches, from [`planned`].

    Returns:
        `tuple[int, int]`: Steps of one epoch, and of the whole run.

    Raises:
        ValueError: If `dataloader_drop_last` leaves no batch.
    """
    training = recipe.training
    per_batch = training.per_device_train_batch_size * PartialState().num_processes
    batches = rows // per_batch if training.dataloader_drop_last else math.ceil(rows / per_batch)
    if plan is not None:
        batches = plan.steps
    if not batches:
        raise ValueError(
            f"`dataloader_drop_last: true` leaves nothing to train on: {rows} rows make no batch of {per_batch}. "
            "Remove it."
        )
    epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return epoch, training.max_steps if training.max_steps >= 0 else math.ceil(training.num_train_epochs * epoch)


def steps_line(rows: int, recipe: Recipe, plan: Plan | None = None) -> str:
    """The steps of a run, and what they are made of; arguments as [`steps`]."""
    training, processes = recipe.training, PartialState().num_processes
    batch, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    epoch, total = steps(rows, recipe, plan)
    epochs = f"{training.num_train_epochs:g} epoch{'s' if training.num_train_epochs != 1 else ''}"
    each, size, planning = f"{batch * accumulated * processes:,} rows per step", f"{batch} × ", ""
    if plan is not None:
        each, size = f"{rows / epoch:,.1f} rows per step on average", ""
        planning = f"{'batches:':<20} {plan}\n"
    return (
        f"{planning}{'steps:':<20} {epoch:>6,} per epoch of {rows:,} rows, {each} "
        f"({size}{accumulated} accumulated × {processes} process{'es' if processes > 1 else ''}); "
        f"{total:,} in all ({'max_steps' if training.max_steps >= 0 else epochs})"
    )


def runs_of(example: dict[str, Any], collator: Collator) -> list[dict[str, Any]]:
    """
    One example as the model reads it, cut where it begins or ends to be supervised, and around pictures.

    Args:
        example (`dict`): An example.
        collator ([`Collator`]): Makes its labels.

    Returns:
        `list[dict]`: `{"text", "tokens", "supervised", "picture"}` each; the text of a picture is one image token.
    """
    tokenizer, image_token = collator.processor.tokenizer, collator.processor.image_token_id
    if any(isinstance(image, Sized) for image in example["images"]):
        ids, learned = collator.supervised(example)
    else:  # the very batch that is trained on
        batch = collator([example])
        ids, learned = batch["input_ids"][0].tolist(), (batch["labels"][0] != IGNORED).tolist()
    runs: list[tuple[bool, bool, list[int]]] = []
    for token, supervised in zip(ids, learned, strict=True):
        kind = (supervised, token == image_token)
        if not runs or runs[-1][:2] != kind:
            runs.append((*kind, []))
        runs[-1][2].append(token)
    return [
        {
            "text": tokenizer.decode(tokens[:1] if picture else tokens),
            "tokens": len(tokens),
            "supervised": supervised,
            "picture": picture,
        }
        for supervised, picture, tokens in runs
    ]


def masked_example(runs: Sequence[dict[str, Any]], *, colour: bool) -> str:
    """
    One example for the terminal, with what is supervised marked.

    Args:
        runs (sequence of `dict`): From [`runs_of`].
        colour (`bool`): Green for supervised and dim for masked tokens; else supervised ones stand in ⟦ ⟧.

    Returns:
        `str`: The tokens; a run of image tokens is shown once, with its count.
    """
    pieces = []
    for run in runs:
        text = run["text"].replace("\n", "⏎") + (f"×{run['tokens']}" if run["picture"] else "")
        if colour:
            pieces.append(f"{GREEN if run['supervised'] else DIM}{text}{PLAIN}")
        else:
            pieces.append(f"⟦{text}⟧" if run["supervised"] else text)
    return "".join(pieces)


def _overview(
    train: Dataset, lengths: Sequence[Lengths], runs: list[dict[str, Any]], leaked: list[int] | None
) -> dict[str, Any]:
    values = {key: [getattr(found, key) for found in lengths] for key in ("tokens", "image_tokens", "supervised")}
    sizes = [size for found in lengths for size in found.sizes]
    values |= {"width": [width for width, _ in sizes], "height": [height for _, height in sizes]}
    histograms = {}
    for name, found in values.items():
        if found:
            width = -(-(max(found) - min(found) + 1) // BINS)  # every bin holds as many whole numbers
            counts, edges = np.histogram(found, bins=np.arange(min(found), max(found) + width + 1, width) - 0.5)
            histograms[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return {
        "leakage": None if leaked is None else {"pictures": len(leaked), "rows": leaked},
        "histograms": histograms,
        "supervised_share": sum(values["supervised"]) / sum(values["tokens"]),
        "example": {"row": train[ROW][0], "runs": runs},
    }


def print_once(text: str) -> None:
    """Prints on the main process only."""
    if PartialState().is_main_process:
        print(text, flush=True)


def prepare(recipe: Recipe, *, sizes: bool = False) -> Prepared:
    """
    Reads and checks everything that costs no GPU time, and shows it. Of a stream it reads the first rows; the others
    are checked when they come.

    Args:
        recipe ([`Recipe`]): The recipe.
        sizes (`bool`, *optional*, defaults to `False`):
            Whether its `sizes` are read in place of its data set, where it names a file of them.

    Returns:
        [`Prepared`]: The collator; the rows to train on; the held-out rows; what is to be known of them.

    Raises:
        ValueError: If any row cannot be used, with the row, the reason and the remedy.
    """
    stream = None
    if sizes and recipe.preview.sizes is not None:
        recipe = _of_sizes(recipe)
        train, held_out = load_sizes(recipe)
    elif recipe.script.dataset_streaming:
        stream, held_out = load_stream(recipe)
        train = stream.sample()
        print_once(f"streaming: looked at here are the first {len(train):,} of {len(stream):,} rows to train on.")
    else:
        train, held_out = load_splits(recipe)
    collator = _collator(recipe)
    pictures, others = check_rows(train, recipe), check_rows(held_out, recipe)
    of_train, of_held_out = (
        dict(zip(rows[ROW][:], found, strict=True)) for rows, found in ((train, pictures), (held_out, others))
    )
    train, lengths = fitting(train, recipe, collator, pictures)
    held_out, _ = fitting(held_out, recipe, collator, others)
    pictures, others = [of_train[row] for row in train[ROW][:]], [of_held_out[row] for row in held_out[ROW][:]]
    known = frozenset[bytes]().union(*(one.digests for one in pictures))
    seen = [row for row, one in zip(held_out[ROW][:], others, strict=True) if known.intersection(one.digests)]
    total = len(train) if stream is None else len(stream)
    plan = planned(train, lengths, recipe)
    print_once(f"\n{data_table(lengths, total, len(held_out))}\n{steps_line(total, recipe, plan)}\n")
    if histogram := token_histogram([found.tokens for found in lengths]):
        print_once(f"tokens per row, and how many rows have so many:\n{histogram}\n")
    if stream is None and seen:
        print_once(
            f"leakage: {len(seen)} held-out rows show a picture that is trained on as well, byte for byte (first: row "
            f"{seen[0]}). Their scores say little; `python -m sft_phi3v.prepare` keeps equal pictures together.\n"
        )
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    legend = "green is supervised" if colour else "⟦supervised⟧"
    runs = runs_of(to_examples(train, recipe)[0], collator)
    overview = _overview(train, lengths, runs, seen if stream is None else None)
    overview = {"rows": {"train": total, "held_out": len(held_out)}, **overview}
    print_once(f"row {overview['example']['row']} as the model reads it ({legend}):")
    print_once(f"{masked_example(runs, colour=colour)}\n")
    if stream is None:
        return Prepared(collator, train, held_out, overview, lengths, pictures, others, plan)
    if recipe.task.overlong == "drop" and collator.max_length is not None:
        stream.fits = partial(_fits, collator)
    return Prepared(collator, stream, held_out, overview, lengths, pictures, others)


def prepare_held_out(recipe: Recipe) -> tuple[Collator, Dataset]:
    """As [`prepare`], for who only scores: the rows to train on are not looked at, and nothing is shown."""
    _, held_out = (load_stream if recipe.script.dataset_streaming else load_splits)(recipe)
    collator = _collator(recipe)
    held_out, _ = fitting(held_out, recipe, collator, check_rows(held_out, recipe))
    return collator, held_out


def _of_sizes(recipe: Recipe) -> Recipe:
    """The recipe with its `sizes` for data set."""
    script = replace(recipe.script, dataset_name=recipe.preview.sizes, dataset_config=None)
    return replace(recipe, script=script, mixture=type(recipe.mixture)())


def _collator(recipe: Recipe) -> Collator:
    training = recipe.training
    return Collator(load_processor(recipe), training.max_length, training.pad_to_multiple_of, recipe.padding_free)


def _fits(collator: Collator, example: dict[str, Any]) -> bool:
    return collator.fits(collator.lengths(example))


def main(argv: list[str] | None = None) -> None:
    """`python -m sft_phi3v.preview RECIPE [--key value …]`"""
    try:
        recipe = load_recipe(sys.argv[1:] if argv is None else argv)
        if recipe.preview.gpu is not None:
            find_gpu(recipe.preview.gpu)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{recipe.path}: the recipe is right. What it needs:")
    missing = []
    rows = "dataset_name" if recipe.preview.sizes is None else "sizes"
    for need, check in (
        ("machine", lambda: _check_machine(recipe)),
        ("output_dir", lambda: check_output_dir(recipe)),
        ("model_name_or_path", lambda: load_processor(recipe) and None),
        (rows, lambda: _load(recipe)),
    ):
        try:
            check()
            print(f"  ✓ {need}: {_name(recipe, need)}")
        except ValueError as error:
            missing.append(need)
            print(f"  ✗ {error}")
    if not {"model_name_or_path", rows} & set(missing):  # a machine without a GPU can look at the data
        try:
            prepared = prepare(recipe, sizes=True)
            print(fit(recipe, prepared))
            if recipe.task.feature_cache is not None:
                print(f"\n{cache_report(recipe, prepared)}")
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
    if missing:
        raise SystemExit(1)


def largest_batch(recipe: Recipe, prepared: Prepared) -> Shape:
    """The largest batch that the rows can make, or that is planned."""
    num_crops = prepared.collator.processor.image_processor.num_crops
    return Shape.of(prepared.lengths, recipe, num_crops, prepared.plan)


def fit(recipe: Recipe, prepared: Prepared) -> str:
    """What a step takes on a GPU and an epoch costs ([`~sft_phi3v.fit.fit_report`]) with these rows."""
    try:
        return fit_report(
            recipe,
            load_config(recipe),
            largest_batch(recipe, prepared),
            Shape.mean(prepared.lengths, recipe, prepared.collator.processor.image_processor.num_crops),
            prepared.overview["rows"]["train"],
            gpu=recipe.preview.gpu,
            price=recipe.preview.gpu_price,
            processes=recipe.preview.gpus or PartialState().num_processes,
            batches=None if prepared.plan is None else prepared.plan.steps * prepared.plan.processes,
        )
    except ValueError as error:
        return f"memory: not estimated: {error}"


def _check_machine(recipe: Recipe) -> None:
    check_machine(recipe)
    check_kernels(recipe)


def cache_report(recipe: Recipe, prepared: Prepared) -> str:
    """What `feature_cache` takes on disk, and whether it pays, as far as sizes and operations tell."""
    config, num_crops = load_config(recipe), prepared.collator.processor.image_processor.num_crops
    sizes = distinct([*prepared.pictures, *prepared.held_out_pictures])
    needed, folder = cache_bytes(recipe, config, sizes, num_crops), Path(str(recipe.task.feature_cache)).expanduser()
    left = room(folder)
    lines = [
        f"feature_cache: {len(sizes):,} different pictures, at most {needed / GB:,.2f} GB in {folder} "
        f"({'✓' if needed <= left else '✗ not enough:'} {left / GB:,.1f} GB left there)"
    ]
    setting, weights, shape = Setting.of(recipe), weights_of(config), Shape.mean(prepared.lengths, recipe, num_crops)
    computed = flops_per_row(replace(setting, features=False), config, weights, shape)
    saved = 1 - flops_per_row(setting, config, weights, shape) / computed
    epoch, total = steps(prepared.overview["rows"]["train"], recipe, prepared.plan)
    # Features are made once, at what an epoch without them costs, and a little more for writing.
    lines.append(f"  a step from features takes {saved:.0%} fewer operations: {verdict(2, total / epoch)}")
    return "\n".join(lines)


def _load(recipe: Recipe) -> None:
    """Raises a `ValueError` if the rows cannot be loaded."""
    if recipe.preview.sizes is not None:
        load_sizes(_of_sizes(recipe))
    elif recipe.script.dataset_streaming:
        load_stream(recipe)
    else:
        load_splits(recipe)


def _name(recipe: Recipe, need: str) -> str:
    names = {
        "machine": "CPU" if recipe.training.use_cpu else str(PartialState().device),
        "output_dir": str(Path(str(recipe.training.output_dir))),
        "model_name_or_path": str(recipe.model.model_name_or_path),
        "dataset_name": recipe.data,
        "sizes": str(recipe.preview.sizes),
    }
    return names[need]


if __name__ == "__main__":
    main()
