"""Rows become examples: a picture, a question and an answer, in the conversational format of TRL and processors.

With the recipe's `answer: "Product: {title}, Full Price: {full_price}"`, the row

```python
{"image": <PIL>, "title": "Check scarf", "full_price": 450}
```

becomes the example

```python
{"images": [<PIL>],
 "messages": [
     {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown in this image?"}]},
     {"role": "assistant", "content": [{"type": "text", "text": "Product: Check scarf, Full Price: 450"}]}],
 "row": 0}
```

and the same template read backwards turns a completion into `{"title": ..., "full_price": ...}`, so that scores need
no second description of the format. Rows that hold `messages` already keep them. No tokenizer and no model in here.
"""

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    LargeList,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.parquet.parquet import Parquet
from trl.scripts.utils import DatasetConfig

from sft_phi3v.recipe import MARKUP, Recipe, TaskArguments

logger = logging.getLogger(__name__)

ROW = "__row__"  # column with a row's position in its source, so that an error can name it after any shuffling
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tar": "webdataset"}
_NO_TABLES = ("metadata", "dataset_info", "dataset_infos", "dataset_dict", "state")
_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
_URL = re.compile(r"https?://")
_TEXT = (Value("string"), Value("large_string"))
_PLAIN = r"^-?(?:0|[1-9]\d{0,17})(?:\.\d+)?(?:e[-+]\d+)?$"  # 00123 and 1E5 are codes
_CURRENCIES = (
    "AED ARS AUD BRL CAD CHF CLP CNY COP CZK DKK EGP EUR GBP HKD HUF IDR ILS INR JPY KRW KWD MXN MYR NOK NZD PHP PLN "
    "QAR RON RUB SAR SEK SGD THB TRY TWD UAH USD VND ZAR"
)
_CURRENCY = rf"(?:[A-Z]{{0,2}}[$¢-¥฿\u20a0-\u20cf]|{_CURRENCIES.replace(' ', '|')})"  # $, US$, €, EUR
_NUMBER = re.compile(
    rf"(?:{_CURRENCY}\s?)?([-+]?(?:[1-9]\d{{0,2}}(?:,\d{{3}})+|[1-9]\d*|0)?(?:\.\d*)?)(?:\s?{_CURRENCY})?"
)


