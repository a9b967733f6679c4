"""Scores by free generation: the model writes the answer on its own, and the answer template reads it back.

Teacher forcing would show the model the digits before the one it predicts, so its prices would look better than any
user will ever see them. Here the model gets the picture and the question, nothing else, and is stopped only by itself
or by `max_new_tokens`. The same rows are scored with each other's pictures (a model that does not look scores the same)
and against the majority and the median of the training rows (a model must beat what needs no model).
"""

from sft_phi3v.usage import check_recipe

if __name__ == "__main__":
    check_recipe()  # before torch is imported

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import BatchFeature
from transformers.integrations.fsdp import is_fsdp_managed_module

from sft_phi3v.checkpoints import file_hashes, write_whole
from sft_phi3v.collator import Collator
from sft_phi3v.data import ROW, Template, to_examples
from sft_phi3v.interruption import INTERRUPTION, Interrupted
from sft_phi3v.machine import check_machine
from sft_phi3v.model import (
    base_commit,
    find_model,
    load_model,
    load_named,
    load_trained,
    on_device,
    run_file,
    same_model,
)
from sft_phi3v.phi3_v import Phi3VForCausalLM, Phi3VProcessor
from sft_phi3v.phi3_v.image_processing_phi3_v import as_picture
from sft_phi3v.preview import Prepared, prepare, print_once
from sft_phi3v.recipe import RESUMABLE, Recipe, as_text, differences, load_recipe, public_keys
from sft_phi3v.scoring import Completion, Scorer, better
from sft_phi3v.streaming import Stream

EXAMPLE_SIDE = 448  # pixels of a picture on the model card and in W&B
JOURNAL = ".generated"  # folder of what a cut evaluation has finished
ORDER = ("baseline", "before", "after", "after_shuffled", "after_blank", "model", "model_shuffled", "model_blank")
SURE = 0.01  # how seldom chance may do as well, for a difference to be called one
SHOWN = 32  # rows that a tracker shows, where the recipe's `generation_rows` is 0
STREAMED = 100_000  # most answers of a stream that the baseline is made of
# What may differ from the recipe that was trained: none of it changes what is scored against what.
RESCORABLE = re.compile(rf"eval_rows|max_new_tokens|use_cpu|bf16|fp16|dtype|{RESUMABLE.pattern}")


