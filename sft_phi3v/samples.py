"""Sample sources to rehearse `prepare` on: data that looks like people's own, with faults that are written down.

`python -m sft_phi3v.demo --source csv --output_dir data/rehearsal --rows 1000 --faults 0.1 --serve` writes

    rehearsal/rows.csv       the table, whose picture column holds URLs (paths, without --serve)
    rehearsal/pictures/      the picture files, as a server of pictures would have them
    rehearsal/faults.json    what is wrong with which row, and what the manifest of `prepare` should say of it
    rehearsal/source.json    the arguments: the same again find their source written already

and serves the pictures. What a server does wrong stands in the URL: `/cut/pictures/0000009.jpg` breaks off when it is
first asked for.
"""

import asyncio
import csv
import functools
import io
import itertools
import json
import os
import random
import re
import shutil
import socket
import struct
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage
from PIL import ImageOps
from tqdm import tqdm

from sft_phi3v.catalogue import KINDS, PICTURE_SIZE, Product, draw_picture, draw_product

Record = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """
    A form in which people have pictures and what is known of them.

    Args:
        what (`str`): The same for people.
        source (`str`): What `prepare` is to read, inside the written folder.
        references (`bool`): Whether it holds URLs or paths, so that the pictures can be served.
        several (`bool`): Whether it may have several picture columns: image, image_2, …
        without (`tuple[str, ...]`): Faults that it has no place for.
    """

    what: str
    source: str
    references: bool = False
    several: bool = False
    without: tuple[str, ...] = ("no_answer",)


FORMS: dict[str, Form] = {
    "csv": Form("a table, with URLs or paths of pictures", "rows.csv", references=True, several=True),
    "jsonl": Form("the same, one JSON object per line", "rows.jsonl", references=True, several=True),
    "parquet": Form("the same, in Parquet", "rows.parquet", references=True, several=True),
    "embedded": Form("Parquet with the pictures in it", "rows.parquet", several=True, without=("no_answer", "missing")),
    "folder": Form(
        "a folder of pictures, with metadata.jsonl",
        "pictures",
        several=True,
        without=("no_answer", "svg"),  # `datasets` takes no SVG for a picture there
    ),
    "classes": Form(
        "a folder of pictures for each class",
        "pictures",
        without=("no_answer", "svg", "missing", "no_picture", "empty_title", "placeholder"),
    ),
    "webdataset": Form(
        "tar files of 0000000.jpg, 0000000.json, …",
        "shards",
        without=("no_answer", "missing", "no_picture"),  # every row has both files
    ),
    "conversations": Form(
        "rows of `images` and `messages`, with one, several or no pictures",
        "rows.jsonl",
        references=True,
        without=("no_picture", "empty_title", "placeholder"),
    ),
    "burberry": Form("CSV with the columns of DBQ/Burberry.Product.prices.United.States", "rows.csv", references=True),
}


@dataclass(frozen=True)
class Fault:
    """
    What `prepare` should make of a fault.

    Args:
        reason (`str`, *optional*): Why the row is dropped; `None` if it is kept.
        notes (`tuple[str, ...]`): What is noted of a kept row.
        attempts (`int`, *optional*): Requests for its picture, where the fault is about them.
    """

    reason: str | None = None
    notes: tuple[str, ...] = ()
    attempts: int | None = None


