"""The held-out rows of a run, worst first: what was asked, what is right, what each model wrote, and the pictures.

Which rows are shown, and in what order, follows from the completions alone. Their pictures are read from the data set,
if it is still there and still holds these rows with these answers.
"""

import base64
import io
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft_phi3v.data import ROW, load_splits, to_examples
from sft_phi3v.evaluation import ORDER, answers, short_row, thumbnail
from sft_phi3v.model import first_line
from sft_phi3v.recipe import Recipe
from sft_phi3v.scoring import MAIN, Completion, Scorer
from sft_phi3v.streaming import load_stream

SUBJECTS = ("after", "model")  # what is looked at, of the names that completions stand under
MOST_ROWS = 300  # shown: beyond, half of them the worst and half drawn by chance from the rest
MOST_PICTURES, MOST_CHARACTERS = 8, 2000  # of one row, and of one text
SIZES = ((256, 80), (192, 75), (128, 70), (96, 60))  # longest side and JPEG quality, tried until the picture fits
PICTURE_BYTES = 5_000_000  # of all pictures together; as text they are a third more


class Gallery:
    """
    The scored rows, worst first, with what each model wrote and the pictures where they can still be read.

    Args:
        recipe ([`Recipe`]): The recipe of the run.
        lines (sequence of `dict`): The lines of `completions.jsonl`.
    """

    def __init__(self, recipe: Recipe, lines: Sequence[dict[str, Any]]):
        self.recipe, self.lines = recipe, lines
        there = [name for name in (lines[0] if lines else {}) if all(name in line for line in lines)]
        there = [name for name in there if name not in ("row", "reference")]
        self.names = sorted(there, key=lambda name: (name not in SUBJECTS, (*ORDER, name).index(name)))
        self.scorer = Scorer(recipe.task.answer, [line["reference"] for line in lines])
        self.fields, self.kinds = self.scorer.fields, self.scorer.kinds
        completions = {
            name: [
                Completion(line["row"], line["reference"], line[name]["text"], line[name]["stopped"]) for line in lines
            ]
            for name in self.names
        }
        self.right = {name: self.scorer.main_values(found) for name, found in completions.items()}
        order: list[int] = []
        if self.names:
            off = np.sum(list(self.scorer.errors(completions[self.names[0]]).values()), axis=0)
            order = sorted(range(len(lines)), key=lambda index: -off[index])
        self.all_shown = len(order) <= MOST_ROWS
        if not self.all_shown:
            rest = random.Random(recipe.training.seed).sample(range(MOST_ROWS // 2, len(order)), MOST_ROWS // 2)
            order = [order[place] for place in [*range(MOST_ROWS // 2), *sorted(rest)]]
        self.order = order
        self.without_pictures = 0  # shown rows that the data set no longer has
        self.prompt: str | None = None  # the question, if it is the same in all rows

    def agree(self, name: str, scores: Mapping[str, Any]) -> bool:
        """Whether the completions give the scores that stand in `metrics.json`."""
        return scores["rows"] == len(self.lines) and all(
            math.isclose(scores["fields"].get(field, {}).get(MAIN[self.kinds[field]], -1), right.mean(), abs_tol=1e-9)
            for field, right in self.right[name].items()
        )

    @property
    def categories(self) -> dict[int, dict[str, int]]:
        """Of each category field, by its place: how often each value is shown."""
        found: dict[int, dict[str, int]] = {}
        for place, field in enumerate(self.fields):
            if self.kinds[field] == "category":
                values = [self._parsed(self.lines[index]["reference"]).get(field, "") for index in self.order]
                found[place] = {value: values.count(value) for value in sorted(set(values))}
        return found

    def cards(self) -> list[dict[str, Any]]:
        """What the page shows of each row."""
        examples, places = self._examples()
        cards = []
        for index in self.order:
            line = self.lines[index]
            place = places.get((line["row"], line["reference"]))
            example = examples[place] if place is not None else None  # one row's pictures in memory at a time
            self.without_pictures += example is None
            cards.append(
                {
                    "row": short_row(line["row"]),
                    "reference": line["reference"],
                    "wanted": self._parsed(line["reference"]),
                    "completions": [self._completion(index, name) for name in self.names],
                    "turns": _turns(example["messages"][:-1]) if example else [],
                    "pictures": self._pictures(example["images"]) if example else None,
                    "more": max(0, len(example["images"]) - MOST_PICTURES) if example else 0,
                }
            )
        asked = [card["turns"] for card in cards if card["turns"]]
        if asked and all(turns == asked[0] for turns in asked) and len(asked[0]) == 1:
            self.prompt = asked[0][0][1]
        return cards

    def _parsed(self, text: str) -> dict[str, str]:
        return self.scorer.parse(text) or {}

    def _completion(self, index: int, name: str) -> dict[str, Any]:
        found = self.lines[index][name]
        right = [bool(self.right[name][field][index]) for field in self.fields]
        return {"name": name, **found, "fields": self.scorer.parse(found["text"]), "right": right}

    def _examples(self) -> tuple[Sequence[dict[str, Any]], dict[tuple[Any, str], int]]:
        """The held-out rows as far as they can still be read, and where the one of a row and answer stands."""
        if not self.order:
            return [], {}
        try:
            _, rows = (load_stream if self.recipe.script.dataset_streaming else load_splits)(self.recipe)
            keys = zip(rows[ROW], answers(rows, self.recipe), strict=True)
            return to_examples(rows, self.recipe), {key: place for place, key in enumerate(keys)}
        except (ValueError, OSError) as error:
            print(f"report: without pictures: {first_line(error)}", flush=True)
            return [], {}

    def _pictures(self, images: Sequence[Any]) -> list[str]:
        shown = images[:MOST_PICTURES]
        return [_thumbnail(image, PICTURE_BYTES // len(self.order) // len(shown)) for image in shown]


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(turn["role"], "".join(part.get("text") or "" for part in turn["content"]).strip()) for turn in messages]


def _thumbnail(image: Any, most: int) -> str:
    """A small copy as a data URI, without what the file says besides; empty if it cannot be decoded."""
    for side, quality in SIZES:
        try:
            picture = thumbnail(image, side)
        except (OSError, ValueError):
            return ""
        picture.save(file := io.BytesIO(), "JPEG", quality=quality, optimize=True)
        if file.tell() <= most:
            break
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