def load_splits(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """
    Load the rows that a recipe trains on and the held-out rows it is scored on.

    The data set is a Hub id, a folder of Parquet, JSONL, CSV or WebDataset files, a folder of pictures (with
    `metadata.csv` or `.jsonl`, or one folder per class, whose name becomes the column `label`), a `save_to_disk` folder
    or one local file; or several of these (`datasets`). Picture paths in a table count from its folder, or else from
    the working directory.

    Args:
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `dataset_*`, `datasets`, `image_column`, `held_out` and `seed` are
            read.

    Returns:
        `tuple[Dataset, Dataset]`:
            Train rows and held-out rows, with the source's columns and [`ROW`]. Without a test split in the source (in
            each of several) the held-out rows are drawn by `seed` alone, so that every process and machine draws the
            same. Prints which.

    Raises:
        ValueError: No such data set, split, column or picture file; pictures that are URLs; no rows.
    """
    check_prepared(recipe)
    parts = [load_part(entry, recipe) for entry in data_sets(recipe)]
    train = join([part.train for part in parts], recipe, counts([len(part.train) for part in parts], recipe))
    if tests := tests_of(parts):
        say_held_out(parts, recipe, None)
        return train, join(tests, recipe)
    count = held_out_count(len(train), recipe)
    drawn = train.train_test_split(test_size=count, seed=recipe.training.seed)
    say_held_out(parts, recipe, f"{count} of the {len(train)} rows of {where_from(recipe)}")
    return drawn["train"], drawn["test"]


def load_sizes(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """
    As [`load_splits`], from a table that holds the sizes of pictures in their place.

    Args:
        recipe ([`~sft_phi3v.recipe.Recipe`]):
            Its `dataset_name` is the table, a .csv, .jsonl or .parquet file. The columns `width` and `height` are in
            pixels, lists where a row has several pictures (in a CSV as in JSON: `[600, 800]`); the others are those
            that `prompt` and `answer` read.

    Returns:
        `tuple[Dataset, Dataset]`: Train rows and held-out rows, which are the same as those of the pictures' data set
            where that has as many rows in the same order and no test split.

    Raises:
        ValueError: No such file, column or rows; a size that is not a whole number of pixels, with its row.
    """
    (entry,) = data_sets(recipe)
    if not Path(entry.path).expanduser().is_file():
        raise ValueError(f"`sizes` is {entry.path!r}: no such file (paths count from {Path.cwd()}).")
    splits, _ = _read_entry(entry, recipe, "sizes")
    rows = splits[entry.split]
    if not len(rows):
        raise ValueError(f"`sizes` is {entry.path!r}: it has no rows.")
    if missing := [name for name in ("width", "height") if name not in rows.column_names]:
        raise ValueError(
            f"`sizes` is {entry.path!r}, and there is no column {' and no '.join(missing)}, expected width and height "
            f"in pixels beside the columns that `prompt` and `answer` read: {', '.join(rows.column_names)}."
        )
    sizes = enumerate(zip(rows["width"][:], rows["height"][:], strict=True))  # [:]: at once, not row by row
    pictures = [_sizes(*both, f"`sizes` is {entry.path!r}: row {row}") for row, both in sizes]
    column = recipe.task.image_column
    rows = rows.remove_columns([name for name in {column, "images"} if name in rows.column_names])
    rows = as_rows(rows, entry, recipe, None)
    rows = rows.add_column(column, pictures, feature=List({"width": Value("int64"), "height": Value("int64")}))
    count = held_out_count(len(rows), recipe)
    drawn = rows.train_test_split(test_size=count, seed=recipe.training.seed)
    return drawn["train"], drawn["test"]


def _sizes(width: Any, height: Any, where: str) -> list[dict[str, int]]:
    """The pictures of a row, as [`open_picture`] takes them."""
    lists = []
    for name, value in (("width", width), ("height", height)):
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            found = value
        found = found if isinstance(found, list) else [found]
        if not all(isinstance(one, int | float) and one == int(one) and one > 0 for one in found):
            raise ValueError(f"{where}: {name} is {value!r}, expected whole numbers of pixels above 0.")
        lists.append([int(one) for one in found])
    if len(lists[0]) != len(lists[1]):
        raise ValueError(f"{where} has {len(lists[0])} in width and {len(lists[1])} in height, expected as many.")
    return [{"width": one, "height": other} for one, other in zip(*lists, strict=True)]


def check_prepared(recipe: Recipe) -> None:
    """
    Refuse a recipe whose `source` was not prepared yet, or was downscaled for fewer crops than the recipe has.

    Args:
        recipe ([`~sft_phi3v.recipe.Recipe`]): The recipe.

    Raises:
        ValueError: Says what to type.
    """
    name = str(recipe.script.dataset_name)
    if recipe.prepare.source is not None and not Path(name).expanduser().exists():
        raise ValueError(
            f"`dataset_name` {name!r} is to be made of `source` {recipe.prepare.source!r} first:\n"
            f"  python -m sft_phi3v.prepare {recipe.typed}\nor let the run do it: --prepare true"
        )
    summary = Path(name).expanduser() / "summary.json"
    if (Path(name).expanduser() / "manifest.parquet").is_file() and summary.is_file():
        crops = json.loads(summary.read_text(encoding="utf-8"))["downscaled_for_num_crops"]
        if crops is not None and (recipe.task.num_crops is None or recipe.task.num_crops > crops):
            raise ValueError(
                f"`num_crops` is {recipe.task.num_crops}, and the pictures of `dataset_name` {name!r} were downscaled "
                f"for {crops}. Write that, or prepare them again."
            )


def to_examples(dataset: Dataset, recipe: Recipe) -> Dataset:
    """
    View rows as examples. Lazy: a row's pictures are opened when it is read, and decoded when their pixels are needed.

    Args:
        dataset (`Dataset`): Rows from [`load_splits`].
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `prompt`, `answer` and `image_column` are read.

    Returns:
        `Dataset`:
            Rows that read as `{"images": list of PIL pictures, "messages": list of turns, "row": int}`. Contents are
            always lists of parts; a row without pictures has `"images": []`.

    Raises:
        ValueError: When a row is read that cannot become an example; names the row.
    """
    if ROW not in dataset.column_names:
        dataset = dataset.add_column(ROW, list(range(len(dataset))))
    reader = Reader.of(dataset, recipe)
    return reader.undecoded(dataset).with_transform(reader)


@dataclass(frozen=True, slots=True)
class Pictures:
    """
    What [`check_rows`] knows of a row's pictures.

    Args:
        digests (`tuple[bytes, ...]`): Of their files, by which equal ones are found; none where there are only sizes.
        sizes (`tuple[tuple[int, int], ...]`): Width and height of each, upright, in pixels.
    """

    digests: tuple[bytes, ...]
    sizes: tuple[tuple[int, int], ...]


def sized_examples(dataset: Dataset, recipe: Recipe, pictures: Sequence[Pictures]) -> Iterator[list[dict[str, Any]]]:
    """
    View rows as examples whose pictures have a size and no pixels. No picture file is read again.

    Args:
        dataset (`Dataset`): Rows from [`load_splits`] or [`load_sizes`].
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `prompt`, `answer` and `image_column` are read.
        pictures (sequence of [`Pictures`]): Of each row, from [`check_rows`].

    Returns:
        `Iterator[list[dict]]`: As [`to_examples`], some at a time.
    """
    reader, position = Reader.of(dataset, recipe), iter(pictures)
    columns = [name for name in reader.columns if name != reader.column]
    for batch in dataset.select_columns([*columns, ROW]).with_format(None).iter(batch_size=64):
        examples = []
        for row, found in zip(_rows(batch), position, strict=False):
            if reader.column:
                row[reader.column] = [{"width": width, "height": height} for width, height in found.sizes]
            examples.append(reader.example(row))
        yield examples


def check_rows(dataset: Dataset, recipe: Recipe) -> list[Pictures]:
    """
    Check every row before paying for a GPU: fields filled in, turns in order, picture files there and readable.

    Of PNG and JPEG it reads the file and no pixels (some 100,000 rows in a minute). Logs a warning for answers
    that the template cannot read back, since they cannot be scored, and for text that looks like Phi-3's markup.

    Args:
        dataset (`Dataset`): Rows from [`load_splits`].
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `prompt`, `answer` and `image_column` are read.

    Returns:
        `list[Pictures]`: Of each row the digests and sizes of its pictures.

    Raises:
        ValueError: Names the first rows that cannot be used, each with its reason, and how many there are.
    """
    if not len(dataset):
        raise ValueError(f"{recipe.data}: no rows to check.")
    if ROW not in dataset.column_names:
        dataset = dataset.add_column(ROW, list(range(len(dataset))))
    reader = Reader.of(dataset, recipe)
    found: list[Pictures] = []
    problems: list[str] = []
    unread: list[int | str] = []
    marked: list[int | str] = []
    for batch in reader.undecoded(dataset).iter(batch_size=256):
        for row in _rows(batch):
            try:
                parts = [part for turn in reader.messages(row) for part in turn["content"]]
                if any(MARKUP.search(part.get("text", "")) for part in parts):
                    marked.append(row[ROW])
                checked = [_check_picture(picture) for picture in reader.pictures(row)]
                digests = tuple(digest for digest, _ in checked if digest)
                found.append(Pictures(digests, tuple(size for _, size in checked)))
                if reader.answer and not reader.answer.reads_back(row):
                    unread.append(row[ROW])
            except ValueError as error:
                problems.append(f"row {row[ROW]}: {error}")
    if problems:
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        opening = f"{recipe.data} has rows that cannot be used:"
        raise ValueError("\n".join([opening, *problems[:5], *more]))
    if unread:
        logger.warning(
            "%d of %d answers do not read back through `answer` (first: row %s): a field holds the text that ends "
            "another. They are trained on, but their fields cannot be scored",
            *(len(unread), len(dataset), unread[0]),
        )
    if marked:
        logger.warning(
            "%d of %d rows hold markup such as <|end|> or <|image_1|> (first: row %s): it is learned as plain text",
            *(len(marked), len(dataset), marked[0]),
        )
    return found


class Template:
    """
    A format string over the columns of a row that can be read backwards.

    Args:
        text (`str`): Such as `"Product: {title}, Full Price: {full_price:.2f}"`. `{{` and `}}` are braces.
        key (`str`, *optional*, defaults to `"answer"`): The recipe key it comes from, for errors.

    Attributes:
        fields (`tuple[str, ...]`): The columns it reads, in order.

    Example:

    ```python
    >>> template = Template("Product: {title}, Full Price: {full_price}")
    >>> template.render({"title": "Scarf, red", "full_price": 450})
    'Product: Scarf, red, Full Price: 450'
    >>> template.parse(" Product: Scarf, red, Full Price: 450\\n")
    {'title': 'Scarf, red', 'full_price': '450'}
    ```
    """

    def __init__(self, text: str, *, key: str = "answer") -> None:
        self.text, self.key = text.strip(), key  # a YAML block ends in a line break that no completion has
        try:
            pieces = list(Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"`{key}` is {text!r}: {error}. Write {{{{ and }}}} for braces that are text.") from None
        self._literals, self._slots = [""], list[tuple[str, str]]()  # a literal, then a slot and a literal at a time
        for literal, name, spec, _ in pieces:
            self._literals[-1] += literal
            if name is not None:
                self._slots.append((name, spec or ""))
                self._literals.append("")
        self.fields = tuple(dict.fromkeys(name for name, _ in self._slots))
        if "" in self.fields or any(conversion for *_, conversion in pieces):
            raise ValueError(f"`{key}` is {text!r}, expected fields such as {{title}} or {{price:.2f}}: column names.")
        if "" in self._literals[1:-1]:
            raise ValueError(f"`{key}` is {text!r}: two fields touch. Put text between them, to read them back.")
        if key == "answer" and not self.fields:
            raise ValueError(f"`answer` is {text!r}, the same for every row: write columns in braces, as in {{title}}.")

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise a `ValueError` that names the columns there are, if a field is none of them."""
        names = [name for name in columns if name != ROW]
        for name in self.fields:
            if name not in names:
                raise ValueError(f"`{self.key}` reads {{{name}}}, and there is no such column: {', '.join(names)}.")

    def render(self, row: Mapping[str, Any]) -> str:
        """
        Fill in the fields.

        Args:
            row (`Mapping[str, Any]`): Columns and their values.

        Returns:
            `str`: The text.

        Raises:
            ValueError: A field is empty, or its value does not fit its format.
        """
        self.check_columns(row)
        shown = [self._show(row[name], name, spec) for name, spec in self._slots]
        return "".join(literal + text for literal, text in zip(self._literals, [*shown, ""], strict=True))

    def _show(self, value: Any, name: str, spec: str) -> str:
        if value is None or value != value or not str(value).strip():
            raise ValueError(f"column {name!r}, which `{self.key}` reads, is empty")
        try:
            return format(value, spec)
        except (TypeError, ValueError) as error:
            raise ValueError(f"column {name!r} holds {value!r}, which {{{name}:{spec}}} cannot show: {error}") from None

    def parse(self, text: str) -> dict[str, str] | None:
        """
        Read a completion backwards.

        Args:
            text (`str`): A completion.

        Returns:
            `dict[str, str]` or `None`:
                Each field's text without the space around it ([`number`] makes a number of it), `None` where the text
                has not the template's form.
        """
        text, found = text.strip(), dict[str, str]()
        if not text.endswith(self._literals[-1]):
            return None
        end = len(text) - len(self._literals[-1])
        # From the right, so that a title that holds ", Category: " itself still ends at the last one.
        for index, (name, _) in reversed(list(enumerate(self._slots))):
            literal = self._literals[index]
            start = text.rfind(literal, 0, max(end - 1, 0)) if index else text.find(literal, 0, len(literal))
            value = text[start + len(literal) : end].strip()
            if start < 0 or not value or found.setdefault(name, value) != value:
                return None
            end = start
        return {name: found[name] for name in self.fields} if end == 0 else None

    def reads_back(self, row: Mapping[str, Any]) -> bool:
        """Whether `parse(render(row))` gives the row's own values."""
        shown = {name: self._show(row[name], name, spec).strip() for name, spec in self._slots}
        return self.parse(self.render(row)) == shown


def number(text: str) -> float | None:
    """
    Read a number as people write prices.

    Args:
        text (`str`): Such as `"1290"`, `"$1,290.00"` or `"1,290 USD"`.

    Returns:
        `float` or `None`: 1290.0 for these three, `None` for text that is not a number and nothing else (`"12,50"`,
            `"3 for 2"`, `"size 38"`, `"00123"`).
    """
    match = _NUMBER.fullmatch(text.strip())
    digits = match[1].replace(",", "") if match else ""
    return float(digits) if re.search(r"\d", digits) else None


@dataclass(frozen=True)
class Reader:
    """
    What turns the rows of one data set into examples. A class, not a closure: other processes get it pickled.

    Args:
        prompt ([`Template`]): The question.
        answer ([`Template`], *optional*): The answer; `None` for rows that hold `messages`.
        column (`str`, *optional*): Where the pictures are; `None` for rows that have none.
    """

    prompt: Template
    answer: Template | None
    column: str | None

    @classmethod
    def of(cls, dataset: Dataset, recipe: Recipe) -> "Reader":
        columns, task = [name for name in dataset.column_names if name != ROW], recipe.task
        prompt = Template(task.prompt, key="prompt")
        if "messages" in columns:
            for key in ("prompt", "answer"):
                if getattr(task, key) != getattr(TaskArguments, key):
                    raise ValueError(f"`{key}` is given and the rows hold `messages`, which say it. Remove `{key}`.")
            column = next((name for name in ("images", task.image_column) if name in columns), None)
            return cls(prompt, None, column)
        if task.answer is None:
            raise ValueError(
                "`answer` is missing: say what is to be learned from a row, such as 'Product: {title}', or give rows "
                f"with `messages`. The columns are {', '.join(columns)}."
            )
        answer = Template(task.answer, key="answer")
        for template in (prompt, answer):
            template.check_columns(columns)
        if task.image_column not in columns:
            there = f"there is no such column: {', '.join(columns)}.{_urls(dataset, recipe)}"
            raise ValueError(f"`image_column` is {task.image_column!r}, and {there}")
        return cls(prompt, answer, task.image_column)

    @property
    def columns(self) -> list[str]:
        """The columns that examples are made of."""
        return list(dict.fromkeys([*self.answer_columns, *self.prompt.fields, *([self.column] if self.column else [])]))

    @property
    def answer_columns(self) -> list[str]:
        """The columns that answers are made of."""
        return ["messages"] if self.answer is None else list(self.answer.fields)

    def undecoded(self, dataset: Dataset) -> Dataset:
        """The columns needed, pictures as `{"bytes", "path"}`: decoding them in here, an error can name the row."""
        dataset = dataset.select_columns([*self.columns, ROW]).with_format(None)
        if self.column:
            feature, bare = dataset.features[self.column], Image(decode=False)
            if isinstance(getattr(feature, "feature", feature), Image):  # and not sizes
                dataset.info.features[self.column] = List(bare) if isinstance(feature, List | LargeList) else bare
        return dataset

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        examples = [self.example(row) for row in _rows(batch)]
        return {key: [example[key] for example in examples] for key in ("images", "messages", "row")}

    def example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The example that an undecoded row is; a `ValueError` that names the row if it cannot be one."""
        try:
            messages = self.messages(row)
            return {"images": [open_picture(one) for one in self.pictures(row)], "messages": messages, "row": row[ROW]}
        except ValueError as error:
            raise ValueError(f"row {row[ROW]}: {error}") from error

    def pictures(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        value = row[self.column] if self.column else None
        pictures = value if isinstance(value, list) else [] if value is None else [value]
        if (self.answer and not pictures) or any(picture is None for picture in pictures):
            raise ValueError(f"no picture in column {self.column!r}")
        return pictures

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The row's turns, every content a list of parts."""
        pictures = len(self.pictures(row))
        if self.answer:
            question, answer = self.prompt.render(row), self.answer.render(row)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return conversation(turns, pictures)
        messages = conversation(row["messages"] or [], pictures)
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("the last turn is not the assistant's: there is nothing to learn after it")
        return messages


def conversation(turns: Sequence[Mapping[str, Any]], pictures: int) -> list[dict[str, Any]]:
    """
    Turns in one form, every content a list of parts. Where all contents are strings, the pictures stand in front of
    the first question, as in TRL.

    Args:
        turns (sequence of `Mapping`): Turns in TRL's format.
        pictures (`int`): How many pictures come with them.

    Returns:
        `list[dict]`: The turns.

    Raises:
        ValueError: If a role or a part is unknown, an answer is empty, or the pictures have no place.
    """
    strings = all(isinstance(turn.get("content"), str) for turn in turns)
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role, content = turn.get("role"), turn.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"a turn's role is {role!r}, expected system, user or assistant")
        parts = [_text(content)] if isinstance(content, str) else [_part(part) for part in content or []]
        if strings and role == "user" and not any(message["role"] == "user" for message in messages):
            parts = [*({"type": "image"} for _ in range(pictures)), *parts]
        if role == "assistant" and not any(part.get("text") for part in parts):
            raise ValueError("an assistant turn is empty")
        messages.append({"role": role, "content": parts})
    holders = [turn["role"] for turn in messages for part in turn["content"] if part["type"] == "image"]
    if set(holders) - {"user"}:
        raise ValueError("a picture stands in a turn that is not the user's")
    if len(holders) != pictures:
        raise ValueError(f"{len(holders)} image parts in `messages` and {pictures} pictures")
    return messages


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    filled = {key: value for key, value in part.items() if value is not None}  # Arrow gives every part every key
    if filled.get("type") == "text" and isinstance(filled.get("text"), str):
        return _text(filled["text"])
    if set(filled) == {"type"} and filled["type"] == "image":
        return filled
    raise ValueError(f"a part is {filled}, expected {{'type': 'text', 'text': ...}} or {{'type': 'image'}}")


def _rows(batch: Mapping[str, list[Any]]) -> Iterable[dict[str, Any]]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _file(picture: dict[str, Any]) -> io.BufferedReader | io.BytesIO:
    return Path(picture["path"]).open("rb") if picture["bytes"] is None else io.BytesIO(picture["bytes"])


class Sized(PIL.Image.Image):
    """A picture of which only the size is known: it counts as many tokens as the picture itself, and has no pixels."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self._mode, self._size = "RGB", (width, height)


def open_picture(picture: dict[str, Any]) -> PIL.Image.Image:
    """The picture, upright. Its size is known now; its pixels are decoded when they are first asked for."""
    if "width" in picture:
        return Sized(picture["width"], picture["height"])
    try:
        with _file(picture) as file:
            image = PIL.Image.open(io.BytesIO(file.read()))
        # As `datasets` does: cameras store how they were held, and the model should not see a coat lying down.
        lying = "exif" in image.info and image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1
        return PIL.ImageOps.exif_transpose(image) if lying else image  # which would decode and copy any picture
    except (OSError, SyntaxError, ValueError, TypeError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"the picture{_named(picture)} cannot be read: {error}") from error


def _check_picture(picture: dict[str, Any]) -> tuple[bytes, tuple[int, int]]:
    """
    The digest of a picture's file, and the size of the picture, upright; a `ValueError` if the file is not whole.
    Decoded only where nothing less can tell.
    """
    if "width" in picture:
        return b"", (picture["width"], picture["height"])
    try:
        with _file(picture) as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
            file.seek(0)
            image = PIL.Image.open(file)
            lying = "exif" in image.info and image.getexif().get(PIL.ExifTags.Base.Orientation) in (5, 6, 7, 8)
            size = (image.height, image.width) if lying else image.size
            image.verify()  # checks every part of a PNG, and of the other formats next to nothing
            whole = image.format == "PNG"
            if image.format == "JPEG":  # its end mark cannot occur in pixels
                file.seek(-min(64, file.seek(0, io.SEEK_END)), io.SEEK_END)
                whole = b"\xff\xd9" in file.read()
            if not whole:
                file.seek(0)
                PIL.Image.open(file).load()
            return digest, size
    except FileNotFoundError:
        raise ValueError(f"the picture {picture['path']} does not exist") from None
    except (OSError, SyntaxError, ValueError, TypeError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"the picture{_named(picture)} cannot be read: {error}") from error


def _named(picture: Mapping[str, Any]) -> str:
    return f" {picture['path']}" if picture.get("path") else ""


def _urls(dataset: Dataset, recipe: Recipe) -> str:
    """A sentence about the columns that hold URLs, where pictures are looked for in vain."""
    texts = [name for name, kind in dataset.features.items() if kind in _TEXT]
    names = [name for name in texts if _URL.match(dataset[name][0] or "")]
    return f" Column {names[0]!r} holds URLs. {_download(names[0], recipe)}" if names else ""


def _download(column: str, recipe: Recipe) -> str:
    """What to do about a column of URLs."""
    if recipe.mixture.datasets:
        return "Nothing is downloaded while training: prepare that data set first, with a recipe of its own."
    return (
        f"Nothing is downloaded while training. Write into {recipe.path}\n  source: {recipe.script.dataset_name}\n"
        f"  source_image_column: {column}\n  dataset_name: data/NAME\n"
        f"and type: python -m sft_phi3v.prepare {recipe.path}"
    )


def data_sets(recipe: Recipe) -> list[DatasetConfig]:
    """The data sets that a recipe names: its `datasets`, or else `dataset_name` alone."""
    script = recipe.script
    alone = DatasetConfig(str(script.dataset_name), script.dataset_config, split=script.dataset_train_split)
    return recipe.mixture.datasets or [alone]


def counts(sizes: Sequence[int], recipe: Recipe) -> list[int]:
    """
    How many rows of each data set a mixture takes, its first ones.

    Args:
        sizes (`Sequence[int]`): How many there are.
        recipe ([`~sft_phi3v.recipe.Recipe`]): The `fraction` of each of its `datasets` is read as TRL reads it: its
            share in the mixture, which is as large as it can be without a row in it twice.

    Returns:
        `list[int]`: Numbers of rows; without fractions, all of them.
    """
    fractions = [entry.fraction for entry in data_sets(recipe)]
    if None in fractions:
        return list(sizes)
    weights = [fraction / sum(fractions) for fraction in fractions]
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [round(weight * total) for weight in weights]


@dataclass(frozen=True)
class Part:
    """
    One data set that a recipe names.

    Args:
        train (`Any`): Its train rows: a `Dataset`, or what else stands for them.
        test (`Dataset`, *optional*): Its test rows, if it has such a split.
        unused (`list[str]`): Its other splits.
    """

    train: Any
    test: Dataset | None
    unused: list[str]


def load_part(entry: DatasetConfig, recipe: Recipe) -> Part:
    """Load the train and the test split of one data set; a `ValueError` if it cannot be read or used."""
    splits, folder = _read_entry(entry, recipe)
    train, test = split_names(list(splits), entry, recipe)
    for name in (train, test):
        if name and not len(splits[name]):
            raise ValueError(f"{entry.path} has no rows in split {name!r}.")
    return Part(
        as_rows(splits[train], entry, recipe, folder),
        as_rows(splits[test], replace(entry, split=test), recipe, folder) if test else None,
        [name for name in splits if name not in (train, test)],
    )


def split_names(there: Sequence[str], entry: DatasetConfig, recipe: Recipe) -> tuple[str, str | None]:
    """The train and, if there is one, the test split among those `there`; a `ValueError` if one is missing."""
    train, test = entry.split, recipe.script.dataset_test_split
    asked = [("split" if recipe.mixture.datasets else "dataset_train_split", train)]
    if "dataset_test_split" in recipe.settings:  # TRL's default name need not exist, a name the user wrote must
        asked.append(("dataset_test_split", test))
    for key, name in asked:
        if name not in there:
            raise ValueError(f"`{key}` is {name!r}; {entry.path} has the splits {', '.join(there)}.")
    if test == train:
        raise ValueError(f"`dataset_test_split` is the train split {train!r}: scores on learned rows say nothing.")
    return train, test if test in there else None


def tests_of(parts: Sequence[Part]) -> list[Dataset]:
    """The test rows of each data set; none unless all have some."""
    tests = [part.test for part in parts if part.test is not None]
    return tests if len(tests) == len(parts) else []


def where_from(recipe: Recipe) -> str:
    """Where train rows are from, in words."""
    return "the mixture" if recipe.mixture.datasets else f"split {recipe.script.dataset_train_split!r}"


def held_out_count(total: int, recipe: Recipe) -> int:
    """How many of `total` train rows are held out; a `ValueError` if that leaves none."""
    held_out = recipe.task.held_out
    count = int(held_out) if held_out >= 1 else max(1, round(held_out * total))
    if count >= total:
        raise ValueError(
            f"`held_out` is {held_out}, which leaves no train rows: {recipe.data} has {total} rows in "
            f"{where_from(recipe)}. Hold out fewer, or name a `dataset_test_split`."
        )
    return count


def say_held_out(parts: Sequence[Part], recipe: Recipe, drawn: str | None) -> None:
    """Prints what is held out: rows that were `drawn` from the train rows, or else the test split."""
    from accelerate import PartialState  # brings torch, which processes that only prepare data can do without

    test, unused = recipe.script.dataset_test_split, list[str]()
    for entry, part in zip(data_sets(recipe), parts, strict=True):
        left = [*part.unused, test] if drawn and part.test else part.unused
        unused += [f"{entry.path}: {name}" if recipe.mixture.datasets else name for name in left]
    what = f"{drawn}, seed {recipe.training.seed}" if drawn else f"split {test!r}"
    rest = f"; not used: {', '.join(unused)} (to score on one, name it: `dataset_test_split`)" if unused else ""
    if PartialState().is_main_process:
        print(f"held out: {what}{rest}", flush=True)


def join(parts: Sequence[Dataset], recipe: Recipe, sizes: Sequence[int] | None = None) -> Dataset:
    """
    Make one data set of several. TRL's `get_dataset` would join them before their pictures are of one kind.

    Args:
        parts (`Sequence[Dataset]`): Rows of each of [`data_sets`].
        recipe ([`~sft_phi3v.recipe.Recipe`]): Says which columns examples are made of; the others are left out.
        sizes (`Sequence[int]`, *optional*): How many rows of each, the first ones.

    Returns:
        `Dataset`: All rows; if there is only one part, this with all of its columns.

    Raises:
        ValueError: A data set lacks a column, or two differ in the type of one.
    """
    if sizes is not None:
        parts = [
            rows if size == len(rows) else rows.select(range(size)) for rows, size in zip(parts, sizes, strict=True)
        ]
    if len(parts) == 1:
        return parts[0]
    chosen, kinds = [], dict[str, tuple[str, Any]]()
    for entry, rows in zip(data_sets(recipe), parts, strict=True):
        try:
            rows = rows.select_columns([*Reader.of(rows, recipe).columns, ROW])
        except ValueError as error:
            hint = "Its `columns` say which of its columns are read."
            raise ValueError(f"`datasets`, {entry.path}: {error} {hint}") from None
        for name, kind in rows.features.items():
            path, first = kinds.setdefault(name, (entry.path, kind))
            if kind != first:
                raise ValueError(
                    f"`datasets`: column {name!r} is {first} in {path} and {kind} in {entry.path}. Make them one type, "
                    "or leave a data set out."
                )
        chosen.append(rows)
    return concatenate_datasets(chosen)


def read_source(name: str, recipe: Recipe, *, key: str = "dataset_name") -> tuple[DatasetDict, Path | None]:
    """
    Read every split of whatever holds rows. They stay on the disk, mapped into memory, however many they are.

    Args:
        name (`str`): A Hub id, a folder or a file, as for [`load_splits`].
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `dataset_config` and the names of its splits are read.
        key (`str`, *optional*, defaults to `"dataset_name"`): The recipe key that `name` comes from, for errors.

    Returns:
        `tuple[DatasetDict, Path | None]`: The splits, and the folder that picture paths in them count from (`None`: a
        Hub id).

    Raises:
        ValueError: There is no such source, or it cannot be read.
    """
    script = recipe.script
    return _read_entry(DatasetConfig(name, script.dataset_config, split=script.dataset_train_split), recipe, key)


def _read_entry(entry: DatasetConfig, recipe: Recipe, key: str | None = None) -> tuple[DatasetDict, Path | None]:
    """As [`read_source`], for one of TRL's `datasets`."""
    with reading(entry, recipe, key):
        path = _local(entry)
        if path is None:
            loaded = load_dataset(entry.path, entry.name, data_dir=entry.data_dir, data_files=entry.data_files)
            return _chosen(_webdataset(loaded), entry), None
        if path.is_file():
            return _chosen(_read({entry.split: [str(path)]}), entry), path.parent
        if _is_saved(path):
            saved = load_from_disk(str(path))
            return _chosen(saved if isinstance(saved, DatasetDict) else DatasetDict({entry.split: saved}), entry), path
        files = _tables(path, entry.split, recipe.script.dataset_test_split)
        return _chosen(_read(files) if files else load_dataset(str(path)), entry), path


def parquet_files(entry: DatasetConfig, recipe: Recipe) -> tuple[dict[str, list[str]], Path | None] | None:
    """
    Find the files of a data set that can be streamed.

    Args:
        entry (`DatasetConfig`): One of [`data_sets`].
        recipe ([`~sft_phi3v.recipe.Recipe`]): Names the test split.

    Returns:
        `tuple[dict[str, list[str]], Path | None]`, *optional*:
            Parquet files by split, and the folder that picture paths in them count from. `None` if it is on this
            machine and not Parquet.

    Raises:
        ValueError: There is no such data set, or it is on the Hub and not Parquet.
    """
    with reading(entry, recipe):
        path = _local(entry)
        files: dict[str, list[str]] = {}
        if path is not None and path.is_file():
            files = {entry.split: [str(path)]}
        elif path is not None and not _is_saved(path):
            files = _tables(path, entry.split, recipe.script.dataset_test_split)
        if files or (path is not None and _is_saved(path)):
            return (
                (files, path) if all(name.endswith(".parquet") for names in files.values() for name in names) else None
            )
        builder = load_dataset_builder(entry.path, entry.name, data_dir=entry.data_dir, data_files=entry.data_files)
        if isinstance(builder, Parquet):
            return {str(split): list(map(str, names)) for split, names in builder.config.data_files.items()}, path
        if path is None:
            raise ValueError(
                f"`dataset_streaming` reads Parquet from the Hub, and this is {builder.dataset_name}. Prepare it "
                "(`source`), or remove `dataset_streaming`"
            )
        return None


def _local(entry: DatasetConfig) -> Path | None:
    """The file or folder that a data set is; `None` for a Hub id, or for one of `datasets`' own readers."""
    path = Path(entry.path).expanduser()
    if path.exists() and entry.data_dir is None and entry.data_files is None:
        if path.is_file() and path.suffix not in _BUILDERS:
            raise ValueError(f"expected a file of {', '.join(_BUILDERS)}, or a folder")
        return path
    if entry.path.count("/") > 1 or entry.path.startswith(("/", ".", "~")) or path.suffix in _BUILDERS:
        raise ValueError(f"no such file or folder (paths count from {Path.cwd()})")
    return None


def _is_saved(path: Path) -> bool:
    return any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))