_IN_PICTURES = {
    "truncated": Fault("truncated"),
    "html_as_jpeg": Fault("not_a_picture"),
    "svg": Fault("not_a_picture"),
    "bomb": Fault("too_many_pixels"),  # 30,000×30,000 pixels in some 110 KB
    "tiny": Fault("too_small"),  # 1×1
    "animated": Fault("animated"),
    "cmyk": Fault(notes=("cmyk",)),
    "exif_rotated": Fault(notes=("exif_rotated",)),
    "16_bit": Fault(notes=("16_bit",)),
}
_IN_ROWS = {
    "missing": Fault("no_file"),  # served: http_404
    "no_picture": Fault("no_picture"),
    "empty_title": Fault("empty_field"),
    "placeholder": Fault("placeholder"),  # the title is N/A
    "no_answer": Fault("messages"),  # the conversation ends with the user
    "duplicate": Fault("duplicate"),  # of the row before, in a file of its own
    "conflict": Fault("conflict"),  # the row before has the same picture and other labels: neither can be trusted
    "near_duplicate": Fault(notes=("near_duplicate",)),  # the picture of the row before, smaller and coarser
}
_IN_SERVING = {
    "server_error": Fault(attempts=2),  # 500, then the picture
    "busy": Fault(attempts=2),  # 429 with `Retry-After: 1`, then the picture
    "cut": Fault(attempts=2),  # half of the picture, then all of it
    "trickle": Fault("timeout"),  # a byte now and then, for ever
    "huge": Fault("too_large"),  # Content-Length: 1 GB
    "endless": Fault("too_large"),  # no Content-Length, and no end
    "html_page": Fault("content_type"),
    "text_plain": Fault("content_type"),  # a good JPEG that calls itself text
    "octet_stream": Fault(),  # a good JPEG that is called binary, as object stores do
    "redirect": Fault(),
    "redirect_loop": Fault("redirects"),
    "redirect_to_file": Fault("address"),
    "redirect_to_metadata": Fault("address"),  # where cloud machines keep their credentials
    "redirect_to_private": Fault("address"),
}
FAULTS: dict[str, Fault] = {**_IN_PICTURES, **_IN_ROWS, **_IN_SERVING}
_ON_THE_ROW_BEFORE = ("conflict", "near_duplicate")  # of which the manifest says the same

_PAGE = b"<!doctype html>\n<title>Not here</title>\n<p>The picture you are looking for has moved.</p>\n"
_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="192" height="192"><circle cx="96" cy="96" r="80"/></svg>\n'
_CONTENT_TYPES = {
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".gif": "image/gif",
    ".svg": "image/svg+xml",
    ".html": "text/html; charset=utf-8",
    ".txt": "text/plain",
    ".bin": "application/octet-stream",
}


@dataclass(frozen=True)
class Planted:
    """
    One line of `faults.json`.

    Args:
        row (`int`): Number of the row, as the source is read.
        fault (`str`): One of [`FAULTS`].
        reason (`str`, *optional*): Why the manifest should say that the row is dropped; `None` if it is to be kept.
        notes (`tuple[str, ...]`): What it should note of a kept row.
        attempts (`int`, *optional*): How many requests it should count for all of the row's pictures, where the fault
            is about them.
    """

    row: int
    fault: str
    reason: str | None
    notes: tuple[str, ...] = ()
    attempts: int | None = None


@dataclass
class _Picture:
    name: str
    content: bytes | None  # None: there is no such file
    behaviour: str = ""  # of the server


@dataclass
class _Row:
    """A row before it takes a form: what faults are planted in."""

    number: int
    code: str
    product: Product  # what the labels say
    title: str
    pictures: list[_Picture]
    others: list[Product] = field(default_factory=list)  # what the further pictures of a conversation show
    answered: bool = True


@dataclass(frozen=True)
class _Plan:
    """The arguments of [`write_source`]."""

    form: str
    rows: int
    seed: int
    faults: float
    base_url: str | None
    distinct: int | None
    pictures: int
    kinds: list[str] | None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form is {self.form!r}, expected one of {', '.join(FORMS)}.")
        form = FORMS[self.form]
        for name in ("rows", "distinct", "pictures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more.")
        if not 0 <= self.faults <= 0.5:
            raise ValueError(f"faults is {self.faults}, expected a share from 0 to 0.5: a good row precedes each.")
        if self.base_url is not None and not form.references:
            raise ValueError(f"{self.form!r} holds the pictures themselves, so there is nothing to serve.")
        if self.pictures > 1 and not form.several:
            several = ", ".join(name for name, one in FORMS.items() if one.several)
            raise ValueError(f"{self.form!r} has one picture column, not {self.pictures}; several can have {several}.")
        possible = faults_of(self.form, served=self.base_url is not None)
        for kind in self.kinds or ():
            if kind not in possible:
                served = "served" if self.base_url is not None else "not served"
                raise ValueError(f"kinds holds {kind!r}; {self.form!r}, {served}, can have {', '.join(possible)}.")

    def is_planted(self, number: int) -> bool:
        """Faults are spread evenly: up to one row in two, so that a good row stands before each."""
        return int((number + 1) * self.faults) > int(number * self.faults)


