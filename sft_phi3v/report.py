"""One page on one run: did it learn, does it look at the picture, can the numbers be trusted, and what does it write?

`python -m sft_phi3v.report RECIPE` reads what the run left in `output_dir` and the held-out rows' pictures, and writes
`output_dir/report.html`: one file that needs nothing else, neither a server nor a network. What a run did not leave is
left out, with a sentence. The same files give the same page, byte for byte.
"""

from sft_phi3v.usage import check_recipe

if __name__ == "__main__":
    check_recipe()  # before torch is imported

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sft_phi3v.card import training_facts
from sft_phi3v.charts import Chart, Points, curve, dots, histogram
from sft_phi3v.checkpoints import write_whole
from sft_phi3v.evaluation import (
    ORDER,
    RESCORABLE,
    SURE,
    public_recipe,
    read_json,
    read_lines,
    score_rows,
    short_row,
    trained_hashes,
    trained_keys,
    verdict,
)
from sft_phi3v.gallery import MOST_CHARACTERS, SUBJECTS, Gallery
from sft_phi3v.merge import REPORT
from sft_phi3v.recipe import Recipe, differences, load_recipe
from sft_phi3v.scoring import MAIN

FEW = 30  # rows, below which no score says much
CONTROLS = {"shuffled": "others’ pictures", "blank": "grey pictures"}
SCORES = {
    "exact": "exact",
    "normalised": "normalised",
    "token_f1": "words in common",
    "edit_similarity": "edit similarity",
    "rouge_l": "ROUGE-L",
    "macro_f1": "macro F1",
    "within_10pct": "within 10 %",
    "median_ape": "median error",
    "mean_ape": "mean error",
    "median_ae": "median error, absolute",
    "mean_ae": "mean error, absolute",
    "correlation": "correlation",
}
PLAIN = ("rows", "moved", "length", "median_ae", "mean_ae", "correlation", "difference", "p")  # no shares
# Of training: title, and whether it is a share.
CURVES = {
    "mean_token_accuracy": ("Next token right", True),
    "learning_rate": ("Learning rate", False),
    "grad_norm": ("Norm of the gradient", False),
    "tokens_per_second": ("Tokens per second", False),
    "pictures_per_second": ("Pictures per second", False),
    "data_wait": ("Time spent waiting for data", True),
    "peak_memory_gb": ("Most memory in use, GB", False),
}
HISTOGRAMS = {
    "tokens": ("Tokens per row", "rows"),
    "image_tokens": ("Tokens of pictures per row", "rows"),
    "supervised": ("Supervised tokens per row", "rows"),
    "width": ("Width of pictures, in pixels", "pictures"),
    "height": ("Height of pictures, in pixels", "pictures"),
}


def report(recipe: Recipe) -> Path:
    """
    Args:
        recipe ([`Recipe`]): The recipe of a run that was scored, at least before training.

    Returns:
        `Path`: `output_dir/report.html`.

    Raises:
        ValueError: If nothing was scored there, or the recipe is not the one of that run.
    """
    folder = Path(str(recipe.training.output_dir))
    if not (folder / "metrics.json").is_file():
        raise ValueError(
            f"output_dir: {str(folder)!r} holds no metrics.json, so there is nothing to report. Train and score first: "
            f"accelerate launch sft_phi3v/run.py {recipe.path}"
        )
    changed = [name for name in differences(folder / "recipe.yaml", recipe) if not RESCORABLE.fullmatch(name)]
    if changed:
        raise ValueError(
            f"output_dir: {str(folder)!r} holds a run of another recipe (it differs in {', '.join(changed)}). Use its "
            f"own: {folder / 'recipe.yaml'}"
        )
    path = folder / "report.html"
    write_whole(path, render(recipe, folder))
    return path