def _chosen(splits: DatasetDict, entry: DatasetConfig) -> DatasetDict:
    """The splits in the columns that one of `datasets` asks for."""
    for split, rows in splits.items() if entry.columns is not None else ():
        if missing := [name for name in entry.columns if name not in rows.column_names]:
            raise ValueError(f"`columns`: there is no {', '.join(missing)} in {', '.join(rows.column_names)}")
        splits[split] = rows.select_columns(entry.columns)
    return splits


@contextmanager
def reading(entry: DatasetConfig, recipe: Recipe, key: str | None = None) -> Iterator[None]:
    """Turns what goes wrong while a data set is read into a `ValueError` that names it, and the key it comes from."""
    key, name = key or ("datasets" if recipe.mixture.datasets else "dataset_name"), entry.path
    try:
        yield
    except DatasetNotFoundError:
        raise ValueError(
            f"`{key}` is {name!r}: there is no such file or folder in {Path.cwd()}, and the Hub has no such "
            "data set, or not for you (private and gated ones need `hf auth login`)."
        ) from None
    except ConnectionError as error:
        raise ValueError(
            f"`{key}` is {name!r}: there is no such file or folder in {Path.cwd()}, so the data set of that "
            "name would be fetched from the Hugging Face Hub, which cannot be reached from here. Where there is a "
            f"network: hf download {name} --repo-type dataset --local-dir FOLDER, then point `{key}` at FOLDER "
            "(or `source`, where its rows hold URLs, and prepare it)."
        ) from error
    except (DatasetGenerationError, ValueError, FileNotFoundError) as error:
        reason = "it has no rows" if "corresponds to no data" in str(error) else error.__cause__ or error
        raise ValueError(f"`{key}` is {name!r}: {reason}") from error


