"""What will be trained on, shown before a GPU second is spent: token counts, one example in colour, memory and cost.

`python -m sft_phi3v.preview RECIPE` needs no GPU and loads no weights. Where something would have to be fetched first,
it says what.
"""

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from tqdm import tqdm

from sft_phi3v.checkpoints import check_output_dir
from sft_phi3v.collator import IGNORED, Collator, Lengths
from sft_phi3v.data import ROW, check_rows, load_splits, to_examples
from sft_phi3v.estimate import Shape, fit_report
from sft_phi3v.machine import check_machine
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
    """

    collator: Collator
    train: Dataset | Stream
    held_out: Dataset
    overview: dict[str, Any]
    lengths: list[Lengths]


def fitting(rows: Dataset, recipe: Recipe, collator: Collator) -> tuple[Dataset, list[Lengths]]:
    """
    Counts the tokens of all rows, without decoding a picture, and keeps those that fit.

    Args:
        rows (`Dataset`): Rows as they are in the source.
        recipe ([`Recipe`]): Its `overlong` refuses longer rows (`"error"`) or leaves them out (`"drop"`).
        collator ([`Collator`]): Knows `max_length`.

    Returns:
        `tuple[Dataset, list[Lengths]]`: The rows that fit, and their lengths.

    Raises:
        ValueError: If a row is too long and `overlong` is `"error"`, or if no row fits.
    """
    quiet = bool(recipe.training.disable_tqdm) or not PartialState().is_main_process
    examples = to_examples(rows, recipe)
    lengths = [collator.lengths(example) for example in tqdm(examples, desc="count tokens", disable=quiet)]
    kept = [index for index, found in enumerate(lengths) if collator.fits(found)]
    dropped = len(lengths) - len(kept)
    if dropped and (recipe.task.overlong == "error" or not kept):
        first = next(index for index, found in enumerate(lengths) if not collator.fits(found))
        raise ValueError(
            f"max_length: {dropped} of {len(lengths)} rows are longer than {collator.max_length} tokens; row "
            f"{examples[first]['row']} has {lengths[first].tokens}, the longest {max(x.tokens for x in lengths)}. A "
            "row is never cut. Raise max_length, lower num_crops, or leave these rows out with `overlong: drop`."
        )
    if dropped:
        print_once(f"overlong: left out {dropped} of {len(lengths)} rows with more than {collator.max_length} tokens.")
    return rows.select(kept), [lengths[index] for index in kept]


def data_table(train: Sequence[Lengths], train_rows: int, held_out_rows: int) -> str:
    """Rows, and the smallest, middle and largest numbers of tokens per training row."""
    lines = [f"rows: {train_rows:,} to train on, {held_out_rows:,} held out"]
    for label, key in (("tokens", "tokens"), ("of pictures", "image_tokens"), ("supervised", "supervised")):
        counts = [getattr(found, key) for found in train]
        middle = statistics.median_low(counts)
        lines.append(f"{label + ' per row:':<20} {min(counts):>6,} – {middle:,} – {max(counts):,}")
    share = sum(found.supervised for found in train) / sum(found.tokens for found in train)
    lines.append(f"{'supervised share:':<20} {share:>6.1%}")
    return "\n".join(lines)


def runs_of(example: dict[str, Any], collator: Collator) -> list[dict[str, Any]]:
    """
    One example as the model reads it, cut where it begins or ends to be supervised, and around pictures.

    Args:
        example (`dict`): An example.
        collator ([`Collator`]): Makes its labels.

    Returns:
        `list[dict]`: `{"text", "tokens", "supervised", "picture"}` each; the text of a picture is one image token.
    """
    batch = collator([example])
    tokenizer, image_token = collator.processor.tokenizer, collator.processor.image_token_id
    runs: list[tuple[bool, bool, list[int]]] = []
    for token, label in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True):
        kind = (label != IGNORED, token == image_token)
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


def prepare(recipe: Recipe) -> Prepared:
    """
    Reads and checks everything that costs no GPU time, and shows it. Of a stream it reads the first rows; the others
    are checked when they come.

    Args:
        recipe ([`Recipe`]): The recipe.

    Returns:
        [`Prepared`]: The collator; the rows to train on; the held-out rows; what is to be known of them.

    Raises:
        ValueError: If any row cannot be used, with the row, the reason and the remedy.
    """
    stream = None
    if recipe.script.dataset_streaming:
        stream, held_out = load_stream(recipe)
        train = stream.sample()
        print_once(f"streaming: looked at here are the first {len(train):,} of {len(stream):,} rows to train on.")
    else:
        train, held_out = load_splits(recipe)
    collator = _collator(recipe)
    digests = dict(zip(train[ROW], check_rows(train, recipe), strict=True))
    others = dict(zip(held_out[ROW], check_rows(held_out, recipe), strict=True))
    train, lengths = fitting(train, recipe, collator)
    held_out, _ = fitting(held_out, recipe, collator)
    known = frozenset[bytes]().union(*(digests[row] for row in train[ROW]))
    seen = [row for row in held_out[ROW] if others[row] & known]
    total = len(train) if stream is None else len(stream)
    print_once(f"\n{data_table(lengths, total, len(held_out))}\n")
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
        return Prepared(collator, train, held_out, overview, lengths)
    if recipe.task.overlong == "drop" and collator.max_length is not None:
        stream.fits = partial(_fits, collator)
    return Prepared(collator, stream, held_out, overview, lengths)


def prepare_held_out(recipe: Recipe) -> tuple[Collator, Dataset]:
    """As [`prepare`], for who only scores: the rows to train on are not looked at, and nothing is shown."""
    _, held_out = (load_stream if recipe.script.dataset_streaming else load_splits)(recipe)
    collator = _collator(recipe)
    check_rows(held_out, recipe)
    held_out, _ = fitting(held_out, recipe, collator)
    return collator, held_out


def _collator(recipe: Recipe) -> Collator:
    return Collator(load_processor(recipe), recipe.training.max_length, recipe.training.pad_to_multiple_of)


def _fits(collator: Collator, example: dict[str, Any]) -> bool:
    return collator.fits(collator.lengths(example))


def main(argv: list[str] | None = None) -> None:
    """`python -m sft_phi3v.preview RECIPE [--key value …]`"""
    try:
        recipe = load_recipe(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{recipe.path}: the recipe is right. What it needs:")
    missing = []
    for need, check in (
        ("machine", lambda: check_machine(recipe)),
        ("output_dir", lambda: check_output_dir(recipe)),
        ("model_name_or_path", lambda: load_processor(recipe) and None),
        ("dataset_name", lambda: (load_stream if recipe.script.dataset_streaming else load_splits)(recipe) and None),
    ):
        try:
            check()
            print(f"  ✓ {need}: {_name(recipe, need)}")
        except ValueError as error:
            missing.append(need)
            print(f"  ✗ {error}")
    if not {"model_name_or_path", "dataset_name"} & set(missing):  # a machine without a GPU can look at the data
        try:
            prepared = prepare(recipe)
            print(fit(recipe, prepared))
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
    if missing:
        raise SystemExit(1)


def fit(recipe: Recipe, prepared: Prepared) -> str:
    """What a step takes on a GPU and an epoch costs ([`fit_report`]), for the largest batch of these rows."""
    shape = Shape.of(prepared.lengths, recipe, prepared.collator.processor.image_processor.num_crops)
    return fit_report(
        recipe,
        load_config(recipe),
        shape,
        prepared.overview["rows"]["train"],
        gpu=recipe.preview.gpu,
        price=recipe.preview.gpu_price,
        processes=PartialState().num_processes,
    )


def _name(recipe: Recipe, need: str) -> str:
    names = {
        "machine": "CPU" if recipe.training.use_cpu else str(PartialState().device),
        "output_dir": str(Path(str(recipe.training.output_dir))),
        "model_name_or_path": str(recipe.model.model_name_or_path),
        "dataset_name": recipe.data,
    }
    return names[need]


if __name__ == "__main__":
    main()