def render(recipe: Recipe, folder: Path) -> str:
    """
    Args:
        recipe ([`Recipe`]): The recipe of the run.
        folder (`Path`): What the run left.

    Returns:
        `str`: The page.
    """
    metrics, data, environment = (read_json(folder / f"{name}.json") for name in ("metrics", "data", "environment"))
    names = [name for name in dict.fromkeys([*ORDER, *metrics]) if name in metrics]
    lines = read_lines(folder / "completions.jsonl") if (folder / "completions.jsonl").is_file() else []
    subject = next((name for name in SUBJECTS if name in metrics), "")
    number, rows = Numbers(metrics), Gallery(recipe, lines)
    runs = data.get("example", {}).get("runs")
    faults = mask_faults(runs) if runs is not None else []
    merges = [found for name in ("merged.refused", "merged") if (found := _merge(folder, folder / name))]
    fields = {field: found for name in names[:1] for field, found in metrics[name]["fields"].items()}
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = jinja.get_template("report.jinja").render(
        name=folder.resolve().name,
        verdict=_verdict(metrics, subject),
        questions=_questions(metrics, subject, data, faults),
        warnings=[*_warnings(metrics, data, merges, rows), *faults],
        metrics=metrics,
        subject=subject,
        names=names,
        labels={name: _label(name, metrics[name]) for name in names},
        scores=SCORES,
        sure=SURE,
        number=number,
        fields=[
            {
                "name": field,
                "main": _main(found),
                "scores": _main_first(found),
                "chart": _dots(field, names, metrics, subject),
            }
            for field, found in fields.items()
        ],
        curves=_curves(read_json(folder / "trainer_state.json").get("log_history", []), fields),
        data=data,
        histograms=[
            histogram(title, **data["histograms"][key], unit=unit)
            for key, (title, unit) in HISTOGRAMS.items()
            if data.get("histograms", {}).get(key)
        ],
        runs=runs,
        faults=faults,
        rows=rows,
        most_characters=MOST_CHARACTERS,
        cards=rows.cards(),
        facts=[
            *training_facts(recipe, folder, str(trained_keys(recipe, folder)["model_name_or_path"])),
            *_row_counts(data, environment),
        ],
        commit=environment.get("commit"),
        recipe=public_recipe(recipe, folder),
        merges=merges,
        categories=metrics.get(subject, {}).get("errors", {}).get("by_category", {}),
        confusions=_confusions(names, metrics),
        every=[path for path, _ in leaves(metrics)],
    )
    return page.rstrip() + "\n"