def generate(
    model: Phi3VForCausalLM | PeftModel,
    processor: Phi3VProcessor,
    examples: Sequence[dict[str, Any]] | Dataset,
    *,
    max_new_tokens: int,
    batch_size: int,
    description: str = "generate",
    progress: bool = True,
    journal: "Journal | None" = None,
) -> list[Completion]:
    """
    Greedy completions for the last assistant turn of each example, on all processes together.

    Args:
        model ([`Phi3VForCausalLM`] or `PeftModel`): The model, on its device.
        processor ([`Phi3VProcessor`]): Its processor.
        examples (sequence of `dict`): `{"images", "messages", "row"}` each.
        max_new_tokens (`int`): Longest completion, in tokens.
        batch_size (`int`): Rows generated at once on each process; half as many, and so on, where memory does not last.
        description (`str`, *optional*): Text of the progress bar.
        progress (`bool`, *optional*): Whether to show it.
        journal ([`Journal`], *optional*): Keeps what is finished; what it holds already is not generated again.

    Returns:
        `list[Completion]`: In the order of `examples`, the same on every process.

    Raises:
        ValueError: If a picture cannot be read, or one row alone does not fit into memory.
        Interrupted: In the middle of training, if the run was asked to stop.
    """
    state = PartialState()
    # Rows of like length share a batch, so that little is padded; longest first: a batch too large fails at once.
    collator = Collator(processor)
    lengths = [collator.lengths(example).tokens for example in examples]
    finished = journal.read() if journal is not None else {}
    order = sorted({*range(len(lengths))} - finished.keys(), key=lambda index: -lengths[index])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    was_training = model.training
    model.eval()
    found: list[tuple[int, Completion]] = []
    quiet = not (progress and state.is_main_process)
    bar = tqdm(total=len(lengths), initial=len(finished), desc=description, disable=quiet)
    with torch.no_grad(), bar, ThreadPoolExecutor(1) as ahead:
        left, ready = batches[state.process_index :: state.num_processes], None
        together = is_fsdp_managed_module(model)  # each process holds a part of the weights: all generate, or none can
        if together and batches:
            left += batches[:1] * (-(-len(batches) // state.num_processes) - len(left))
        while left:
            # Only in the middle of training does a signal wait to be heeded.
            if INTERRUPTION.waiting and (INTERRUPTION.agreed() if together else INTERRUPTION.asked):
                break
            batch = left.pop(0)
            some, inputs = (ready or ahead.submit(_read, processor, examples, batch)).result()
            # The next batch's pictures are cut while this one's answers are written.
            ready = ahead.submit(_read, processor, examples, left[0]) if left else None
            try:
                completions = _generate_batch(model, processor, some, inputs.to(model.device), max_new_tokens)
            except RuntimeError as error:
                if together or not should_reduce_batch_size(error):
                    raise
                left, ready = _halved([batch, *left], error), None
                clear_device_cache(garbage_collection=True)
                continue
            found += zip(batch, completions, strict=True)
            if journal is not None:
                journal.add(found[-len(batch) :])
            bar.update(min(len(batch) * state.num_processes, bar.total - bar.n))
    model.train(was_training)
    if INTERRUPTION.waiting and INTERRUPTION.agreed():
        raise Interrupted
    if state.num_processes > 1:
        found = gather_object(found)
    finished |= dict(found)
    return [finished[index] for index in sorted(finished)]


class Journal:
    """
    The completions of one model so far, a line each, so that an evaluation that was cut goes on where it was.

    Each process writes a file of its own; all of them are read, whatever the number of processes by then.

    Args:
        folder (`Path`): Where the files lie.
        key (`str`): What the completions are of. Other keys' files are not looked at.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, hashlib.sha256(key.encode()).hexdigest()[:16]

    def read(self) -> dict[int, Completion]:
        """What is finished, by its position among the examples: the same on every process, on any disk."""
        found: dict[int, Completion] = {}
        for path in sorted(self.folder.glob(f"{self.key}.*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                with contextlib.suppress(ValueError):  # the last line of a process that was cut may be half
                    index, *completion = json.loads(line)
                    found[index] = Completion(*completion)
        pairs = [*found.items()]
        return dict(gather_object(pairs) if PartialState().num_processes > 1 else pairs)

    def add(self, found: Iterable[tuple[int, Completion]]) -> None:
        """Writes down what is finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.key}.{PartialState().process_index}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            # What a process that was cut wrote last may have no end.
            file.write(
                "\n" + "\n".join(json.dumps([index, *astuple(completion)]) for index, completion in found) + "\n"
            )


def _halved(batches: list[list[int]], error: RuntimeError) -> list[list[int]]:
    """The same rows in batches half as large as the first, which did not fit."""
    size = len(batches[0]) // 2
    if not size:
        raise ValueError(
            "One row alone does not fit into memory while it is generated. Lower `num_crops` or `max_new_tokens`."
        ) from error
    print(f"out of memory: generating {size} rows at once from here on (`generation_batch_size`)", flush=True)
    rows = [row for batch in batches for row in batch]
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _read(
    processor: Phi3VProcessor, examples: Sequence[dict[str, Any]] | Dataset, batch: Sequence[int]
) -> tuple[list[dict[str, Any]], BatchFeature]:
    """Some of the examples, and what the model reads of them: all before the last assistant turn."""
    some = [examples[index] for index in batch]
    try:
        inputs = processor.apply_chat_template(
            [with_pictures(example["messages"][:-1], example["images"]) for example in some],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", "do_normalize": False},
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"Rows {[example['row'] for example in some]} cannot be read: {error}") from error
    return some, inputs


def _generate_batch(
    model: Phi3VForCausalLM | PeftModel,
    processor: Phi3VProcessor,
    examples: list[dict[str, Any]],
    inputs: BatchFeature,
    max_new_tokens: int,
) -> list[Completion]:
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True)
    stops = model.generation_config.eos_token_id
    stops = {stops} if isinstance(stops, int) else set(stops)
    new_ids = ids[:, inputs["input_ids"].shape[1] :].tolist()
    completions = []
    for example, new in zip(examples, new_ids, strict=True):
        end = next((position for position, token in enumerate(new) if token in stops), None)
        # Special tokens stay: an answer that opens a new turn in its middle is not the answer without it.
        text = processor.tokenizer.decode(new[:end]).strip()
        reference = _text_of(example["messages"][-1])
        completions.append(Completion(example["row"], reference, text, stopped=end is not None))
    return completions


