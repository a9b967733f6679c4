"""How long `preview` takes over many rows, and over what: `python benchmarks/preview.py [--rows 100000]`.

A Parquet data set of `--rows` rows is written into a temporary folder: drawn catalogue pictures of many sizes (JPEG,
and one PNG in four; they repeat after `--pictures`), a title, a category and a price. `preview` runs over it twice, in
a process of its own: the first time `datasets` makes an Arrow file of it, and then that lies in its cache. Then it runs
over a table of the pictures' sizes alone, and last its parts are timed in this process.
"""

import argparse
import csv
import io
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Features, Image, Value
from PIL.Image import Resampling

from sft_phi3v.catalogue import draw_picture, draw_product
from sft_phi3v.collator import Collator
from sft_phi3v.data import check_rows, load_splits
from sft_phi3v.model import load_processor
from sft_phi3v.preview import fitting
from sft_phi3v.recipe import load_recipe

FEATURES = Features(
    {"image": Image(), "title": Value("string"), "category": Value("string"), "price": Value("float64")}
)


def drawn(count: int) -> list[tuple[bytes, tuple[int, int]]]:
    """Catalogue pictures of many sizes: their files, and width and height."""
    found = []
    for number in range(count):
        rng = random.Random(number)
        size = (rng.randint(200, 1000), rng.randint(200, 1000))
        picture = draw_picture(draw_product(rng), rng).resize(
            size, Resampling.BILINEAR if number % 4 else Resampling.NEAREST
        )
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG" if number % 4 else "PNG", **({"quality": 85} if number % 4 else {}))
        found.append((buffer.getvalue(), size))
    return found


def write(rows: int, pictures: int, folder: Path) -> int:
    """Writes `data/train-*.parquet` and `sizes.csv`; returns the mean size of a picture file in bytes."""
    files = drawn(pictures)
    (folder / "data").mkdir()
    with (folder / "sizes.csv").open("w", newline="") as table:
        sizes = csv.writer(table)
        sizes.writerow(["width", "height", "title", "category", "price"])
        for shard, start in enumerate(range(0, rows, 10_000)):
            numbers = range(start, min(start + 10_000, rows))
            titles = [f"Check Wool and Cashmere Scarf in Archive Beige {number}" for number in numbers]
            categories = [f"WOMENS SCARVES {number % 40}" for number in numbers]
            prices = [float(100 + number % 3000) for number in numbers]
            image = [{"bytes": files[number % pictures][0], "path": None} for number in numbers]
            arrays = [pa.array(image, FEATURES.arrow_schema.field("image").type), *map(pa.array, (titles, categories))]
            rest = pa.Table.from_arrays([*arrays, pa.array(prices)], schema=FEATURES.arrow_schema)
            pq.write_table(rest, folder / "data" / f"train-{shard:05d}.parquet", row_group_size=500)
            sizes.writerows(
                (*files[number % pictures][1], *texts)
                for number, *texts in zip(numbers, titles, categories, prices, strict=True)
            )
    return sum(len(content) for content, _ in files) // len(files)


def timed(name: str, rows: int, function: Callable[[], Any]) -> Any:
    """Runs a part; prints its seconds and its processor time, its children's included."""

    def busy() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    start, before = time.perf_counter(), busy()
    result = function()
    seconds, cpu = time.perf_counter() - start, busy() - before
    print(f"{name:<42} {seconds:>7.1f} s {cpu:>9.1f} s of CPU {1000 * cpu / rows:>8.3f} ms/row", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=300, help="different pictures (default: 300)")
    parser.add_argument("--num_crops", type=int, default=16)
    parser.add_argument("--model", default="recipes/tiny_base", help="folder or Hub id of a processor")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        datasets.disable_progress_bars()
        size = write(options.rows, options.pictures, folder)
        print(f"{options.rows:,} rows, pictures of {size / 1000:.0f} KB, {os.cpu_count()} cores")
        keys = {
            "model_name_or_path": options.model,
            "dataset_name": str(folder / "data"),
            "output_dir": str(folder / "out"),
        }
        keys |= {"num_crops": options.num_crops, "use_cpu": True, "bf16": False}
        keys |= {"disable_tqdm": True, "answer": "Product: {title}, Category: {category}, Full Price: {price}"}
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(keys))

        def preview(*arguments: str) -> None:
            command = [sys.executable, "-m", "sft_phi3v.preview", str(path), *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        timed("preview, the first time", options.rows, preview)
        timed("preview, again", options.rows, preview)
        timed("preview, from sizes", options.rows, lambda: preview("--sizes", str(folder / "sizes.csv")))
        parts(path, options.rows)


def parts(path: Path, rows: int) -> None:
    recipe = load_recipe([str(path)])
    collator = timed("  the processor", rows, lambda: Collator(load_processor(recipe)))
    splits = timed("  load_splits", rows, lambda: load_splits(recipe))
    checked = timed("  check_rows", rows, lambda: [check_rows(split, recipe) for split in splits])
    pairs = zip(splits, checked, strict=True)
    timed("  fitting", rows, lambda: [fitting(split, recipe, collator, found) for split, found in pairs])


if __name__ == "__main__":
    main()
