"""How fast `prepare` is against a server with latency, and how much memory it takes: `python benchmarks/prepare.py`.

A server on loopback, in a process of its own on the same cores, answers each request after `--latency` seconds with one
of 2,000 drawn pictures. Beside it: the loop that everybody copies (one request after the other, then a decode), and the
checks alone, of pictures in memory on one core, which is what `prepare` can be bounded by at best.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import yaml
from PIL import Image, ImageDraw

from sft_phi3v.catalogue import draw_picture, draw_product
from sft_phi3v.pictures import check_picture

PICTURES = 2000


def drawn(count: int) -> list[bytes]:
    """Catalogue pictures; each of 50 drawings with its own little mark."""
    drawings = [draw_picture(draw_product(random.Random(number)), random.Random(number)) for number in range(50)]
    found = []
    for number in range(count):
        picture = drawings[number % 50].copy()
        mark = (number * 37 % 256, number // 256 * 16 % 256, number % 251)
        ImageDraw.Draw(picture).rectangle((0, 0, 23, 23), fill=mark)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def serve(latency: float, port: Any) -> None:
    pictures = drawn(PICTURES)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            time.sleep(latency)
            body = pictures[int(self.path[1:]) % PICTURES]
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(body))
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 1024

    server = Server(("127.0.0.1", 0), Handler)
    port.put(server.server_address[1])
    server.serve_forever()


def one_by_one(url: str, count: int) -> float:
    start = time.perf_counter()
    for number in range(count):
        Image.open(io.BytesIO(urllib.request.urlopen(f"{url}/{number}").read())).load()
    return count / (time.perf_counter() - start)


def check_alone(count: int) -> float:
    pictures = drawn(count)
    start = time.perf_counter()
    for content in pictures:
        check_picture(content, min_side=32, max_pixels=10**8)
    return count / (time.perf_counter() - start)


def prepare(url: str, rows: int, folder: Path) -> dict[str, float]:
    lines = ["imageurl,title", *(f"{url}/{number},Thing {number}" for number in range(rows))]
    (folder / "shop.csv").write_text("\n".join(lines) + "\n")
    keys = {"model_name_or_path": "none", "output_dir": str(folder / "out"), "use_cpu": True, "bf16": False}
    keys |= {"source": str(folder / "shop.csv"), "source_image_column": ["imageurl"], "answer": "{title}"}
    keys |= {"dataset_name": str(folder / f"data{rows}"), "duplicates": "keep", "near_duplicates": None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return measured([sys.executable, "-m", "sft_phi3v.prepare", str(folder / "recipe.yaml")], rows)


def measured(command: list[str], rows: int) -> dict[str, float]:
    """Runs a command; returns its rate, its processor time and the most memory that all its processes held together."""
    start, peak, busy = time.perf_counter(), 0, dict[int, float]()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(one.memory_info().rss for one in tree))
            busy |= {one.pid: one.cpu_times().user + one.cpu_times().system for one in tree}
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.2)
    seconds = time.perf_counter() - start
    assert process.returncode == 0, f"{command} ended with {process.returncode}"
    rates = {"rows": rows, "seconds": seconds, "rows_per_s": rows / seconds}
    return rates | {"peak_mb": peak / 1e6, "cpu_ms_per_row": 1000 * sum(busy.values()) / rows}


def show(name: str, found: dict[str, float], loop: float) -> None:
    found |= {"times_one_by_one": found["rows_per_s"] / loop}
    print(f"{name:<8}" + json.dumps({key: round(value, 1) for key, value in found.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10000], help="default: 1000 10000")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds (default: 0.05)")
    parser.add_argument("--daft", metavar="PYTHON", help="also Daft's own download, by this interpreter, which has it")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    server = context.Process(target=serve, args=(options.latency, port), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{port.get()}"
    loop = one_by_one(url, 100)
    print(f"{os.cpu_count()} cores, latency {1000 * options.latency:g} ms")
    print(f"one by one: {loop:.1f} rows/s; checks alone, one core: {check_alone(500):.0f} rows/s", flush=True)
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            show("prepare", prepare(url, rows, Path(folder)), loop)
        if options.daft:
            with tempfile.TemporaryDirectory() as folder:
                script = str(Path(__file__).with_name("daft_download.py"))
                show("daft", measured([options.daft, script, url, str(rows), folder], rows), loop)
    server.terminate()


if __name__ == "__main__":
    main()
