import io
import random
from pathlib import Path

import pytest
from datasets import DatasetDict, load_dataset
from PIL import Image

from sft_phi3v.catalogue import COLOURS, KINDS, PATTERNS, SIZES, Product, draw_picture, draw_product, write_catalogue


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("catalogue"), rows=300, test_rows=60, seed=3)


@pytest.fixture(scope="module")
def catalogue(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetDict:
    return load_dataset(str(folder), cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_columns_are_those_of_burberry(catalogue: DatasetDict) -> None:
    columns = ["product_code", "title", "category3_code", "full_price", "image"]
    assert {split: data.column_names for split, data in catalogue.items()} == {"train": columns, "test": columns}
    assert (len(catalogue["train"]), len(catalogue["test"])) == (300, 60)
    row = catalogue["train"][0]
    assert row["image"].size == (192, 192) and row["image"].mode == "RGB"
    assert row["category3_code"].isupper() and isinstance(row["full_price"], float)


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_catalogue(tmp_path / "again", rows=300, test_rows=60, seed=3)
    other = write_catalogue(tmp_path / "other", rows=300, test_rows=60, seed=4)
    for name in ("train.parquet", "test.parquet"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
        assert (folder / name).read_bytes() != (other / name).read_bytes()


def test_rows_are_distinct(catalogue: DatasetDict) -> None:
    rows = [row for split in catalogue.values() for row in split.with_format("arrow")[:].to_pylist()]
    assert len({row["product_code"] for row in rows}) == len(rows)
    assert len({row["image"]["bytes"] for row in rows}) == len(rows)
    assert len({row["title"] for row in rows}) > 200


def test_held_out_pairs_are_in_half_of_test_and_never_in_train(catalogue: DatasetDict) -> None:
    def pairs(split: str) -> list[tuple[str, str]]:
        return [tuple(title.lower().split()[:-3:-1]) for title in catalogue[split]["title"]]

    held_out = {(kind, colour) for kind in KINDS for colour in COLOURS if _product(kind, colour).held_out}
    assert len(held_out) == 2 * len(KINDS)
    assert not held_out & set(pairs("train"))
    assert sum(pair in held_out for pair in pairs("test")) == 30


def test_no_category_is_a_good_guess(catalogue: DatasetDict) -> None:
    categories = catalogue["test"]["category3_code"]
    assert set(categories) == {category for category, _ in KINDS.values()}
    assert max(categories.count(category) for category in categories) < 0.35 * len(categories)


def test_title_category_and_price_follow_from_the_picture() -> None:
    assert _product("coat", "red").title == "Red Coat"
    large = Product(kind="trousers", colour="black", pattern="dotted", size="large", background="sky")
    assert (large.title, large.category3_code, large.full_price) == ("Large Dotted Black Trousers", "TROUSERS", 1070.0)
    for kind in KINDS:
        prices = [Product(kind, "red", pattern, size, "grey").full_price for size in SIZES for pattern in PATTERNS]
        assert len(set(prices)) == len(SIZES) * len(PATTERNS)


def test_every_fact_changes_the_pixels() -> None:
    facts = {"kind": "hat", "colour": "blue", "pattern": "dotted", "size": "large", "background": "rose"}
    first = Product(kind="coat", colour="red", pattern="plain", size="small", background="grey")
    pixels = draw_picture(first, random.Random(0)).tobytes()
    assert pixels == draw_picture(first, random.Random(0)).tobytes()
    for fact, value in facts.items():
        changed = Product(**{**vars(first), fact: value})
        assert draw_picture(changed, random.Random(0)).tobytes() != pixels


def test_draw_product_keeps_the_two_sides_apart() -> None:
    rng = random.Random(0)
    assert not any(draw_product(rng, held_out=False).held_out for _ in range(200))
    assert {draw_product(rng).held_out for _ in range(200)} == {True, False}
    assert all(draw_product(rng, held_out=True).held_out for _ in range(50))


def test_pictures_are_small_jpegs(catalogue: DatasetDict) -> None:
    pictures = catalogue["test"].with_format("arrow")[:].column("image").to_pylist()
    assert all(Image.open(io.BytesIO(picture["bytes"])).format == "JPEG" for picture in pictures)
    assert sum(len(picture["bytes"]) for picture in pictures) / len(pictures) < 20_000


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row per split, got rows=5 and test_rows=0"):
        write_catalogue(tmp_path, rows=5, test_rows=0)


def _product(kind: str, colour: str) -> Product:
    return Product(kind=kind, colour=colour, pattern="plain", size="medium", background="grey")
