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

import io
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, BinaryIO

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
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
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from sft_phi3v.recipe import MARKUP, Recipe, TaskArguments

logger = logging.getLogger(__name__)

ROW = "__row__"  # column with a row's position in its source, so that an error can name it after any shuffling
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tar": "webdataset"}
_NO_TABLES = ("metadata", "dataset_info", "dataset_infos", "dataset_dict", "state")
_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
_URL = re.compile(r"https?://")
_DOWNLOAD = (
    "Nothing is downloaded while training. Write this name as `source`, the column as `source_image_column` and a new "
    "folder as `dataset_name`, then type: python -m sft_phi3v.prepare RECIPE"
)
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

    The data set is a Hub id, a folder of Parquet, JSONL or CSV files, a folder of pictures (with `metadata.csv` or
    `.jsonl`, or one folder per class, whose name becomes the column `label`), a `save_to_disk` folder or one local
    file. Picture paths in a table count from its folder, or else from the working directory.

    Args:
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `dataset_*`, `image_column`, `held_out` and `seed` are read.

    Returns:
        `tuple[Dataset, Dataset]`:
            Train rows and held-out rows, with the source's columns and [`ROW`]. Without a test split in the source the
            held-out rows are drawn by `seed` alone, so that every process and machine draws the same. Prints which.

    Raises:
        ValueError: No such data set, split, column or picture file; pictures that are URLs; no rows.
    """
    script, task = recipe.script, recipe.task
    check_prepared(recipe)
    splits, folder = read_source(str(script.dataset_name), recipe)
    train, test = script.dataset_train_split, script.dataset_test_split
    asked = [("dataset_train_split", train)]
    if "dataset_test_split" in recipe.settings:  # TRL's default name need not exist, a name the user wrote must
        asked.append(("dataset_test_split", test))
    for key, name in asked:
        if name not in splits:
            raise ValueError(f"`{key}` is {name!r}; {script.dataset_name} has the splits {', '.join(splits)}.")
    if test == train:
        raise ValueError(f"`dataset_test_split` is the train split {train!r}: scores on learned rows say nothing.")
    rows = {name: _prepare(splits[name], name, folder, recipe) for name in (train, test) if name in splits}
    unused = [name for name in splits if name not in rows]
    if test in rows:
        _say_held_out(f"split {test!r}", unused)
        return rows[train], rows[test]

    total = len(rows[train])
    count = int(task.held_out) if task.held_out >= 1 else max(1, round(task.held_out * total))
    if count >= total:
        raise ValueError(
            f"`held_out` is {task.held_out}, which leaves no train rows: {script.dataset_name} has {total} rows in "
            f"split {train!r}. Hold out fewer, or name a `dataset_test_split`."
        )
    parts = rows[train].train_test_split(test_size=count, seed=recipe.training.seed)
    _say_held_out(f"{count} of the {total} rows of split {train!r}, seed {recipe.training.seed}", unused)
    return parts["train"], parts["test"]


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
            f"  python -m sft_phi3v.prepare {recipe.path}\nor let the run do it: --prepare true"
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


def check_rows(dataset: Dataset, recipe: Recipe) -> None:
    """
    Check every row before paying for a GPU: fields filled in, turns in order, picture files there and readable.

    Of PNG and JPEG it reads headers and ends, not pixels (some 100,000 rows in a minute). Logs a warning for answers
    that the template cannot read back, since they cannot be scored, and for text that looks like Phi-3's markup.

    Args:
        dataset (`Dataset`): Rows from [`load_splits`].
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `prompt`, `answer` and `image_column` are read.

    Raises:
        ValueError: Names the first rows that cannot be used, each with its reason, and how many there are.
    """
    if not len(dataset):
        raise ValueError(f"`dataset_name` {recipe.script.dataset_name}: no rows to check.")
    if ROW not in dataset.column_names:
        dataset = dataset.add_column(ROW, list(range(len(dataset))))
    reader = Reader.of(dataset, recipe)
    problems: list[str] = []
    unread: list[int] = []
    marked: list[int] = []
    for batch in reader.undecoded(dataset).iter(batch_size=256):
        for row in _rows(batch):
            try:
                parts = [part for turn in reader.messages(row) for part in turn["content"]]
                if any(MARKUP.search(part.get("text", "")) for part in parts):
                    marked.append(row[ROW])
                for picture in reader.pictures(row):
                    _check_picture(picture)
                if reader.answer and not reader.answer.reads_back(row):
                    unread.append(row[ROW])
            except ValueError as error:
                problems.append(f"row {row[ROW]}: {error}")
    if problems:
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        opening = f"{recipe.script.dataset_name} has rows that cannot be used:"
        raise ValueError("\n".join([opening, *problems[:5], *more]))
    if unread:
        logger.warning(
            "%d of %d answers do not read back through `answer` (first: row %d): a field holds the text that ends "
            "another. They are trained on, but their fields cannot be scored",
            *(len(unread), len(dataset), unread[0]),
        )
    if marked:
        logger.warning(
            "%d of %d rows hold markup such as <|end|> or <|image_1|> (first: row %d): it is learned as plain text",
            *(len(marked), len(dataset), marked[0]),
        )


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
            there = f"there is no such column: {', '.join(columns)}.{_urls(dataset)}"
            raise ValueError(f"`image_column` is {task.image_column!r}, and {there}")
        return cls(prompt, answer, task.image_column)

    def undecoded(self, dataset: Dataset) -> Dataset:
        """The columns needed, pictures as `{"bytes", "path"}`: decoding them in here, an error can name the row."""
        used = ["messages"] if self.answer is None else [*self.prompt.fields, *self.answer.fields]
        used += [self.column] if self.column else []
        dataset = dataset.select_columns([*dict.fromkeys(used), ROW]).with_format(None)
        if self.column:
            feature, bare = dataset.features[self.column], Image(decode=False)
            dataset.info.features[self.column] = List(bare) if isinstance(feature, List | LargeList) else bare
        return dataset

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        examples: dict[str, list[Any]] = {"images": [], "messages": [], "row": []}
        for row in _rows(batch):
            try:
                examples["messages"].append(self.messages(row))
                examples["images"].append([_open(picture) for picture in self.pictures(row)])
            except ValueError as error:
                raise ValueError(f"row {row[ROW]}: {error}") from error
            examples["row"].append(row[ROW])
        return examples

    def pictures(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        value = row[self.column] if self.column else None
        pictures = value if isinstance(value, list) else [] if value is None else [value]
        if (self.answer and not pictures) or any(picture is None for picture in pictures):
            raise ValueError(f"no picture in column {self.column!r}")
        return pictures

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The row's turns, every content a list of parts."""
        images = [{"type": "image"} for _ in self.pictures(row)]
        if self.answer:
            question, answer = _text(self.prompt.render(row)), _text(self.answer.render(row))
            return [{"role": "user", "content": [*images, question]}, {"role": "assistant", "content": [answer]}]
        return self._conversation(row["messages"] or [], images)

    def _conversation(self, turns: list[dict[str, Any]], images: list[dict[str, str]]) -> list[dict[str, Any]]:
        strings = all(isinstance(turn.get("content"), str) for turn in turns)
        messages: list[dict[str, Any]] = []
        for turn in turns:
            role, content = turn.get("role"), turn.get("content")
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"a turn's role is {role!r}, expected system, user or assistant")
            parts = [_text(content)] if isinstance(content, str) else [_part(part) for part in content or []]
            if strings and role == "user" and not any(message["role"] == "user" for message in messages):
                parts = [*images, *parts]  # as TRL does: pictures stand in front of the first question
            if role == "assistant" and not any(part.get("text") for part in parts):
                raise ValueError("an assistant turn is empty")
            messages.append({"role": role, "content": parts})
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("the last turn is not the assistant's: there is nothing to learn after it")
        holders = [turn["role"] for turn in messages for part in turn["content"] if part["type"] == "image"]
        if set(holders) - {"user"}:
            raise ValueError("a picture stands in a turn that is not the user's")
        if len(holders) != len(images):
            raise ValueError(f"{len(holders)} image parts in `messages` and {len(images)} pictures")
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


