"""Daft's own download of pictures, to compare with: run by `benchmarks/prepare.py --daft PYTHON`, which has Daft.

Daft cannot be installed beside this project's pins (it wants pyarrow below 26), so this file imports nothing of it:

    daft_download.py URL ROWS FOLDER      download, decode and write Parquet
    daft_download.py TABLE                what becomes of each URL of a table that `sft_phi3v.demo --serve` serves
"""

import csv
import os
import sys
import time

os.environ["DO_NOT_TRACK"] = "1"

import daft
from daft import col
from daft.io import HTTPConfig, IOConfig


def download(url: str, rows: int, folder: str) -> None:
    table = daft.from_pydict({"url": [f"{url}/{number}" for number in range(rows)]})
    table = table.with_column("bytes", col("url").download(max_connections=64, on_error="null"))
    table = table.with_column("decoded", col("bytes").decode_image(on_error="null").not_null())
    table.write_parquet(folder)


def faults(path: str) -> None:
    with open(path, newline="") as file:
        urls = [row.get("imageurl") or row["image"] for row in csv.DictReader(file)]
    config = IOConfig(http=HTTPConfig(num_tries=3, read_timeout_ms=4000, connect_timeout_ms=2000))
    for url in urls:
        start = time.monotonic()
        table = daft.from_pydict({"url": [url]})
        table = table.with_column("bytes", col("url").download(on_error="null", io_config=config))
        found = table.with_column("picture", col("bytes").decode_image(on_error="null")).to_pydict()
        content, picture = found["bytes"][0], found["picture"][0]
        seen = f"picture {picture.shape}" if picture is not None else "null"
        print(f"{url}\t{content and len(content)} bytes\t{seen}\t{time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    daft.set_runner_native()
    if len(sys.argv) == 2:
        faults(sys.argv[1])
    else:
        download(sys.argv[1], int(sys.argv[2]), sys.argv[3])
