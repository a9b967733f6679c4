"""Completions → scores, field by field, each with the interval that chance leaves open.

A recipe's answer template says which fields there are, and the held-out rows' own answers say of what kind each is:

    Product: {title}, Category: {category}, Full Price: {price}
               text              category             number

A field is a *number* if it is one in every reference; a *category* if its values repeat (at most 50 of them, in 3 rows
or more on average); else *text*. Without a template the whole answer is one free text.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein

from sft_phi3v.data import Template, number

WITHIN = 0.10
MOST_CATEGORIES, ROWS_PER_CATEGORY = 50, 3
RESAMPLES, CONFIDENCE = 1000, 0.95
# The score of each kind that is tested, and by which a model is called better.
MAIN = {"text": "exact", "free": "exact", "category": "exact", "number": "within_10pct"}

# Of rows with these indices, `(..., rows)`, one value each, `(...)`; nan if they do not say.
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Completion:
    """What the model wrote for one row, and whether it stopped by itself."""

    row: int
    reference: str
    text: str
    stopped: bool


class Scorer:
    """
    Turns completions into scores, field by field of the answer template.

    Args:
        answer (`str`, *optional*): The recipe's answer template. Without one, the whole answer is one text field.
        references (sequence of `str`): The held-out rows' answers, which say of what kind each field is.

    Attributes:
        fields (`tuple[str, ...]`): The template's fields; `("answer",)` without one.
        kinds (`dict[str, str]`): Of each field `text`, `category`, `number` or `free`.
    """

    def __init__(self, answer: str | None, references: Sequence[str]):
        self.template = Template(answer) if answer is not None else None
        parsed = [found for reference in references if (found := self.parse(reference)) is not None]
        self.fields = self.template.fields if self.template is not None else ("answer",)
        self.kinds = {field: self._kind([found[field] for found in parsed]) for field in self.fields}

    def _kind(self, values: list[str]) -> str:
        if self.template is None:
            return "free"
        if values and all(number(value) is not None for value in values):
            return "number"
        distinct = len(set(values))
        repeated = 0 < distinct <= min(MOST_CATEGORIES, len(values) / ROWS_PER_CATEGORY)
        return "category" if repeated else "text"

    def parse(self, text: str) -> dict[str, str] | None:
        """Fields of a completion, or `None` if it does not have the template's form."""
        return self.template.parse(text) if self.template is not None else {"answer": text.strip()}

    def score(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """
        Args:
            completions (sequence of [`Completion`]): One per held-out row.

        Returns:
            `dict`: `rows`; `parsed` and `stopped` as shares of all rows; `length`, characters on average; `fields`, per
            field the scores of its kind ([`field_statistics`]); `intervals`, the same names with the lower and upper
            end of the 95 % interval; `confusion`, per category how often what was taken for what.
        """
        columns = self._columns(completions)
        scores = self._scores(len(completions), columns, self._statistics(completions, columns))
        scores["confusion"] = {
            field: _confusion(*columns[field]) for field, kind in self.kinds.items() if kind == "category"
        }
        return scores

    def main_values(self, completions: Sequence[Completion]) -> dict[str, np.ndarray]:
        """Per field, of each row whether the field's [`MAIN`] score holds: 1 or 0."""
        values = {}
        for field, (found, wanted) in self._columns(completions).items():
            one = field_statistics(self.kinds[field], found, wanted)[MAIN[self.kinds[field]]]
            values[field] = one(np.arange(len(completions))[:, None])
        return values

    def errors(self, completions: Sequence[Completion]) -> dict[str, np.ndarray]:
        """
        How wrong each row is, to find the worst.

        Args:
            completions (sequence of [`Completion`]): One per held-out row.

        Returns:
            `dict[str, np.ndarray]`: Per field, of each row a number from 0 (right) to 1: for categories whether it is
            wrong, for numbers the absolute error as a share of the right one, for texts the share of characters to
            edit.
        """
        return {
            field: np.array([_error(self.kinds[field], *pair) for pair in zip(*columns, strict=True)], dtype=float)
            for field, columns in self._columns(completions).items()
        }

    def worst(self, completions: Sequence[Completion], most: int = 20) -> dict[str, Any]:
        """
        Where a model goes wrong.

        Args:
            completions (sequence of [`Completion`]): One per held-out row.
            most (`int`, *optional*, defaults to 20): How many rows of each field.

        Returns:
            `dict`: `worst`, per field the positions of its worst rows, the worst first, right ones left out;
            `by_category`, per field that is a category, and per category, how many `rows` it has, and the share of them
            in which all fields are `right`.
        """
        errors, columns = self.errors(completions), self._columns(completions)
        worst = {}
        for field, values in errors.items():
            order = np.argsort(-values, kind="stable")[:most]
            worst[field] = [int(index) for index in order if values[index] > 0]
        right = np.all([*self.main_values(completions).values()], axis=0)
        by_category: dict[str, Any] = {}
        for field, (_, wanted) in columns.items():
            if self.kinds[field] == "category":
                held = {
                    label: [one == label for one in wanted]
                    for label in sorted({one for one in wanted if one is not None})
                }
                by_category[field] = {
                    label: {"rows": sum(rows), "right": float(right[rows].mean())} for label, rows in held.items()
                }
        return {"worst": worst, "by_category": by_category}

    def _columns(self, completions: Sequence[Completion]) -> dict[str, tuple[list[str | None], list[str | None]]]:
        """Per field what was found and what was wanted."""
        found = [self.parse(completion.text) or {} for completion in completions]
        wanted = [self.parse(completion.reference) or {} for completion in completions]
        return {field: ([row.get(field) for row in found], [row.get(field) for row in wanted]) for field in self.fields}

    def _statistics(self, completions: Sequence[Completion], columns: dict[str, Any]) -> dict[Any, Statistic]:
        parsed = [self.parse(completion.text) is not None for completion in completions]
        statistics: dict[Any, Statistic] = {
            "parsed": _mean_of(parsed),
            "stopped": _mean_of([completion.stopped for completion in completions]),
            "length": _mean_of([len(completion.text) for completion in completions]),
        }
        for field, (found, wanted) in columns.items():
            for name, statistic in field_statistics(self.kinds[field], found, wanted).items():
                statistics[field, name] = statistic
        return statistics

    def _scores(self, rows: int, columns: Iterable[str], statistics: dict[Any, Statistic]) -> dict[str, Any]:
        every = np.arange(rows)
        scores: dict[str, Any] = {"rows": rows}
        intervals: dict[str, Any] = {"fields": {field: {} for field in columns}}
        fields: dict[str, Any] = {field: {} for field in columns}
        for key, statistic in statistics.items():
            value = _finite(float(statistic(every))) if rows else None
            interval = _interval(statistic, rows)
            if isinstance(key, tuple):
                field, name = key
                fields[field][name], intervals["fields"][field][name] = value, interval
            else:
                scores[key], intervals[key] = value if value is not None else 0.0, interval
        return {**scores, "fields": fields, "intervals": intervals}

    def baseline(self, train_answers: Iterable[str], references: Sequence[str]) -> dict[str, Any]:
        """
        Scores of always giving the commonest text, and the median number, of the training rows.

        Args:
            train_answers (iterable of `str`): Answers of the training rows.
            references (sequence of `str`): Answers of the held-out rows.

        Returns:
            `dict`: As `score`.
        """
        texts: dict[str, Counter[str]] = {field: Counter() for field in self.fields}
        for answer in train_answers:
            for field, text in (self.parse(answer) or {}).items():
                texts[field][text] += 1
        guess: dict[str, str | None] = {}
        for field, found in texts.items():
            numbers = [value for text in found.elements() if (value := number(text)) is not None]
            if self.kinds[field] == "number":
                guess[field] = str(statistics.median(numbers)) if numbers else None
            else:
                guess[field] = found.most_common(1)[0][0] if found else None
        wanted = [self.parse(reference) or {} for reference in references]
        columns = {field: ([guess[field]] * len(wanted), [row.get(field) for row in wanted]) for field in self.fields}
        ones = dict.fromkeys(("parsed", "stopped"), _mean_of([True] * len(wanted)))
        return self._scores(
            len(wanted),
            columns,
            ones
            | {
                (field, name): statistic
                for field, (found, right) in columns.items()
                for name, statistic in field_statistics(self.kinds[field], found, right).items()
            },
        )


def field_statistics(kind: str, found: Sequence[str | None], wanted: Sequence[str | None]) -> dict[str, Statistic]:
    """
    What is measured of a field.

    Args:
        kind (`str`): `text`, `category`, `number` or `free`.
        found (sequence of `str`, *optional* each): What the completions say; `None` where they have another form.
        wanted (sequence of `str`, *optional* each): What the references say.

    Returns:
        `dict[str, Statistic]`: By name. Of all rows, where one without the field counts as wrong: `exact`; `normalised`
        (letter case, punctuation and spaces aside); `token_f1`, words in common; `edit_similarity`, 1 minus the share
        of characters to edit; `rouge_l`; `macro_f1`, the mean over the categories; `within_10pct`. Of the rows that
        give a number: `median_ape` and `mean_ape`, the absolute error as a share of the right number; `median_ae` and
        `mean_ae`; `correlation` (Pearson).
    """
    if kind == "number":
        return _number_statistics(found, wanted)
    pairs = list(zip(found, wanted, strict=True))
    exact = _mean_of([one is not None and one == other for one, other in pairs])
    if kind == "category":
        return {"exact": exact, "macro_f1": _macro_f1(found, wanted)}
    words = [(_words(one or ""), _words(other or "")) for one, other in pairs]
    scores = {"exact": exact, "normalised": _mean_of([one == other != [] for one, other in words])}
    if kind == "free":
        return scores | {"rouge_l": _mean_of([_f1(LCSseq.similarity(a, b), a, b) for a, b in words])}
    return scores | {
        "token_f1": _mean_of([_f1((Counter(a) & Counter(b)).total(), a, b) for a, b in words]),
        "edit_similarity": _mean_of([_similarity(one, other) for one, other in pairs]),
    }


def _error(kind: str, found: str | None, wanted: str | None) -> float:
    if kind == "number":
        given, right = number(found or ""), number(wanted or "")
        if given is None or right is None:
            return 1.0
        return min(abs(given - right) / abs(right), 1.0) if right else float(given != 0)
    return float(found != wanted) if kind == "category" else 1 - _similarity(found, wanted)


def _similarity(one: str | None, other: str | None) -> float:
    return 0.0 if one is None or other is None else Levenshtein.normalized_similarity(one, other)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _f1(common: int, one: list[str], other: list[str]) -> float:
    return 2 * common / (len(one) + len(other)) if one and other else 0.0


def _mean_of(values: Iterable[float]) -> Statistic:
    array = np.array([float(value) for value in values])
    return lambda rows: array[rows].mean(axis=-1)


def _one_by_one(statistic: Callable[[np.ndarray], float]) -> Statistic:
    """A statistic of one set of rows, for many."""
    return lambda rows: np.apply_along_axis(statistic, -1, rows)


def _macro_f1(found: Sequence[str | None], wanted: Sequence[str | None]) -> Statistic:
    labels = sorted({text for text in wanted if text is not None})
    codes = {label: code for code, label in enumerate(labels)}
    size = len(labels) + 1  # the last: everything that is no category
    given = np.array([codes.get(text, size - 1) if text is not None else size - 1 for text in found], dtype=int)
    right = np.array([codes[text] if text is not None else size - 1 for text in wanted], dtype=int)

    def macro_f1(rows: np.ndarray) -> float:
        hits = np.bincount(right[rows][given[rows] == right[rows]], minlength=size)[:-1]
        both = (np.bincount(given[rows], minlength=size) + np.bincount(right[rows], minlength=size))[:-1]
        there = np.bincount(right[rows], minlength=size)[:-1] > 0
        return float((2 * hits[there] / both[there]).mean()) if there.any() else math.nan

    return _one_by_one(macro_f1)


def _number_statistics(found: Sequence[str | None], wanted: Sequence[str | None]) -> dict[str, Statistic]:
    given, right = (
        np.array([math.nan if (value := number(text or "")) is None else value for text in texts], dtype=float)
        for texts in (found, wanted)
    )
    off = np.abs(given - right)
    share = np.array(
        [error / abs(value) if value else 0.0 if error == 0 else math.nan if math.isnan(error) else math.inf
         for error, value in zip(off.tolist(), right.tolist(), strict=True)]
    )  # fmt: skip

    def over(values: np.ndarray, reduce: Callable[[np.ndarray], Any]) -> Statistic:
        def statistic(rows: np.ndarray) -> float:
            some = values[rows]
            some = some[~np.isnan(some)]
            return float(reduce(some)) if len(some) else math.nan

        return _one_by_one(statistic)

    def correlation(rows: np.ndarray) -> float:
        both = ~np.isnan(given[rows] + right[rows])
        one, other = given[rows][both], right[rows][both]
        if len(one) < 3 or not one.std() or not other.std():
            return math.nan
        return float(np.corrcoef(one, other)[0, 1])

    return {
        "median_ape": over(share, np.median),
        "within_10pct": _mean_of(share <= WITHIN),
        "mean_ape": over(share, np.mean),
        "median_ae": over(off, np.median),
        "mean_ae": over(off, np.mean),
        "correlation": _one_by_one(correlation),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(statistic: Statistic, rows: int) -> list[float] | None:
    """
    Lower and upper end of the percentile bootstrap interval over the rows; `None` where it says nothing. (SciPy's warns
    of every statistic that is the same in all resamples, such as 100 %.)
    """
    if rows < 2:
        return None
    random, at_once = np.random.default_rng(0), max(1, min(RESAMPLES, 10_000_000 // rows))
    parts = [statistic(random.integers(rows, size=(at_once, rows))) for _ in range(math.ceil(RESAMPLES / at_once))]
    values = np.concatenate(parts)
    if not np.isfinite(values).all():
        return None
    return [float(end) for end in np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])]


def _confusion(found: Sequence[str | None], wanted: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """Right category → what it was taken for → how often; everything that is no category is called `other`."""
    labels = {text for text in wanted if text is not None}
    table: dict[str, Counter[str]] = {label: Counter() for label in sorted(labels)}
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            table[other][one if one in labels else "other"] += 1
    return {label: dict(counts.most_common()) for label, counts in table.items()}


def better(values: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """
    Whether one model is better than another on the same rows, or only seems so.

    Args:
        values (`np.ndarray` of shape `(rows,)`): One's scores, row by row.
        others (`np.ndarray` of shape `(rows,)`): The other's.

    Returns:
        `dict[str, float]`: `difference` of the means, and `p`, how often swapping the two at random, row by row, gives
        as large a difference (one-sided paired permutation test).
    """
    from scipy.stats import permutation_test  # nearly a second, which training need not wait for

    difference = float(values.mean() - others.mean())
    if not (values - others).any():
        return {"difference": difference, "p": 1.0}
    found = permutation_test(
        (values, others),
        lambda one, other, axis: np.mean(one - other, axis=axis),
        permutation_type="samples",
        vectorized=True,
        alternative="greater",
        n_resamples=9999,
        rng=0,
    )
    return {"difference": difference, "p": float(found.pvalue)}