def faults_of(form: str, *, served: bool = False) -> list[str]:
    """The faults that a form has a place for, served over HTTP or not."""
    names = FAULTS if served else {**_IN_PICTURES, **_IN_ROWS}
    return [name for name in names if name not in FORMS[form].without]


def source_path(folder: str | Path, form: str) -> Path:
    """What to write into a recipe's `source`."""
    return Path(folder) / FORMS[form].source


def write_source(
    folder: str | Path,
    form: str,
    *,
    rows: int,
    seed: int = 0,
    faults: float = 0.0,
    base_url: str | None = None,
    distinct: int | None = None,
    pictures: int = 1,
    kinds: Sequence[str] | None = None,
) -> list[Planted]:
    """
    Writes a sample source, row by row: 100,000 rows need no more memory than ten.

    The same arguments give the same bytes. The folder appears whole or not at all; one that holds what the same
    arguments wrote before stays as it is.

    Args:
        folder (`str` or `Path`): Where to write: a new or an empty folder.
        form (`str`): One of [`FORMS`].
        rows (`int`): How many.
        seed (`int`, *optional*, defaults to 0): Another seed gives other products and other pictures.
        faults (`float`, *optional*, defaults to 0.0): Share of the rows with a planted fault, at most 0.5.
        base_url (`str`, *optional*): Where the folder will be served: the picture column holds URLs. Without it, paths.
        distinct (`int`, *optional*): Most products that are drawn, at some 8 ms each; further rows show one of them
            again, in another detail and marked with their number, at a tenth of that. `None`: all.
        pictures (`int`, *optional*, defaults to 1): Picture columns (image, image_2, …); of several, every fourth row
            lacks the last.
        kinds (`Sequence[str]`, *optional*): The faults to plant, one after the other. `None`: all of [`faults_of`].

    Returns:
        `list[Planted]`: The faults, by row, as in `faults.json`.

    Raises:
        ValueError: If an argument is not right, the form has no place for it, or the folder holds something else.
    """
    folder = Path(folder)
    base_url = base_url and base_url.rstrip("/")
    plan = _Plan(form, rows, seed, faults, base_url, distinct, pictures, list(kinds) if kinds else None)
    settings = json.dumps(asdict(plan), indent=2) + "\n"
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "source.json").is_file() or (folder / "source.json").read_text(encoding="utf-8") != settings:
            raise ValueError(f"{folder} is there already, and not made with these arguments: give a new folder's name.")
        found = json.loads((folder / "faults.json").read_text(encoding="utf-8"))
        return [Planted(**{**line, "notes": tuple(line["notes"])}) for line in found]
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    planted: list[Planted] = []
    order = _write(aside, plan, tqdm(_rows(plan, planted), "draw", rows, unit=" rows", disable=None))
    planted = sorted((replace(one, row=order.get(one.row, one.row)) for one in planted), key=lambda one: one.row)
    lines = ",\n".join(json.dumps(asdict(one)) for one in planted)
    (aside / "faults.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (aside / "source.json").write_text(settings, encoding="utf-8")
    aside.rename(folder)
    return planted


# --- rows and their faults ---


def _rows(plan: _Plan, planted: list[Planted]) -> Iterator[_Row]:
    """The rows, one at a time; what is planted in them is noted down."""
    kinds = itertools.cycle(plan.kinds or faults_of(plan.form, served=plan.base_url is not None))
    before = None
    for number in range(plan.rows):
        row = _good_row(plan, number)
        if plan.is_planted(number):
            assert before is not None
            name = next(kinds)
            _plant(name, row, before, served=plan.base_url is not None)
            fault = FAULTS[name]
            reason = "http_404" if name == "missing" and plan.base_url else fault.reason
            affected = [number - 1, number] if name in _ON_THE_ROW_BEFORE else [number]
            attempts = fault.attempts and fault.attempts + len(row.pictures) - 1
            planted += [Planted(one, name, reason, fault.notes, attempts) for one in affected]
        yield row
        before = row


def _good_row(plan: _Plan, number: int) -> _Row:
    drawings = min(plan.distinct or plan.rows, plan.rows)
    drawing = number * drawings // plan.rows  # rows that share one follow each other: only one is kept in memory
    many = plan.form == "conversations"
    count = plan.pictures - (plan.pictures > 1 and number % 4 == 3)
    if many and not (plan.is_planted(number) or plan.is_planted(number + 1)):
        count = random.Random(f"pictures {plan.seed} {drawing}").choice([0, 1, 1, 1, 2, 3])
    products, drawn = _drawn(plan.seed, drawing, count, many)
    if drawings < plan.rows:
        drawn = [_another_view(one, number) for one in drawn]
    return _Row(
        number=number,
        code=f"8{drawing * 7919 % 10**7:07d}",  # as in the catalogue
        product=products[0],
        title=products[0].title,
        pictures=[_Picture(_file_name(number, place), _jpeg(one)) for place, one in enumerate(drawn)],
        others=products[1:] if many else [],
    )


def _file_name(number: int, place: int, suffix: str = ".jpg") -> str:
    return f"{number:07d}{f'_{place + 1}' if place else ''}{suffix}"


@functools.lru_cache(maxsize=2)
def _drawn(seed: int, drawing: int, count: int, many: bool) -> tuple[list[Product], list[PILImage.Image]]:
    """Views of one product, or pictures of as many products; there is a product even without a picture."""
    rng = random.Random(f"source {seed} {drawing}")
    products = [draw_product(rng)]
    products += [draw_product(rng) if many else products[0] for _ in range(count - 1)]
    return products, [draw_picture(product, rng) for product in products[:count]]


def _another_view(picture: PILImage.Image, number: int) -> PILImage.Image:
    """A detail of a drawing, perhaps mirrored, with the row's number in its corner: no two have the same pixels."""
    rng = random.Random(number)
    side = PICTURE_SIZE - 16
    left, top = rng.randint(0, 16), rng.randint(0, 16)
    view = picture.crop((left, top, left + side, top + side))
    if rng.random() < 0.5:
        view = ImageOps.mirror(view)
    mark = PILImage.frombytes("1", (32, 1), number.to_bytes(4, "big"))
    view.paste(mark.resize((64, 2)).convert("RGB"))
    return view


def _plant(fault: str, row: _Row, before: _Row, *, served: bool) -> None:
    """Plants a fault in a good row; it is about the first picture if there are several."""
    if fault in _IN_ROWS:
        _plant_in_row(fault, row, before)
    elif fault in ("html_page", "text_plain", "octet_stream") or fault in _IN_PICTURES:
        suffix, content = _spoilt(fault, row.pictures[0].content or b"")
        row.pictures[0] = _Picture(_file_name(row.number, 0, suffix), content)
    else:
        row.pictures[0].behaviour = fault


def _plant_in_row(fault: str, row: _Row, before: _Row) -> None:
    if fault == "missing":
        row.pictures[0].content = None
    elif fault == "no_picture":
        row.pictures = []
    elif fault == "empty_title":
        row.title = ""
    elif fault == "placeholder":
        row.title = "N/A"
    elif fault == "no_answer":
        row.answered = False
    else:
        row.pictures = [
            _Picture(_file_name(row.number, place), one.content) for place, one in enumerate(before.pictures)
        ]
        row.product, row.title = before.product, before.title
    if fault == "conflict":
        kinds = list(KINDS)
        other = kinds[(kinds.index(row.product.kind) + 1) % len(kinds)]
        row.product = replace(row.product, kind=other)
        row.title = row.product.title
    elif fault == "near_duplicate":
        picture = _opened(row.pictures[0].content or b"")
        row.pictures[0].content = _jpeg(picture.resize((picture.width * 3 // 4, picture.height * 3 // 4)), quality=75)


def _spoilt(fault: str, content: bytes) -> tuple[str, bytes]:
    """What stands in the place of a good JPEG file: suffix and content."""
    match fault:
        case "truncated":
            return ".jpg", content[: len(content) * 3 // 5]
        case "html_as_jpeg":
            return ".jpg", _PAGE
        case "html_page":
            return ".html", _PAGE
        case "text_plain":
            return ".txt", content
        case "octet_stream":
            return ".bin", content
        case "svg":
            return ".svg", _SVG
        case "bomb":
            return ".png", _bomb()
        case "tiny":
            return ".png", _encoded(PILImage.new("RGB", (1, 1), "white"), "PNG")
    picture = _opened(content)
    if fault == "animated":
        return ".gif", _encoded(picture, "GIF", save_all=True, append_images=[ImageOps.mirror(picture)])
    if fault == "16_bit":
        return ".png", _encoded(PILImage.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), "PNG")
    if fault == "cmyk":
        return ".jpg", _jpeg(picture.convert("CMYK"))
    assert fault == "exif_rotated", fault
    exif = PILImage.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise, so it lies on its left side here
    return ".jpg", _jpeg(picture.transpose(PILImage.Transpose.ROTATE_90), exif=exif)


def _opened(content: bytes) -> PILImage.Image:
    return PILImage.open(io.BytesIO(content))


def _encoded(picture: PILImage.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _jpeg(picture: PILImage.Image, *, quality: int = 90, **options: Any) -> bytes:
    return _encoded(picture, "JPEG", quality=quality, **options)


@functools.cache
def _bomb(side: int = 30_000) -> bytes:
    """A black PNG of side × side pixels, one bit each, packed line by line: 112 MB that nothing ever holds at once."""
    packer = zlib.compressobj(9)
    line = bytes(1 + -(-side // 8))  # a filter byte, then the pixels
    packed = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


# --- forms ---


def _schema(columns: Sequence[str], *, embedded: bool) -> pa.Schema:
    """Of a table with these picture columns, which hold the pictures themselves or only say where they are."""
    from datasets import Features, Image, Value  # `demo --help` need not wait for it

    table = {name: Value("string") for name in ("product_code", "title", "category3_code")}
    table |= {"full_price": Value("float64"), **{name: Image() if embedded else Value("string") for name in columns}}
    return Features(table).arrow_schema


def _write(folder: Path, plan: _Plan, rows: Iterable[_Row]) -> dict[int, int]:
    """Writes rows in a form; returns the numbers under which rows are read that are not read in their order."""
    form = FORMS[plan.form]
    if plan.form == "classes":
        return _write_classes(folder / form.source, rows)
    if plan.form == "webdataset":
        _write_shards(folder / form.source, rows)
    elif plan.form == "embedded":
        columns = _picture_columns(plan)
        records = (_embedded(row, columns) for row in rows)
        _write_parquet(folder / form.source, records, _schema(columns, embedded=True), at_once=100)
    else:
        (folder / "pictures").mkdir()
        records = (_record(row, plan) for row in _with_files(rows, folder / "pictures"))
        path = folder / form.source / "metadata.jsonl" if plan.form == "folder" else folder / form.source
        if path.suffix == ".csv":
            _write_csv(path, records)
        elif path.suffix == ".jsonl":
            with path.open("w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(record)}\n" for record in records)
        else:
            _write_parquet(path, records, _schema(_picture_columns(plan), embedded=False), at_once=1000)
    return {}


def _picture_columns(plan: _Plan) -> list[str]:
    return ["image", *(f"image_{place}" for place in range(2, plan.pictures + 1))]


def _with_files(rows: Iterable[_Row], folder: Path) -> Iterator[_Row]:
    for row in rows:
        for picture in row.pictures:
            if picture.content is not None:
                (folder / picture.name).write_bytes(picture.content)
        yield row


def _labels(row: _Row) -> Record:
    return {
        "product_code": row.code,
        "title": row.title,
        "category3_code": row.product.category3_code,
        "full_price": row.product.full_price,
    }


def _record(row: _Row, plan: _Plan) -> Record:
    """A row of a table, with references to its pictures."""
    if plan.form == "folder":
        places = ["file_name", *(f"{name}_file_name" for name in _picture_columns(plan)[1:])]
        return _filled(places, [picture.name for picture in row.pictures]) | _labels(row)
    found = []
    for picture in row.pictures:
        behaviour = f"{picture.behaviour}/" if picture.behaviour else ""
        path = f"{behaviour}pictures/{picture.name}"
        found.append(f"{plan.base_url}/{path}" if plan.base_url else path)
    if plan.form == "conversations":
        return {"images": found, "messages": _conversation(row)}
    if plan.form == "burberry":
        return _burberry(row, plan, found[0] if found else None)
    return _labels(row) | _filled(_picture_columns(plan), found)


def _filled(columns: list[str], values: Sequence[Any]) -> Record:
    return dict(itertools.zip_longest(columns, values))


def _embedded(row: _Row, columns: list[str]) -> Record:
    pictures = [{"bytes": picture.content, "path": picture.name} for picture in row.pictures]
    return _labels(row) | _filled(columns, pictures)


def _conversation(row: _Row) -> list[Record]:
    """One picture is described and priced, several are compared, and without one only the text speaks."""
    category, price = row.product.category3_code, row.product.full_price
    if not row.pictures:
        turns = [(f"In which category is item {row.number}, the {row.title}?", category)]
    elif not row.others:
        turns = [("What is shown in this image?", f"Product: {row.title}, Category: {category}")]
        turns += [("What is its full price?", f"{price}")]
    else:
        shown = [row.product, *row.others]
        turns = [("Name what these pictures show.", ", ".join(product.title for product in shown))]
        turns += [("And what do they cost together?", f"{sum(product.full_price for product in shown)}")]
    messages: list[Record] = []
    for question, answer in turns:
        pictures = [] if messages else [{"type": "image"} for _ in row.pictures]
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages if row.answered else messages[:-1]


def _burberry(row: _Row, plan: _Plan, reference: str | None) -> Record:
    """The columns of DBQ/Burberry.Product.prices.United.States, in their order."""
    rng = random.Random(f"burberry {plan.seed} {row.code}")
    worn = row.product.kind in ("coat", "dress", "trousers")
    discount = rng.random() < 0.2
    full_price = row.product.full_price
    price = round(full_price * 0.7, 2) if discount else full_price
    return {
        "website_name": "Burberry",
        "competence_date": f"2023-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        "country_code": "USA",
        "currency_code": "USD",
        "brand": "BURBERRY",
        "category1_code": "WOMEN" if row.product.kind == "dress" else rng.choice(["WOMEN", "MEN"]),
        "category2_code": "CLOTHING" if worn else "ACCESSORIES",
        "category3_code": row.product.category3_code,
        "product_code": row.code,
        "title": row.title,
        "itemurl": f"https://us.burberry.com/{row.product.title.lower().replace(' ', '-')}-p{row.code}",
        "imageurl": reference,
        "full_price": full_price,
        "price": price,
        "full_price_eur": round(full_price * 0.93, 2),
        "price_eur": round(price * 0.93, 2),
        "flg_discount": int(discount),
    }


def _write_csv(path: Path, records: Iterable[Record]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        first = next(records := iter(records))
        writer = csv.DictWriter(file, list(first), lineterminator="\n")
        writer.writeheader()
        writer.writerow(first)
        writer.writerows(records)


def _write_parquet(path: Path, records: Iterable[Record], schema: pa.Schema, *, at_once: int) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        records = iter(records)
        while batch := list(itertools.islice(records, at_once)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def _write_classes(folder: Path, rows: Iterable[_Row]) -> dict[int, int]:
    names = []
    for row in rows:
        name = f"{row.product.category3_code}/{row.pictures[0].name}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(row.pictures[0].content or b"")
        names.append(name)
    ordered = sorted(range(len(names)), key=names.__getitem__)  # as `datasets` lists files
    return {number: place for place, number in enumerate(ordered)}


def _write_shards(folder: Path, rows: Iterable[_Row]) -> None:
    folder.mkdir()
    for shard, part in itertools.groupby(rows, lambda row: row.number // 1000):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in part:
                labels = json.dumps(_labels(row)).encode()
                for suffix, content in ((".jpg", row.pictures[0].content or b""), (".json", labels)):
                    entry = tarfile.TarInfo(f"{row.number:07d}{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


# --- the server ---

_TARGET = re.compile(r"/(?:(?P<behaviour>\w+)/)?pictures/(?P<name>[\w.]+)(?:\?.*)?")
_ZEROS = bytes(1 << 16)


class Server:
    """
    Serves a source's pictures on this machine, with the faults that stand in their URLs. A context manager.

    One thread and an event loop: hundreds of connections wait out their latency at once.

    Args:
        folder (`str` or `Path`): Where the source is, or will be.
        port (`int`, *optional*, defaults to 0): 0: any that is free.
        latency (`float`, *optional*, defaults to 0.0): Seconds before every answer.

    Attributes:
        url (`str`): The `base_url` for [`write_source`].
        requests (`int`): Requests that were answered or begun to be.
        bytes (`int`): Bytes of answers that were sent, heads included.
        peak (`int`): Most requests under way at once.
        seen (`Counter[str]`): Requests of each path: those that fail at first do so when it is 1.

    Raises:
        ValueError: If the port is taken.
    """

    def __init__(self, folder: str | Path, *, port: int = 0, latency: float = 0.0) -> None:
        self.folder, self.latency = Path(folder), latency
        self.requests = self.bytes = self.peak = self._under_way = 0
        self.seen = Counter[str]()
        if not 0 <= port <= 65535:
            raise ValueError(f"port is {port}, expected a number from 0 to 65535.")
        try:
            self._socket = socket.create_server(("127.0.0.1", port), backlog=1024)
        except OSError as error:
            raise ValueError(f"port {port} cannot be served on: {os.strerror(error.errno or 0)}.") from None
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> "Server":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="sample pictures", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # cancels what is under way
            runner.get_loop().create_task(self._listen())
            runner.get_loop().run_forever()

    async def _listen(self) -> None:
        async with await asyncio.start_server(self._connection, sock=self._socket) as server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            usable = True
            while usable:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                self._under_way += 1
                self.peak = max(self.peak, self._under_way)
                try:
                    if self.latency:
                        await asyncio.sleep(self.latency)
                    usable = await self._answer(head.split(b" ", 2)[1].decode("latin-1"), writer)
                finally:
                    self._under_way -= 1
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, IndexError):
            pass  # the client has hung up, or speaks no HTTP
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            writer.close()

    async def _answer(self, target: str, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; returns whether the connection can take another."""
        self.seen[target] += 1
        found = _TARGET.fullmatch(target)
        try:
            body = (self.folder / "pictures" / found["name"]).read_bytes() if found else None
        except OSError:
            body = None
        if found is None or body is None:
            return await self._send(writer, "404 Not Found", b"no such picture\n")
        behaviour, first = found["behaviour"], self.seen[target] == 1
        content_type = _CONTENT_TYPES.get(Path(found["name"]).suffix, "application/octet-stream")
        if behaviour == "server_error" and first:
            return await self._send(writer, "500 Internal Server Error")
        if behaviour == "busy" and first:
            return await self._send(writer, "429 Too Many Requests", headers="Retry-After: 1\r\n")
        if behaviour in _REDIRECTS:
            location = _REDIRECTS[behaviour].format(target=target, name=found["name"])
            return await self._send(writer, "302 Found", headers=f"Location: {location}\r\n")
        if behaviour == "cut" and first:
            await self._write(writer, _head("200 OK", content_type, len(body)) + body[: len(body) // 2])
            return False
        if behaviour in ("trickle", "huge", "endless"):
            await self._write(writer, _head("200 OK", content_type, 10**9 if behaviour == "huge" else None))
            slow = behaviour == "trickle"
            while True:  # until the client hangs up
                await self._write(writer, b"\xff" if slow else _ZEROS)
                await asyncio.sleep(0.1 if slow else 0)
        return await self._send(writer, "200 OK", body, content_type)

    async def _send(
        self,
        writer: asyncio.StreamWriter,
        status: str,
        body: bytes = b"",
        content_type: str = "text/plain",
        headers: str = "",
    ) -> bool:
        await self._write(writer, _head(status, content_type, len(body), headers) + body)
        return True

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        self.bytes += len(data)
        writer.write(data)
        await writer.drain()


_REDIRECTS = {
    "redirect": "/pictures/{name}",
    "redirect_loop": "{target}",
    "redirect_to_file": "file:///etc/passwd",
    "redirect_to_metadata": "http://169.254.169.254/latest/meta-data/",
    "redirect_to_private": "http://10.0.0.1/{name}",
}


def _head(status: str, content_type: str, length: int | None, headers: str = "") -> bytes:
    """The head of an answer; without a length, the body lasts as long as the connection."""
    size = "Connection: close" if length is None else f"Content-Length: {length}"
    return f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{size}\r\n{headers}\r\n".encode()