def _file(picture: dict[str, Any]) -> BinaryIO:
    return Path(picture["path"]).open("rb") if picture["bytes"] is None else io.BytesIO(picture["bytes"])


def _open(picture: dict[str, Any]) -> PIL.Image.Image:
    """The picture, upright. Its size is known now; its pixels are decoded when they are first asked for."""
    try:
        with _file(picture) as file:
            image = PIL.Image.open(io.BytesIO(file.read()))
        # As `datasets` does: cameras store how they were held, and the model should not see a coat lying down.
        return PIL.ImageOps.exif_transpose(image) if "exif" in image.info else image
    except (OSError, SyntaxError, ValueError, TypeError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"the picture{_named(picture)} cannot be read: {error}") from error


def _check_picture(picture: dict[str, Any]) -> None:
    """Raises a `ValueError` for a picture that is not whole, decoding it only where nothing less can tell."""
    try:
        with _file(picture) as file:
            image = PIL.Image.open(file)
            image.verify()  # checks every part of a PNG, and of the other formats next to nothing
            whole = image.format == "PNG"
            if image.format == "JPEG":  # its end mark cannot occur in pixels
                file.seek(-min(64, file.seek(0, io.SEEK_END)), io.SEEK_END)
                whole = b"\xff\xd9" in file.read()
            if not whole:
                file.seek(0)
                PIL.Image.open(file).load()
    except FileNotFoundError:
        raise ValueError(f"the picture {picture['path']} does not exist") from None
    except (OSError, SyntaxError, ValueError, TypeError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"the picture{_named(picture)} cannot be read: {error}") from error


def _say_held_out(source: str, unused: list[str]) -> None:
    rest = f"; not used: {', '.join(unused)} (to score on one, name it: `dataset_test_split`)" if unused else ""
    from accelerate import PartialState  # brings torch, which processes that only prepare data can do without

    if PartialState().is_main_process:
        print(f"held out: {source}{rest}", flush=True)