def _tables(folder: Path, train: str, test: str) -> dict[str, list[str]]:
    """
    The table files at the top of a folder (or in its `data/`), by split; none where the folder holds only pictures.

    `datasets` goes by the most frequent kind of file, so that 1,000 pictures beside a `rows.csv` would hide it.
    """
    places = [folder, folder / "data"]
    if (folder / "manifest.parquet").is_file():  # `prepare` wrote it, with a line for each row that it left out too
        del places[0]
    found = [file for place in places if place.is_dir() for file in sorted(place.iterdir())]
    tables = [file for file in found if file.suffix in _BUILDERS and file.stem not in _NO_TABLES]
    files = [file for file in tables if file.suffix != ".json"]
    if not files and all(file.stem != "metadata" for file in found):
        files = tables  # beside other tables a .json describes them, most likely
    if len({file.suffix for file in files}) > 1:
        raise ValueError(f"it holds tables of several kinds ({', '.join(file.name for file in files)}): name one")
    named = [_split_of(file, train, test) for file in files]
    splits: dict[str, list[str]] = {}
    for name, file in zip(named, files, strict=True):  # without a file for train, those that name no split are train
        other = re.sub(r"\W", "_", file.stem) if train in named else train
        splits.setdefault(name or other, []).append(str(file))
    return splits