def with_pictures(messages: Sequence[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages with the pictures in their parts, one after the other, as a processor takes them."""
    pictures = iter(images)
    filled = []
    for message in messages:
        parts = message["content"]
        if not isinstance(parts, str):
            parts = [part | {"image": next(pictures)} if part["type"] == "image" else part for part in parts]
        filled.append({**message, "content": parts})
    return filled


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


class ShuffledPictures(Sequence[dict[str, Any]]):
    """
    The same examples with each other's pictures: each gets those of another one that has as many.

    Args:
        examples (sequence of `dict`): Examples; read anew each time, so that no picture stays in memory.
        seed (`int`): Fixes who gets whose. No example keeps its own pictures unless it is alone of its kind.
    """

    def __init__(self, examples: Sequence[dict[str, Any]] | Dataset, seed: int):
        self.examples = examples
        self.source = list(range(len(examples)))  # whose pictures each row gets
        self.counts = [len(example["images"]) for example in examples]
        groups: dict[int, list[int]] = defaultdict(list)
        for index, count in enumerate(self.counts):
            groups[count].append(index)
        for group in groups.values():
            random.Random(seed).shuffle(group)
            for index, other in zip(group, [*group[1:], *group[:1]], strict=True):
                self.source[index] = other

    @property
    def moved(self) -> int:
        """Rows that got pictures of another row; the rest are alone of their kind, or have no picture."""
        return sum(index != other and self.counts[index] > 0 for index, other in enumerate(self.source))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        return {**self.examples[index], "images": self.examples[self.source[index]]["images"]}


class BlankPictures(Sequence[dict[str, Any]]):
    """The same examples with nothing to see: each picture is grey, in its own size."""

    def __init__(self, examples: Sequence[dict[str, Any]] | Dataset):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        example = self.examples[index]
        return {**example, "images": [PIL.Image.new("RGB", image.size, "grey") for image in example["images"]]}


class Evaluation:
    """
    The held-out rows of one run, their scores so far and the files that hold them.

    Args:
        recipe ([`Recipe`]): Says how many rows, how long a completion, and where the files go.
        processor ([`Phi3VProcessor`]): The model's processor.
        train_rows (`Dataset` or [`Stream`], *optional*): Training rows, for the baseline.
        held_out_rows (`Dataset`): Held-out rows; `eval_rows` of them, drawn by `seed`, are scored.
        most (`int`, *optional*): Scores only so many of these.
    """

    def __init__(
        self,
        recipe: Recipe,
        processor: Phi3VProcessor,
        train_rows: Dataset | Stream | None,
        held_out_rows: Dataset,
        most: int | None = None,
    ):
        self.recipe, self.processor = recipe, processor
        self.folder = Path(str(recipe.training.output_dir))
        for wanted in (recipe.task.eval_rows, most):
            if wanted is not None and wanted < len(held_out_rows):
                # A split is often sorted, by category say: its head would not stand for it.
                chosen = random.Random(recipe.training.seed).sample(range(len(held_out_rows)), wanted)
                held_out_rows = held_out_rows.select(sorted(chosen))
        self.examples = to_examples(held_out_rows, recipe)
        self.rows = list(held_out_rows[ROW])
        self.references = answers(held_out_rows, recipe)
        self.scorer = Scorer(recipe.task.answer, self.references)
        self.metrics: dict[str, Any] = {}
        if train_rows is not None:
            self.metrics["baseline"] = self.scorer.baseline(_train_answers(train_rows, recipe), self.references)
        self.completions: dict[str, list[Completion]] = {}
        count = min(recipe.task.generation_rows or SHOWN, len(self.rows))
        self.sample = sorted(random.Random(recipe.training.seed).sample(range(len(self.rows)), count))

    def run(
        self, name: str, model: Phi3VForCausalLM | PeftModel, *, weights: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """
        Generates and scores under a name, `before` or `after`; `after_shuffled` and `after_blank` are the controls, in
        which the rows get each other's pictures, or grey ones.

        Args:
            name (`str`): Key in `metrics.json` and in each line of `completions.jsonl`.
            model ([`Phi3VForCausalLM`] or `PeftModel`): The model to score.
            weights (`dict[str, str]`, *optional*): What says which weights these are. Given it, completions are kept as
                they come, and those that an earlier evaluation, cut short, kept of the same weights are taken over.

        Returns:
            `dict`: The scores; with shuffled pictures also `moved`, the number of rows that really got others.
        """
        training = self.recipe.training
        examples: Sequence[dict[str, Any]] | Dataset = self.examples
        if name.endswith("_shuffled"):
            examples = ShuffledPictures(self.examples, training.seed)
        elif name.endswith("_blank"):
            examples = BlankPictures(self.examples)
        with self.precision(model):
            self.completions[name] = generate(
                model,
                self.processor,
                examples,
                max_new_tokens=self.recipe.task.max_new_tokens,
                batch_size=self.recipe.task.generation_batch_size,
                description=f"generate ({name.replace('_', ', ')})",
                progress=not training.disable_tqdm,
                journal=None if weights is None else self._journal(name, weights),
            )
        self.metrics[name] = self.scorer.score(self.completions[name])
        if isinstance(examples, ShuffledPictures):
            self.metrics[name]["moved"] = examples.moved
        return self.metrics[name]

    def _journal(self, name: str, weights: dict[str, str]) -> Journal:
        keys = {key: value for key, value in self.recipe.dump().items() if not RESUMABLE.fullmatch(key)}
        [key] = broadcast_object_list([json.dumps([name, weights, keys, self.rows, self.references], default=str)])
        return Journal(self.folder / JOURNAL, key)

    def compare(self, subject: str = "after") -> str:
        """
        Tests, on the same rows, whether a model is better than `before` and than with others' pictures, and finds
        where it is worst.

        Args:
            subject (`str`, *optional*, defaults to `"after"`): The name that the model was scored under.

        Returns:
            `str`: In words, whether it learned, and whether it uses the picture. The numbers go into the metrics.
        """
        own = self.scorer.main_values(self.completions[subject])
        for name, key in (("before", "better_than_before"), (f"{subject}_shuffled", "better_than_shuffled")):
            if name in self.completions:
                others = self.scorer.main_values(self.completions[name])
                self.metrics[subject][key] = {field: better(own[field], others[field]) for field in own}
        self.metrics[subject]["errors"] = self.scorer.worst(self.completions[subject])
        return verdict(self.metrics)

    def sampled(self, model: Phi3VForCausalLM | PeftModel) -> tuple[dict[str, float], list[Completion]]:
        """
        Scores the rows of `sample` in the middle of training.

        Args:
            model ([`Phi3VForCausalLM`] or `PeftModel`): The model as it is now.

        Returns:
            `tuple[dict[str, float], list[Completion]]`: The scores, named as [`Evaluation.sampled_scores`] and more;
            the completions.
        """
        with self.precision(model):
            completions = generate(
                model,
                self.processor,
                [self.examples[index] for index in self.sample],
                max_new_tokens=self.recipe.task.max_new_tokens,
                batch_size=self.recipe.task.generation_batch_size,
                description="generate (while it trains)",
                progress=False,
            )
        scores = self.scorer.score(completions)
        named = {f"eval_{name}": scores[name] for name in ("parsed", "stopped")}
        for field, found in scores["fields"].items():
            named |= {f"eval_{field}_{name}": value for name, value in found.items() if value is not None}
        return named, completions

    def sampled_scores(self) -> list[str]:
        """Names of those of [`Evaluation.sampled`]'s scores that are never missing; of all, more is better."""
        always = {"exact", "normalised", "token_f1", "edit_similarity", "macro_f1", "rouge_l", "within_10pct"}
        fields = self.scorer.score([Completion(0, "", "", True)] * 2)["fields"]
        names = [f"eval_{field}_{name}" for field, found in fields.items() for name in found if name in always]
        return ["eval_parsed", "eval_stopped", *names]

    def precision(self, model: Phi3VForCausalLM | PeftModel) -> torch.autocast:
        """Training runs under autocast and leaves the model so: the same for a model that was not trained."""
        training = self.recipe.training
        dtype = torch.float16 if training.fp16 else torch.bfloat16
        return torch.autocast(model.device.type, dtype, enabled=training.fp16 or training.bf16)

    def write(self) -> None:
        """Writes `metrics.json` and `completions.jsonl` into `output_dir`, each whole or not at all."""
        if not PartialState().is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for index, (row, reference) in enumerate(zip(self.rows, self.references, strict=True)):
            line: dict[str, Any] = {"row": row, "reference": reference}
            for name, completions in self.completions.items():
                completion = completions[index]
                line[name] = {
                    "text": completion.text,
                    "stopped": completion.stopped,
                    "fields": self.scorer.parse(completion.text),
                }
            lines.append(json.dumps(line, ensure_ascii=False))
        write_whole(self.folder / "completions.jsonl", "\n".join(lines) + "\n")
        write_whole(self.folder / "metrics.json", json.dumps(self.metrics, indent=2) + "\n")
        shutil.rmtree(self.folder / JOURNAL, ignore_errors=True)

    def resume(self) -> bool:
        """Takes over what an interrupted run of the same rows has scored before training; says whether it did."""
        # As the main process reads it: on another machine a disk may be late.
        [before] = broadcast_object_list([self._before() if PartialState().is_main_process else None])
        if before is None:
            return False
        self.completions["before"] = before
        self.metrics["before"] = self.scorer.score(before)
        return True

    def _before(self) -> list[Completion] | None:
        try:
            lines = read_lines(self.folder / "completions.jsonl")
            rows = [(line["row"], line["reference"]) for line in lines]
            if rows != list(zip(self.rows, self.references, strict=True)):
                return None
            return [
                Completion(line["row"], line["reference"], line["before"]["text"], line["before"]["stopped"])
                for line in lines
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # nothing was scored yet, or not by us: it is scored again

    def table(self) -> str:
        """The scores as one table for people."""
        lines = score_rows(self.metrics)
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        return "\n".join(
            "  ".join(
                [
                    f"{line[0]:<{widths[0]}}",
                    *(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)),
                ]
            )
            for line in lines
        )

    def worst(self, most: int = 3) -> str:
        """Where the scored model is worst, for people: rows by field, and categories."""
        subject = "model" if "model" in self.metrics else "after"
        found, completions = self.metrics[subject]["errors"], self.completions[subject]
        lines = []
        for field, worst in found["worst"].items():
            lines.append(f"{field}: the worst rows" if worst else f"{field}: no mistake")
            for index in worst[:most]:
                wanted, given = (
                    (self.scorer.parse(text) or {}).get(field)
                    for text in (self.references[index], completions[index].text)
                )
                found_text = repr(given) if given is not None else f"another form: {completions[index].text!r}"
                lines.append(f"  row {self.rows[index]}: {wanted!r} → {found_text}")
        for field, categories in found["by_category"].items():
            hardest = sorted(categories.items(), key=lambda item: item[1]["right"])[:most]
            shown = [f"{name} {one['right']:.0%} of {one['rows']}" for name, one in hardest]
            lines.append(f"{field}: all fields right least often in {', '.join(shown)}")
        return "\n".join(lines)

    def save_examples(self) -> None:
        """
        Writes `card_examples` of the scored rows' pictures as `examples/N.jpg`, small, for the model card; N is the
        line of `completions.jsonl`, counted from 1.
        """
        folder, wanted = self.folder / "examples", self.recipe.publish.card_examples
        if folder.is_dir() or not wanted or not PartialState().is_main_process:
            return
        aside = folder.with_name(f".examples.{os.getpid()}")
        aside.mkdir(parents=True)
        for index in random.Random(self.recipe.training.seed).sample(range(len(self.rows)), len(self.rows)):
            images = self.examples[index]["images"]
            if len(images) == 1 and len([*aside.iterdir()]) < wanted:
                thumbnail(images[0]).save(aside / f"{index + 1}.jpg", quality=85)
        os.replace(aside, folder)


def thumbnail(image: PIL.Image.Image, side: int = EXAMPLE_SIDE) -> PIL.Image.Image:
    """A small picture as the model sees the large one, for people."""
    picture = as_picture(image).convert("RGB")
    picture.thumbnail((side, side))
    picture.info.clear()  # comments and the like would be written along
    return picture


def score_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """
    Scores as the cells of a table.

    Args:
        metrics (`dict`): `metrics.json`, or any names with scores of the same fields.

    Returns:
        `list[list[str]]`: The header, and a row per name: its label, rows, and each score in percent.
    """
    fields = next(iter(metrics.values()))["fields"]
    header = ["", "rows", "parsed", "stopped"]
    for field, found in fields.items():
        numeric = "median_ape" in found
        header += [f"{field}: median error", f"{field}: within 10%"] if numeric else [f"{field}: exact"]
    lines = [header]
    first = [name for name in ORDER if name in metrics]
    for name in dict.fromkeys([*first, *metrics]):
        scores = metrics[name]
        values = [scores["parsed"], scores["stopped"]]
        for field in fields:
            found = scores["fields"][field]
            values += [found["median_ape"], found["within_10pct"]] if "median_ape" in found else [found["exact"]]
        shown = ["–" if value is None else f"{100 * value:.1f}%" for value in values]
        moved = scores.get("moved", scores["rows"])
        subject, _, control = name.partition("_")
        label = name
        if control in ("shuffled", "blank"):
            label = f"{subject}, {'' if moved == scores['rows'] else f'{moved} '}pictures {control}"
        lines.append([label, str(scores["rows"]), *shown])
    return lines


def verdict(metrics: dict[str, Any]) -> str:
    """
    Args:
        metrics (`dict`): With the tests of [`Evaluation.compare`].

    Returns:
        `str`: Two sentences: did it learn, and from the picture?
    """
    subject = "model" if "model" in metrics else "after"
    after, shuffled = metrics[subject], metrics[f"{subject}_shuffled"]
    seen = {field: test for field, test in after["better_than_shuffled"].items() if test["p"] < SURE}
    first = "This is the base model."
    if "better_than_before" in after:
        learned = [field for field, test in after["better_than_before"].items() if test["p"] < SURE]
        first = f"Better than before in {_listed(learned)}." if learned else "No better than before in any field."
    if not shuffled["moved"]:
        return f"{first} Whether it uses the picture is not known: no row could be given another row's."
    if not seen:
        return f"{first} It does not look at the picture: with other rows' pictures it does as well."
    field = max(seen, key=lambda name: seen[name]["difference"])
    name = "within_10pct" if "within_10pct" in after["fields"][field] else "exact"
    shares = [scores["fields"][field][name] for scores in (after, shuffled, metrics["baseline"])]
    own, others, guess = ("–" if share is None else f"{share:.0%}" for share in shares)
    return (
        f"{first} It uses the picture: {field} is right in {own} of the rows, with other rows' pictures in {others} "
        f"(always the commonest: {guess})."
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def read_json(path: Path) -> dict[str, Any]:
    """What a file of a run holds; nothing if it is not there."""
    if not path.is_file():
        return {}
    with _whole(path):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Not by `splitlines`, to which characters within a text end a line too."""
    with _whole(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Names the file that is not JSON."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Score again: make evaluate.") from error


def evaluate(recipe: Recipe) -> Evaluation:
    """
    Scores what the recipe's `output_dir` holds, on the rows that the run scored: before, after, with others' pictures.
    Or, with `model`, `split` or `limit`, any other model and rows; these scores go into `output_dir/scores`.

    Args:
        recipe ([`Recipe`]): The recipe that was trained.

    Returns:
        [`Evaluation`]: The scores; its files are written when all of them are there.

    Raises:
        ValueError: If nothing was trained there, the recipe is not the one that was, or there is no such model or
            split.
    """
    check_machine(recipe)
    scoring, base_name = recipe.scoring, str(recipe.model.model_name_or_path)
    folder = None if scoring.model else trained_folder(recipe)
    if scoring.model:
        find_model(scoring.model, key="model")
    prepared, learned = _prepare(recipe), scoring.split == recipe.script.dataset_train_split
    held_out = prepared.held_out
    if learned:
        if isinstance(prepared.train, Stream):
            raise ValueError(f"`split: {scoring.split}` with `dataset_streaming: true`: add --dataset_streaming false.")
        held_out = prepared.train
    if scoring.limit is not None:
        recipe = replace(recipe, task=replace(recipe.task, eval_rows=scoring.limit))
    evaluation = Evaluation(recipe, prepared.collator.processor, prepared.train, held_out)
    overview = of_scored(prepared.overview, evaluation.rows, learned=learned)
    if asked := [str(value) for value in (scoring.model, scoring.split, scoring.limit) if value is not None]:
        name = re.sub(r"[^\w.-]+", "-", "_".join(asked)).strip("-.")
        evaluation.folder /= f"scores/{name}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:6]}"
        if PartialState().is_main_process:
            evaluation.folder.mkdir(parents=True, exist_ok=True)
            write_whole(evaluation.folder / "data.json", json.dumps(overview, indent=2) + "\n")
    if learned:
        print_once("leakage: these rows are the ones to train on: their scores say what was learned by heart.\n")
    if not scoring.model or not same_model(scoring.model, base_name):
        base = on_device(load_model(recipe))
        evaluation.run("before", base, weights=identity(base_name, base))
        del base
    subject: str
    model: PeftModel | Phi3VForCausalLM
    if folder:
        subject, model, weights = "after", load_trained(recipe, folder), trained_hashes(folder)
    else:
        subject = "model"
        model, evaluation.processor = load_named(recipe, str(scoring.model))
        weights = identity(str(scoring.model), model)
    for name in (subject, f"{subject}_shuffled", f"{subject}_blank"):
        evaluation.run(name, model, weights=weights)
    evaluation.compare(subject)
    evaluation.write()
    return evaluation


def _prepare(recipe: Recipe) -> Prepared:
    """As [`~sft_phi3v.preview.prepare`], with `split` for the test split, unless that is the train split."""
    split = recipe.scoring.split
    if split in (None, recipe.script.dataset_train_split):
        return prepare(recipe)
    script = replace(recipe.script, dataset_test_split=split)
    try:
        return prepare(replace(recipe, script=script, settings=recipe.settings | {"dataset_test_split": split}))
    except ValueError as error:
        raise ValueError(str(error).replace("`dataset_test_split`", "`split`")) from error


def of_scored(overview: dict[str, Any], rows: Sequence[Any], *, learned: bool = False) -> dict[str, Any]:
    """What is to be known of the data, with the `leakage` of the scored rows; all of them, if they are learned."""
    leakage = overview["leakage"]
    if learned or leakage is not None:
        leaked = [*rows] if learned else [row for row in leakage["rows"] if row in {*rows}]
        leakage = {"pictures": len(leaked), "rows": leaked}
    return overview | {"leakage": leakage}


def identity(name: str, model: Phi3VForCausalLM | PeftModel) -> dict[str, str]:
    """What says which weights a model has that was not trained here: its files' sizes and times, or its commit."""
    folder = Path(name)
    if not folder.is_dir():
        return {name: str(base_commit(model.config))}
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.yaml")])
    return {path.name: f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in files}


def short_row(row: Any) -> str:
    """A row's name without the path of its data set, which stands before its number in a mixture."""
    return str(row).rsplit("/", 1)[-1]


def trained_hashes(folder: Path) -> dict[str, str]:
    """[`file_hashes`] of what a run trained: its adapter, or all weights of a full fine-tuning."""
    return file_hashes(folder, "adapter_config.json", "adapter_model.safetensors", "model*.safetensors")


def trained_folder(recipe: Recipe) -> Path:
    """
    Where the trained model lies: the recipe's `adapter`, or its `output_dir`.

    Args:
        recipe ([`Recipe`]): The recipe that was trained.

    Returns:
        `Path`: A folder with an adapter, or with all weights of a full fine-tuning.

    Raises:
        ValueError: If nothing was trained there, or the recipe is not the one that was.
    """
    key, folder = "output_dir", Path(str(recipe.training.output_dir))
    if recipe.publish.adapter:
        key, folder = "adapter", Path(recipe.publish.adapter).expanduser()
    if not [*folder.glob("adapter_config.json"), *folder.glob("model*.safetensors")]:
        raise ValueError(
            f"{key}: {str(folder)!r} holds no trained model (adapter_config.json or model.safetensors). Train "
            f"first: accelerate launch sft_phi3v/run.py {recipe.path}"
        )
    saved = run_file(folder, "recipe.yaml")
    changed = [name for name in differences(saved, recipe) if not RESCORABLE.fullmatch(name)]
    if changed:
        raise ValueError(
            f"{key}: {str(folder)!r} was trained by another recipe (it differs in {', '.join(changed)}): these would "
            f"not be that model's scores. Use its own: {saved}"
        )
    record = folder / "adapter_config.json"
    base = json.loads(record.read_text("utf-8"))["base_model_name_or_path"] if record.is_file() else None
    if base not in (None, recipe.model.model_name_or_path):
        raise ValueError(
            f"{key}: the adapter in {str(folder)!r} was trained on {base!r} (it records so), and the recipe says "
            f"`model_name_or_path: {recipe.model.model_name_or_path}`: it fits no other model. Write that one."
        )
    return folder


def trained_keys(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The recipe as it was trained, whatever the command line says by now, without what names this machine."""
    saved, environment = run_file(folder, "recipe.yaml"), run_file(folder, "environment.json")
    local = json.loads(environment.read_text(encoding="utf-8")).get("local_paths", []) if environment.is_file() else []
    # Not by load_recipe: within a run, another SFTConfig would reset what Accelerate knows of the processes.
    keys = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.is_file() else recipe.dump()
    return public_keys(keys, local)


def public_recipe(recipe: Recipe, folder: Path) -> str:
    """[`trained_keys`] as the text of recipe.yaml."""
    return as_text(trained_keys(recipe, folder), "recipe.yaml")


def answers(rows: Dataset, recipe: Recipe) -> list[str]:
    """The answers of the rows, without touching their pictures."""
    if recipe.task.answer is None:
        return [_text_of(messages[-1]) for messages in rows["messages"]]
    template = Template(recipe.task.answer)
    return [template.render(row) for row in rows.select_columns(list(template.fields))]


def _train_answers(rows: Dataset | Stream, recipe: Recipe) -> Iterable[str]:
    if isinstance(rows, Dataset):
        return answers(rows, recipe)
    if len(rows) > STREAMED:
        print_once(f"baseline: of {STREAMED:,} of the {len(rows):,} rows to train on.")
    return islice(chain.from_iterable(answers(some, recipe) for some in rows.texts()), STREAMED)


def main(argv: list[str] | None = None) -> None:
    """`python -m sft_phi3v.evaluation RECIPE [--key value …]`"""
    try:
        evaluation = evaluate(load_recipe(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        raise SystemExit(f"error: {error}" if PartialState().is_main_process else 1) from None
    if PartialState().is_main_process:
        found = [evaluation.table(), verdict(evaluation.metrics), evaluation.worst(), f"scores: {evaluation.folder}"]
        print("\n\n".join(found))


if __name__ == "__main__":
    main()