def _named(picture: Mapping[str, Any]) -> str:
    return f" {picture['path']}" if picture.get("path") else ""


def _urls(dataset: Dataset) -> str:
    """A sentence about the columns that hold URLs, where pictures are looked for in vain."""
    texts = [name for name, kind in dataset.features.items() if kind in _TEXT]
    names = [name for name in texts if _URL.match(dataset[name][0] or "")]
    if not names:
        return ""
    return f" Column {names[0]!r} holds URLs. {_DOWNLOAD}"


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
    train = recipe.script.dataset_train_split
    path = Path(name).expanduser()
    try:
        if path.is_file():
            if path.suffix not in _BUILDERS:
                raise ValueError(f"expected a file of {', '.join(_BUILDERS)}, or a folder")
            return _read({train: [str(path)]}), path.parent
        if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            saved = load_from_disk(str(path))
            return saved if isinstance(saved, DatasetDict) else DatasetDict({train: saved}), path
        if path.is_dir():
            files = _tables(path, recipe)
            return _read(files) if files else load_dataset(str(path)), path
        if name.count("/") > 1 or name.startswith(("/", ".", "~")) or path.suffix in _BUILDERS:
            raise ValueError(f"no such file or folder (paths count from {Path.cwd()})")
        return _webdataset(load_dataset(name, recipe.script.dataset_config)), None
    except DatasetNotFoundError:
        raise ValueError(
            f"`{key}` is {name!r}: there is no such file or folder in {Path.cwd()}, and the Hub has no such "
            "data set, or not for you (private and gated ones need `hf auth login`)."
        ) from None
    except ConnectionError as error:
        raise ValueError(
            f"`{key}` is {name!r}: there is no such file or folder in {Path.cwd()}, so the data set of that "
            "name would be fetched from the Hugging Face Hub, which cannot be reached from here. Where there is a "
            f"network: hf download {name} --repo-type dataset --local-dir FOLDER, then point `{key}` at FOLDER. "
            "It must hold the pictures themselves: where its rows hold URLs, make a copy with an `image` column."
        ) from error
    except (DatasetGenerationError, ValueError, FileNotFoundError) as error:
        reason = "it has no rows" if "corresponds to no data" in str(error) else error.__cause__ or error
        raise ValueError(f"`{key}` is {name!r}: {reason}") from error


def _tables(folder: Path, recipe: Recipe) -> dict[str, list[str]]:
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
    train = recipe.script.dataset_train_split
    named = [_split_of(file, recipe) for file in files]
    splits: dict[str, list[str]] = {}
    for name, file in zip(named, files, strict=True):  # without a file for train, those that name no split are train
        other = re.sub(r"\W", "_", file.stem) if train in named else train
        splits.setdefault(name or other, []).append(str(file))
    return splits


def _split_of(file: Path, recipe: Recipe) -> str | None:
    """The split that a file's name says: train-00000-of-00002.parquet, burberry_test.csv, 2024.validation.jsonl."""
    own = {name.lower(): name for name in (recipe.script.dataset_train_split, recipe.script.dataset_test_split)}
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


def _prepare(dataset: Dataset, split: str, folder: Path | None, recipe: Recipe) -> Dataset:
    """The rows of one split, numbered, with class names for class numbers and pictures for picture paths."""
    if not len(dataset):
        raise ValueError(f"`dataset_name` {recipe.script.dataset_name} has no rows in split {split!r}.")
    dataset = dataset.add_column(ROW, list(range(len(dataset))))
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
    return _with_pictures(dataset, column, folder) if column in dataset.column_names else dataset


def _with_pictures(dataset: Dataset, column: str, folder: Path | None) -> Dataset:
    feature = dataset.features[column]
    many = isinstance(feature, List | LargeList)
    kind = feature.feature if many else feature
    if isinstance(kind, Image):
        return dataset
    if kind in _TEXT:
        found = [_found(value, folder, f"row {row}, column {column!r}") for row, value in enumerate(dataset[column])]
        dataset = dataset.remove_columns(column).add_column(column, found)
    elif not (isinstance(kind, dict) and "bytes" in kind) and kind not in (Value("binary"), Value("large_binary")):
        raise ValueError(f"`image_column` {column!r} holds {kind}, expected pictures or paths of picture files.")
    return dataset.cast_column(column, List(Image()) if many else Image())


def _found(value: Any, folder: Path | None, where: str) -> Any:
    """The path of a picture file, or of each in a list, as it can be opened from here."""
    if isinstance(value, list):
        return [_found(one, folder, where) for one in value]
    if value is None:
        return None
    if _URL.match(value):
        raise ValueError(f"{where} holds the URL {value}. {_DOWNLOAD}")
    for path in (folder / value if folder else Path(value), Path(value)):
        if path.is_file():
            return str(path.absolute())
    raise ValueError(f"{where}: no picture file {value!r}, neither in {folder or Path.cwd()} nor in {Path.cwd()}.")