def _split_of(file: Path, train: str, test: str) -> str | None:
    """The split that a file's name says: train-00000-of-00002.parquet, burberry_test.csv, 2024.validation.jsonl."""
    own = {name.lower(): name for name in (train, test)}
    whole, letters = (set(re.split(pattern, file.stem.lower())) for pattern in (r"[\W_]+", r"[\W\d_]+"))  # test2: test
    found = (whole & {*own, *_SPLITS}) or (letters & {*own, *_SPLITS})
    if len(found) > 1:
        raise ValueError(f"{file.name} names several splits ({', '.join(sorted(found))}): rename it")
    return next((own.get(word, word) for word in found), None)


def _read(files: dict[str, list[str]]) -> DatasetDict:
    """Tables of one kind, by split."""
    suffix = Path(next(iter(files.values()))[0]).suffix
    return _read_csv(files) if suffix == ".csv" else _webdataset(load_dataset(_BUILDERS[suffix], data_files=files))


def _read_csv(files: dict[str, list[str]]) -> DatasetDict:
    """CSV as it stands, "NA" and 00123 too: a column holds numbers where every value of every split is one."""
    splits = DatasetDict()
    for split, names in files.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            alike.setdefault(tuple(pd.read_csv(name, nrows=0).columns), []).append(name)
        parts = [
            load_dataset(
                "csv",
                data_files={split: some},
                split=split,
                features=Features({column: Value("string") for column in columns}),
                keep_default_na=False,
                na_values=[""],
            )
            for columns, some in alike.items()
        ]
        splits[split] = concatenate_datasets(parts)
    kinds = {
        column: _kind(
            chunk for rows in splits.values() if column in rows.features for chunk in rows.data[column].chunks
        )
        for column in {name: None for rows in splits.values() for name in rows.column_names}
    }
    for split, rows in splits.items():
        features = Features({column: kinds[column] for column in rows.column_names})
        splits[split] = rows if features == rows.features else rows.cast(features)
    return splits