def _row_counts(data: Mapping[str, Any], environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = data.get("rows") or environment.get("rows")
    return [("rows", f"{counts['train']:,} to train on, {counts['held_out']:,} held out")] if counts else []


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Every number in nested mappings and lists, with the keys that lead to it."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, key))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield path, tree


class Numbers:
    """The numbers of `metrics.json` as elements that say which number each is, and give it in full."""

    def __init__(self, metrics: dict[str, Any]):
        self.found = dict(leaves(metrics))

    def __call__(self, *path: Any, full: bool = False) -> Markup:
        """Such as `<data value="0.84896" data-key="after/fields/title/exact">84.9%</data>`; a dash if there is none."""
        value = self.found.get(path)
        if value is None:
            return Markup("–")
        name = path[-1] if isinstance(path[-1], str) else path[-2]
        share = name not in PLAIN and "confusion" not in path
        text = json.dumps(value) if full else f"{value:.1%}" if share else _short(value)
        key = "/".join(str(part).replace("~", "~0").replace("/", "~1") for part in path)
        return Markup('<data value="{}" data-key="{}">{}</data>').format(json.dumps(value), key, text)

    def interval(self, name: str, *path: Any) -> Markup:
        """The two ends of a score's interval; empty if there is none."""
        ends = [(name, "intervals", *path, end) for end in (0, 1)]
        if not all(end in self.found for end in ends):
            return Markup("")
        return Markup('<span class="interval">{} – {}</span>').format(*(self(*end) for end in ends))


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _main(scores: Mapping[str, Any]) -> str:
    return next(name for name in dict.fromkeys([*MAIN.values(), *scores]) if name in scores)


def _main_first(scores: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([_main(scores), *scores]))


def _confusions(names: Sequence[str], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The confusion tables, that of the trained model first."""
    found = []
    for name in sorted(names, key=lambda name: name not in SUBJECTS):
        for field, table in metrics[name].get("confusion", {}).items():
            taken = {label for counts in table.values() for label in counts}
            columns = [*table, *(["other"] if "other" in taken - table.keys() else [])]
            found.append({"name": name, "field": field, "table": table, "columns": columns})
    return found


def _short_label(name: str) -> str:
    return CONTROLS.get(name.partition("_")[2], name)


def _label(name: str, scores: Mapping[str, Any]) -> str:
    moved = scores.get("moved", scores["rows"])
    return _short_label(name) + ("" if moved == scores["rows"] else f" ({moved} of {scores['rows']} rows)")


def _verdict(metrics: dict[str, Any], subject: str) -> str:
    if not subject:
        return "The trained model is not scored yet. What is here was measured before training."
    if "better_than_shuffled" in metrics[subject] and {"baseline", f"{subject}_shuffled"} <= metrics.keys():
        return verdict(metrics)
    return "The trained model was scored, but not compared with the one before. Whether it learned is not known."


def _questions(metrics: dict[str, Any], subject: str, data: dict[str, Any], faults: list[str]) -> list[dict[str, str]]:
    """The three things to know first: the question, the answer in a few words, and whether it is good."""
    found = []
    for question, key in (
        ("Did it learn?", "better_than_before"),
        ("Does it look at the picture?", "better_than_shuffled"),
    ):
        tests = metrics.get(subject, {}).get(key)
        nothing = key == "better_than_shuffled" and metrics.get(f"{subject}_shuffled", {}).get("moved") == 0
        if not tests or nothing:
            found.append({"question": question, "answer": "Not known", "tone": "open"})
            continue
        sure = sum(test["p"] < SURE for test in tests.values())
        answer = f"Yes, in {sure} of {len(tests)} fields" if sure and len(tests) > 1 else "Yes" if sure else "No"
        found.append({"question": question, "answer": answer, "tone": "good" if sure else "bad"})
    rows, leaked = max((scores["rows"] for scores in metrics.values()), default=0), _leaked(data)
    if faults:
        answer, tone = "No: look at the mask", "bad"
    elif leaked:
        answer, tone = f"With care: {leaked} held-out rows leak", "bad"
    elif rows < FEW:
        answer, tone = f"Hardly: {rows} rows only", "bad"
    else:
        answer, tone = f"{rows} held-out rows", "open" if leaked is None else "good"
    return [*found, {"question": "Can I trust the numbers?", "answer": answer, "tone": tone}]


def _leaked(data: Mapping[str, Any]) -> int | None:
    """How many held-out rows show a picture that was trained on; `None` if nobody counted."""
    leakage = data.get("leakage")
    return None if leakage is None else leakage["pictures"]


def _warnings(
    metrics: dict[str, Any], data: dict[str, Any], merges: list[dict[str, Any]], rows: Gallery
) -> Iterator[str]:
    if leaked := _leaked(data):
        some = ", ".join(short_row(row) for row in data["leakage"]["rows"][:10])
        yield (
            f"Leakage: {leaked} held-out rows show a picture that is trained on as well, byte for byte (row {some}"
            f"{', …' if leaked > 10 else ''}). Their scores say little about new pictures."
        )
    if any(not found["verified"] for found in merges):
        yield "The last merge was refused: the merged model does not equal the one that was trained. See Merge."
    strange = [name for name in rows.names if name in metrics and not rows.agree(name, metrics[name])]
    if strange:
        yield (
            f"completions.jsonl and metrics.json are not of one run: the completions of {', '.join(strange)} give "
            "other scores. Score again: make evaluate."
        )


def mask_faults(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """
    Args:
        runs (sequence of `dict`): One example's tokens in order, `{"text", "tokens", "supervised", "picture"}` each.

    Returns:
        `list[str]`: What is supervised and should not be, or should be and is not; none if all is well.
    """
    learned = [run for run in runs if run["supervised"]]
    if not learned:
        return ["The mask is wrong: nothing is supervised, so nothing can be learned."]
    found = [
        f"The mask is wrong: {mark} is supervised, which is not the assistant's. The model learns to write it."
        for mark in ("<|user|>", "<|system|>", "<|assistant|>")
        if any(mark in run["text"] for run in learned)
    ]
    if any(run["picture"] for run in learned):
        found.append("The mask is wrong: a picture is supervised. Its tokens are no words to learn.")
    if not any(run["text"].rstrip().endswith("<|end|>") for run in learned):
        found.append("The mask is wrong: no supervised text ends in <|end|>. The model never learns to stop.")
    return found


def _merge(trained: Path, folder: Path) -> dict[str, Any] | None:
    found = read_json(folder / REPORT)
    if not found:
        return None
    there = trained_hashes(trained)
    return {**found, "stale": bool(there) and there != found["adapter"], "table": score_rows(found["scores"])}


def _dots(field: str, names: Sequence[str], metrics: Mapping[str, Any], subject: str) -> Chart:
    """A field's main score of each model, with its interval."""
    score = _main(metrics[names[0]]["fields"][field])
    rows = {}
    for name in names:
        intervals = metrics[name].get("intervals", {}).get("fields", {}).get(field, {})
        rows[_short_label(name)] = metrics[name]["fields"].get(field, {}).get(score), intervals.get(score)
    return dots(f"{field}: {SCORES.get(score, score)}", rows, accent=subject)


def _curves(history: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> dict[str, list[Chart]]:
    """Charts of the trainer's log: `main`, loss and scores, and `more`."""

    def points(key: str) -> Points:
        found = [(entry["step"], entry.get(key)) for entry in history if "step" in entry]
        return [(step, value) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]

    main, more = [], []
    if points("loss") or points("eval_loss"):
        names = ("in training (line)", "on held-out rows (dots)")
        main.append(curve("Loss", points("loss"), points("eval_loss"), logarithmic=True, names=names))
    for field, scores in fields.items():
        found = next((score for score in _main_first(scores) if points(f"eval_{field}_{score}")), None)
        if found:
            title, share = f"{field}: {SCORES.get(found, found)}, during training", found not in PLAIN
            marked = points(f"eval_{field}_{found}")
            main.append(curve(title, (), marked, share=share, names=("", "on held-out rows")))
    if formed := points("eval_parsed"):
        title = "Answers in the right form, during training"
        main.append(curve(title, (), formed, share=True, names=("", "on held-out rows")))
    for key, (title, share) in CURVES.items():
        if logged := points(key):
            more.append(curve(title, logged, share=share, names=("in training", "")))
    return {"main": main, "more": more}


def main(argv: list[str] | None = None) -> None:
    """`python -m sft_phi3v.report RECIPE [--key value …]`"""
    try:
        path = report(load_recipe(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