def _kind(chunks: Iterable[pa.Array]) -> Value:
    """What a column of text holds: whole numbers, numbers or, if one value is neither or there is none, text."""
    kind = "string"
    for chunk in chunks:
        values = chunk.drop_null()
        if not pc.all(pc.match_substring_regex(values, _PLAIN)).as_py():
            return Value("string")
        if len(values) and kind != "float64":
            kind = "int64" if pc.all(pc.match_substring_regex(values, r"^-?\d+$")).as_py() else "float64"
    return Value(kind)


def _webdataset(splits: DatasetDict) -> DatasetDict:
    """Of a WebDataset, the picture becomes `image` and what stands in each `.json` columns; others stay as they are."""
    for split, rows in splits.items():
        if "__url__" not in rows.column_names:
            continue
        rows = rows.remove_columns("__url__")  # where the shard lies on this machine
        for name in [name for name, kind in rows.features.items() if isinstance(kind, Image)][:1]:
            rows = rows if name == "image" else rows.rename_column(name, "image")
        if isinstance(rows.features.get("json"), dict):
            keys, rows = rows.select_columns("json").flatten(max_depth=2), rows.remove_columns("json")
            names = {name: name.removeprefix("json.") for name in keys.column_names}
            keys = keys.rename_columns({key: key if name in rows.features else name for key, name in names.items()})
            rows = concatenate_datasets([rows, keys], axis=1)
        splits[split] = rows
    return splits


def as_rows(dataset: Dataset, entry: DatasetConfig, recipe: Recipe, folder: Path | None, *, first: int = 0) -> Dataset:
    """
    Number rows, and put class names for class numbers and pictures for picture paths.

    Args:
        dataset (`Dataset`): Rows as they stand in the source.
        entry (`DatasetConfig`): The data set they are from.
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `image_column` is read.
        folder (`Path`, *optional*): Where picture paths count from, besides the working directory.
        first (`int`, *optional*, defaults to 0): The number of the first row.

    Returns:
        `Dataset`: The rows, with [`ROW`]: a number, in a mixture with the data set before it (`data/coats:17`).

    Raises:
        ValueError: A picture file does not exist, or is no file but a URL.
    """
    numbers: Any = range(first, first + len(dataset))
    if recipe.mixture.datasets:
        label = ":".join(part for part in (entry.path, entry.name, entry.split) if part and part != "train")
        numbers = [f"{label}:{number}" for number in numbers]
    dataset = dataset.add_column(ROW, list(numbers))
    for name, kind in dataset.features.items():
        if isinstance(kind, ClassLabel):  # {label} in `answer` should read "coat", not 3; -1 stands for none
            values = [kind.int2str(value) if value is not None and value >= 0 else None for value in dataset[name]]
            dataset = dataset.remove_columns(name).add_column(name, values, feature=Value("string"))
        elif kind in (Value("float16"), Value("float32")):  # 19.99, not 19.989999771118164
            short = np.dtype(kind.dtype).type
            values = [value if value is None else float(str(short(value))) for value in dataset[name]]
            dataset = dataset.remove_columns(name).add_column(name, values, feature=Value("float64"))
    column = recipe.task.image_column
    if "messages" in dataset.column_names and "images" in dataset.column_names:
        column = "images"
    return _with_pictures(dataset, column, recipe, folder) if column in dataset.column_names else dataset


def _with_pictures(dataset: Dataset, column: str, recipe: Recipe, folder: Path | None) -> Dataset:
    feature = dataset.features[column]
    many = isinstance(feature, List | LargeList)
    kind, pictures = (feature.feature if many else feature), (List(Image()) if many else Image())
    if isinstance(kind, Image):
        return dataset
    if kind in _TEXT:
        values = zip(dataset[ROW], dataset[column], strict=True)
        found = [_found(value, column, recipe, folder, f"row {row}, column {column!r}") for row, value in values]
        return dataset.remove_columns(column).add_column(column, found, feature=pictures)
    if not (isinstance(kind, dict) and "bytes" in kind) and kind not in (Value("binary"), Value("large_binary")):
        raise ValueError(f"`image_column` {column!r} holds {kind}, expected pictures or paths of picture files.")
    return dataset.cast_column(column, pictures)


def _found(value: Any, column: str, recipe: Recipe, folder: Path | None, where: str) -> Any:
    """A picture file, or each of a list, as the `Image` feature has it: with a path that can be opened from here."""
    if isinstance(value, list):
        return [_found(one, column, recipe, folder, where) for one in value]
    if value is None:
        return None
    if _URL.match(value):
        raise ValueError(f"{where} holds the URL {value}. {_download(column, recipe)}")
    for path in (folder / value if folder else Path(value), Path(value)):
        if path.is_file():
            return {"bytes": None, "path": str(path.absolute())}
    raise ValueError(f"{where}: no picture file {value!r}, neither in {folder or Path.cwd()} nor in {Path.cwd()}.")
