"""From a table of URLs with planted faults to a data set: what is dropped and why, what stays to the last byte."""

import io
import json
import os
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sft_phi3v import prepare as preparing
from sft_phi3v import preview, run
from sft_phi3v.catalogue import draw_picture, draw_product
from sft_phi3v.data import load_splits, to_examples
from sft_phi3v.demo import what_next
from sft_phi3v.recipe import load_recipe
from sft_phi3v.samples import FORMS, write_source

REPOSITORY = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(240)


def drawn(number):
    rng = random.Random(number)
    return draw_picture(draw_product(rng), rng)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def good_picture(number):
    return encoded(drawn(number), quality=90)


def bomb():
    """A 30,000×30,000 PNG of black in a few hundred kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 30_000 // 8)) for _ in range(30_000)) + packer.flush()
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def rotated(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, quality=90, exif=exif)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
HTML = b"<!doctype html><title>Not here</title>" + b"x" * 500
FRAMES = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
DEEP = Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64))

# name → (body, content type), or what the handler does instead; and the reason or note that must stand in the manifest
FAULTS = {
    "missing": ((404, {}), "http_404"),
    "gone_wrong_once": ("500 then", None),
    "busy_once": ("429 then", None),
    "cut_once": ("cut then", None),
    "trickle": ("trickle", "timeout"),
    "truncated": ((encoded(drawn(1001))[:3000], "image/jpeg"), "truncated"),
    "page": ((HTML, "text/html"), "content_type"),
    "page_as_jpeg": ((HTML, "image/jpeg"), "not_a_picture"),
    "bomb": ("bomb", "too_many_pixels"),
    "text_type": ((encoded(drawn(1002)), "text/plain"), "content_type"),
    "binary_type": ((encoded(drawn(1003)), "application/octet-stream"), None),
    "huge": ("huge", "too_large"),
    "endless": ("endless", "too_large"),
    "loop": ((302, {"Location": "/loop"}), "redirects"),
    "to_file": ((302, {"Location": "file:///etc/passwd"}), "address"),
    "to_private": ((302, {"Location": "http://10.0.0.1/a.jpg"}), "address"),
    "to_metadata": ((302, {"Location": "http://169.254.169.254/latest"}), "address"),
    "moved": ((302, {"Location": "/good/3"}), "duplicate"),
    "same": ((encoded(drawn(5), quality=90), "image/jpeg"), "duplicate"),
    "dot": ((encoded(Image.new("RGB", (1, 1)), "PNG"), "image/png"), "too_small"),
    "moving": ((encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "image/gif"), "animated"),
    "cmyk": ((encoded(drawn(1004).convert("CMYK")), "image/jpeg"), "note:cmyk"),
    "lying": ((rotated(drawn(1005).resize((192, 96))), "image/jpeg"), "note:exif_rotated"),
    "deep": ((encoded(DEEP, "PNG"), "image/png"), "note:16_bit"),
    "svg": ((SVG, "image/svg+xml"), "not_a_picture"),
    "smaller": ((encoded(drawn(7).resize((160, 160)), quality=80), "image/jpeg"), "note:near_duplicate"),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, name = self.server, self.path.partition("?")[0].rpartition("/")[2]
        server.seen[self.path] += 1
        with server.lock:
            server.under_way += 1
            server.peak = max(server.peak, server.under_way)
        time.sleep(server.latency)
        with server.lock:
            server.under_way -= 1
        if self.path.startswith("/good/"):
            return self.send(good_picture(int(name)), "image/jpeg")
        what, _ = FAULTS[name]
        first = server.seen[self.path] == 1
        if isinstance(what, tuple) and isinstance(what[0], bytes):
            return self.send(*what)
        if isinstance(what, tuple):
            return self.answer(what[0], what[1])
        if what == "bomb":
            return self.send(server.bomb, "image/png")
        if what == "500 then" and first:
            return self.answer(500, {})
        if what == "429 then" and first:
            return self.answer(429, {"Retry-After": "1"})
        body = encoded(drawn(2000 + len(name)), quality=90)
        if what == "cut then" and first:
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return None
        if what in ("trickle", "huge", "endless"):
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            if what == "huge":
                self.send_header("Content-Length", str(10**9))
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            try:
                for _ in range(2000):
                    self.wfile.write(b"\xff" if what == "trickle" else bytes(100_000))
                    time.sleep(0.1 if what == "trickle" else 0)
            except OSError:
                pass
            return None
        return self.send(body, "image/jpeg")

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, body, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 256

        def handle_error(self, request, client_address):
            pass  # a client that hangs up, as it should here

    server = Server(("127.0.0.1", 0), Handler)
    server.seen, server.latency, server.bomb = Counter(), 0.0, bomb()
    server.lock, server.under_way, server.peak = threading.Lock(), 0, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


def write_table(path, server, *, good, faults=True):
    rows = [{"imageurl": f"{server.url}/good/{n}", "title": f"Thing {n}", "code": f"{n:05d}"} for n in range(good)]
    if faults:
        rows += [{"imageurl": f"{server.url}/{name}", "title": f"Fault {name}", "code": name} for name in FAULTS]
        same = {"moved": 3, "same": 5}
        for row in rows:
            if row["code"] in same:
                row["title"] = f"Thing {same[row['code']]}"
        rows += [
            {"imageurl": "", "title": "No picture", "code": "none"},
            {"imageurl": f"{server.url}/good/900", "title": "", "code": "untitled"},
            {"imageurl": f"{server.url}/good/901", "title": "N/A", "code": "placeholder"},
            {"imageurl": f"{server.url}/good/902", "title": "One", "code": "conflict"},
            {"imageurl": f"{server.url}/good/902", "title": "Other", "code": "conflict"},
            {"imageurl": "s3://bucket/a.jpg", "title": "Elsewhere", "code": "scheme"},
        ]
    pd.DataFrame(rows).to_csv(path, index=False)
    return pd.DataFrame(rows)


@pytest.fixture
def write_prepare(tmp_path, write_recipe):
    def write(source, **changes):
        keys = {
            "source": str(source),
            "source_image_column": "imageurl",
            "dataset_name": str(tmp_path / "data"),
            "answer": "{title}.",
            "held_out": 0.2,
            "fetch_timeout": 2,
            "fetch_attempts": 3,
            "max_bytes": 5_000_000,
            "workers": 2,
        }
        return write_recipe(**(keys | changes))

    return write


def manifest(folder):
    return pq.read_table(folder / "manifest.parquet").to_pandas()


def test_every_fault_stands_in_the_manifest_and_every_good_row_arrives_to_the_last_byte(
    server, tmp_path, write_prepare, capsys
):
    table = write_table(tmp_path / "shop.csv", server, good=80)
    path = write_prepare(tmp_path / "shop.csv")
    preparing.main([path])
    printed = capsys.readouterr().out
    assert "dropped" in printed and "http_404 1" in printed

    lines = manifest(tmp_path / "data")
    assert len(lines) == len(table) and list(lines["row"]) == list(range(len(table)))
    by_code = dict(zip(table["code"], lines.to_dict("records"), strict=True))
    for name, (_, expected) in FAULTS.items():
        line = by_code[name]
        if expected is None or expected.startswith("note:"):
            assert line["status"] == "kept", (name, line)
            assert expected is None or expected.removeprefix("note:") in line["notes"], (name, line)
        else:
            assert (line["status"], line["reason"]) == ("dropped", expected), (name, line)
            assert line["detail"]
    expected = {"none": "no_picture", "untitled": "empty_field", "placeholder": "placeholder", "scheme": "address"}
    assert {code: by_code[code]["reason"] for code in expected} == expected
    assert list(lines["reason"][table["code"] == "conflict"]) == ["conflict", "conflict"]
    assert (by_code["gone_wrong_once"]["attempts"], by_code["trickle"]["attempts"]) == (2, 1)
    # The second 902 is one of two URLs that stand twice: the picture was fetched once.
    assert server.seen["/good/902"] == 1

    recipe = load_recipe([path])
    train, test = load_splits(recipe)
    kept = lines[lines["status"] == "kept"]
    assert (len(train), len(test)) == tuple((kept["split"] == name).sum() for name in ("train", "test"))
    good = {f"{n:05d}": encoded(drawn(n), quality=90) for n in range(80)}
    arrived = {}
    for rows in (train, test):
        for row in rows.with_format("arrow")[:].to_pylist():
            arrived[row["code"]] = row["image"]["bytes"]
    assert {code: arrived[code] for code in good} == good
    assert arrived["cmyk"] == FAULTS["cmyk"][0][0] and arrived["lying"] == FAULTS["lying"][0][0]
    deep = Image.open(io.BytesIO(arrived["deep"]))
    assert deep.mode == "L" and np.array_equal(np.asarray(deep), np.asarray(DEEP) >> 8)
    upright = to_examples(train, recipe)
    assert all(example["images"][0].size[1] > 30 for example in upright)
    assert str(tmp_path) not in (tmp_path / "data" / "README.md").read_text()

    # Near duplicates, and everything else that forms a cluster, stand on one side.
    assert (lines[lines["status"] == "kept"].groupby("cluster")["split"].nunique() == 1).all()
    seven = lines.iloc[7]
    assert seven["cluster"] == by_code["smaller"]["cluster"] and "near_duplicate" in seven["notes"]

    # Again: only what failed is fetched, and the data set is the same.
    before = {file.name: file.read_bytes() for file in (tmp_path / "data" / "data").iterdir()}
    server.seen.clear()
    preparing.main([path])
    assert not [url for url in server.seen if url.startswith("/good/")] and server.seen["/missing"] == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "data" / "data").iterdir()} == before


def test_killed_at_any_moment_it_goes_on_to_the_identical_data_set(server, tmp_path, write_prepare):
    write_table(tmp_path / "shop.csv", server, good=300, faults=False)
    path = write_prepare(tmp_path / "shop.csv", dataset_name=str(tmp_path / "whole"))
    command = [sys.executable, "-m", "sft_phi3v.prepare", path]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole" / "data").iterdir()}

    server.seen.clear()
    server.latency = 0.3
    rng = random.Random(0)
    command += ["--dataset_name", str(tmp_path / "cut")]
    try:
        for _ in range(5):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(rng.uniform(2.5, 5))
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (tmp_path / "cut").exists() or (tmp_path / "cut" / "README.md").exists()
            time.sleep(0.6)  # its workers notice, and end
    finally:
        server.latency = 0.0
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert {file.name: file.read_bytes() for file in (tmp_path / "cut" / "data").iterdir()} == whole


CLUSTER = """
import sys, threading, time
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
import os
os.environ["RAY_ADDRESS"] = cluster.address
def strike():
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.05)
    cluster.remove_node(second, allow_graceful=False)
    print("a node was killed", flush=True)
if sys.argv[2]:
    threading.Thread(target=strike, daemon=True).start()
from sft_phi3v import prepare
prepare.main([sys.argv[1], "--engine", "ray", *sys.argv[3:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["two", "one is killed"])
def test_a_cluster_of_two_workers_makes_the_same_data_set(server, tmp_path, write_prepare, killed):
    pytest.importorskip("ray", reason="pip install -c constraints.txt -e .[cluster]")
    write_table(tmp_path / "shop.csv", server, good=600)
    path = write_prepare(tmp_path / "shop.csv", dataset_name=str(tmp_path / "local"))
    preparing.main([path])
    server.latency = 0.2
    watched = tmp_path / "cluster.work" / "pictures" if killed else ""
    command = [sys.executable, "-W", "ignore", "-c", CLUSTER, path, str(watched)]
    command += ["--dataset_name", str(tmp_path / "cluster")]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    finally:
        server.latency = 0.0
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("a node was killed" in done.stdout) == killed
    local, cluster = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "data").iterdir()} for name in ("local", "cluster")
    )
    assert local == cluster
    assert manifest(tmp_path / "local")["reason"].equals(manifest(tmp_path / "cluster")["reason"])


@pytest.mark.parametrize("moment", ["at once", "later"])
def test_ctrl_c_stops_soon_and_says_that_nothing_is_lost(server, tmp_path, write_prepare, moment):
    write_table(tmp_path / "shop.csv", server, good=300, faults=False)
    server.seen.clear()
    server.latency = 2.0
    command = [sys.executable, "-m", "sft_phi3v.prepare", write_prepare(tmp_path / "shop.csv", fetch_connections=8)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while not (server.seen if moment == "later" else (tmp_path / "data.work" / "lock").exists()):
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, said = process.communicate(timeout=60)
    finally:
        server.latency = 0.0
        process.kill()
    assert process.returncode == 1
    assert said.splitlines()[-1] == "stopped. Nothing is lost: type the command again to go on."
    assert "Traceback" not in said


def test_paths_several_columns_groups_and_rows_added_later(tmp_path, write_recipe):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number in range(60):
        for side in ("front", "back"):
            drawn(2 * number + (side == "back")).save(folder / f"{number}_{side}.png")
        sides = {side: f"{number}_{side}.png" for side in ("front", "back")}
        rows.append({**sides, "product": number // 2, "t": f"x{number}"})
    rows[3]["back"] = "nowhere.png"
    pd.DataFrame(rows[:40]).to_csv(folder / "t.csv", index=False)
    path = write_recipe(
        source=str(folder / "t.csv"),
        source_image_column=["front", "back"],
        dataset_name=str(tmp_path / "data"),
        answer="{t}",
        group_column="product",
        held_out=10,
        workers=1,
    )
    preparing.main([path])
    first = manifest(tmp_path / "data")
    assert first["reason"][3] == "no_file" and "nowhere.png" in first["detail"][3]
    assert (first["split"] == "test").sum() in (9, 10, 11)
    assert (first[first["split"].notna()].assign(p=lambda x: x["row"] // 2).groupby("p")["split"].nunique() == 1).all()
    train, _ = load_splits(load_recipe([path]))
    assert len(to_examples(train, load_recipe([path]))[0]["images"]) == 2
    assert {"front", "back"} <= set(train.column_names)

    shuffled = [*rows[40:], *rows[:40]]
    pd.DataFrame(shuffled).to_csv(folder / "t.csv", index=False)
    preparing.main([path])
    second = manifest(tmp_path / "data")
    assert list(second["split"][20:].fillna("")) == list(first["split"].fillna(""))


def test_burberrys_recipe_from_its_urls_to_a_trained_adapter(server, tmp_path, tiny_folder, monkeypatch, capsys):
    columns = "website_name competence_date country_code currency_code brand category1_code category2_code flg_discount"
    rows = []
    for number in range(40):
        product = draw_product(random.Random(number))
        rows.append(
            dict.fromkeys(columns.split(), "x")
            | {"category3_code": product.category3_code, "product_code": f"80{number:05d}", "title": product.title}
            | {"itemurl": "https://example.com", "imageurl": f"{server.url}/good/{number}", "price": product.full_price}
            | {"full_price": product.full_price, "full_price_eur": 1, "price_eur": 1}
        )
    pd.DataFrame(rows).to_csv(tmp_path / "burberry.csv", index=False)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("WANDB_PROJECT", "before")  # the recipe sets it; put back afterwards
    changes = {"source": tmp_path / "burberry.csv", "dataset_name": tmp_path / "data", "output_dir": tmp_path / "out"}
    changes |= {"model_name_or_path": tiny_folder, "dtype": "float32", "bf16": "false", "use_cpu": "true"}
    changes |= {"num_crops": 1, "max_steps": 1, "gradient_accumulation_steps": 1, "report_to": "none", "eval_rows": 2}
    changes |= {"load_best_model_at_end": "false", "dataloader_num_workers": 0, "max_new_tokens": 4, "workers": 1}
    argv = ["recipes/burberry.yaml"]
    for key, value in changes.items():
        argv += [f"--{key}", str(value)]
    with pytest.raises(SystemExit, match=r"python -m sft_phi3v.prepare recipes/burberry.yaml --source .*\nor let"):
        run.main(argv)
    preparing.main(argv)
    capsys.readouterr()
    preview.main([*argv])
    assert "⟦Product: " in capsys.readouterr().out
    run.main(argv)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "after" in json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_the_run_prepares_where_it_is_told_to(server, tmp_path, write_prepare):
    write_table(tmp_path / "shop.csv", server, good=12, faults=False)
    run.main([write_prepare(tmp_path / "shop.csv", workers=1, max_steps=1), "--prepare", "true"])
    assert (tmp_path / "data" / "manifest.parquet").is_file()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_source_with_its_own_test_split_strata_downscaling_and_the_upload(tmp_path, write_recipe, monkeypatch):
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(30):
        drawn(number).resize((800, 600)).save(folder / f"{number}.png")
    lines = [json.dumps({"image": f"{n}.png", "t": f"T{n}", "kind": "ab"[n % 2]}) for n in range(30)]
    (folder / "train.jsonl").write_text("\n".join(lines[:24]))
    (folder / "test.jsonl").write_text("\n".join([*lines[24:], lines[5]]))
    changes = {"source": str(folder), "dataset_name": str(tmp_path / "data"), "answer": "{t}", "workers": 1}
    path = write_recipe(**changes, num_crops=1, downscale=True)
    preparing.main([path])
    found = manifest(tmp_path / "data")
    assert found["reason"].dropna().to_dict() == {5: "duplicate"}  # kept where it is not learned
    assert found["split"].value_counts().to_dict() == {"train": 23, "test": 7}
    assert {"width": list(found["width"][0]), "height": list(found["height"][0])} == {"width": [336], "height": [252]}
    train, _ = load_splits(load_recipe([path]))
    assert to_examples(train, load_recipe([path]))[0]["images"][0].size == (336, 252)
    with pytest.raises(ValueError, match="were downscaled for 1"):
        load_splits(load_recipe([path, "--num_crops", "4"]))

    (folder / "test.jsonl").unlink()
    path = write_recipe(**changes, held_out=0.25, stratify_column="kind", push="me/rows")
    sent = []
    monkeypatch.setattr(preparing.HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(preparing.HfApi, "create_repo", lambda self, name, **kw: sent.append((name, kw)) or "URL")
    monkeypatch.setattr(preparing.HfApi, "upload_folder", lambda self, **kw: sent.append(("upload", kw)))
    preparing.main([path, "--dataset_name", str(tmp_path / "strata")])
    found = manifest(tmp_path / "strata")
    kinds = found["row"] % 2
    assert [(found["split"][kinds == kind] == "test").sum() for kind in (0, 1)] == [3, 3]
    assert sent[0] == ("me/rows", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert sent[1][1]["folder_path"] == str(tmp_path / "strata")


@pytest.mark.parametrize("form", FORMS)
def test_the_sample_of_each_form_goes_through_the_command_that_it_prints(form, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    planted = write_source(tmp_path / "sample", form, rows=60, faults=0.3)
    told = what_next(form, str(tmp_path / "sample"), planted, {"rows": 60}, None)
    argv = shlex.split(re.search(r"sft_phi3v\.prepare (.*)", told)[1].replace("data/sample", str(tmp_path / "data")))
    argv += ["--workers", "1", "--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tiny_folder)]
    if form == "burberry":
        argv += ["--held_out", "0.2"]
    preparing.main(argv)
    lines = manifest(tmp_path / "data")
    for fault in planted:
        line = lines.iloc[fault.row]
        assert (None if pd.isna(line["reason"]) else line["reason"]) == fault.reason, (fault, line["detail"])
        assert set(fault.notes) <= set(line["notes"]), fault
    assert set(lines.index[lines["reason"].notna()]) == {fault.row for fault in planted if fault.reason}
    preview.main(argv)
    counted = load_splits(load_recipe(argv))
    assert sum(map(len, counted)) == (lines["status"] == "kept").sum()


def test_what_would_be_lost_or_leak_is_not(tmp_path, write_prepare, server, capsys):
    write_table(tmp_path / "shop.csv", server, good=40, faults=False)
    table = pd.read_csv(tmp_path / "shop.csv", dtype=str)
    table["imageurl"] = table["imageurl"].str.replace("http://", "http://me:geheim@") + "?token=geheim"
    table.to_csv(tmp_path / "shop.csv", index=False)
    path = write_prepare(tmp_path / "shop.csv", workers=1)
    preparing.main([path])
    for file in (tmp_path / "data").rglob("*.*"):
        content = pq.read_table(file).to_pandas().to_string() if file.suffix == ".parquet" else file.read_text()
        assert "geheim" not in content and str(tmp_path) not in content, file
    assert "token=…" in manifest(tmp_path / "data")["picture"][0][0]

    # Other settings than the last time are heeded.
    first = manifest(tmp_path / "data")
    preparing.main([path, "--held_out", "0.5"])
    assert "the split is drawn anew: held_out changed" in capsys.readouterr().out
    assert (manifest(tmp_path / "data")["split"] == "test").sum() > (first["split"] == "test").sum() + 5
    preparing.main([path, "--max_bytes", "9000"])
    small = manifest(tmp_path / "data")
    assert set(small["reason"].dropna()) == {"too_large"} and (small["status"] == "kept").any()

    # A row of no use leaves its reason behind, also where no row is of use; and the last good data set stays.
    with pytest.raises(SystemExit, match=r"no row can be used \(too_large 40\). What became of each row stands in"):
        preparing.main([path, "--max_bytes", "100"])
    assert (pq.read_table(tmp_path / "data.work" / "manifest.parquet")["reason"].to_pandas() == "too_large").all()
    assert manifest(tmp_path / "data").equals(small)

    # What this command did not write is not removed with what it did.
    (tmp_path / "data" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"holds notes.txt, which this command did not write"):
        preparing.main([path])
    (tmp_path / "data" / "notes.txt").unlink()
    table.to_csv(tmp_path / "data" / "data" / "shop.csv", index=False)
    with pytest.raises(SystemExit, match="lies in `dataset_name`"):
        preparing.main([path, "--source", str(tmp_path / "data" / "data" / "shop.csv")])
    with pytest.raises(SystemExit, match=r"^error: .*Not a directory"):
        preparing.main([path, "--dataset_name", str(tmp_path / "shop.csv" / "x")])


@pytest.mark.parametrize("value", [3, {"url": "a.jpg"}, [[1]]])
def test_a_column_that_cannot_hold_pictures_is_named(tmp_path, write_recipe, value):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": value, "t": "a"}))
    with pytest.raises(SystemExit, match=r"`source_image_column` 'image' holds .*, expected URLs, paths, bytes"):
        preparing.main(
            [write_recipe(source=str(tmp_path / "rows.jsonl"), dataset_name=str(tmp_path / "d"), answer="{t}")]
        )


def test_no_more_is_fetched_at_once_than_is_allowed(server, tmp_path, write_prepare):
    write_table(tmp_path / "shop.csv", server, good=600, faults=False)
    server.latency, server.peak = 0.02, 0
    try:
        preparing.main([write_prepare(tmp_path / "shop.csv", fetch_per_host=3, workers=4)])
    finally:
        server.latency = 0.0
    assert 1 < server.peak <= 3  # three as a rule; on a busy machine they may never all meet


def test_conversations_with_several_no_or_unusable_pictures(tmp_path, write_recipe):
    folder = tmp_path / "talk"
    folder.mkdir()
    for number in range(24):
        drawn(number).save(folder / f"{number}.png")

    def talk(number, content):
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": f"Answer {number}."}]
        return {"images": [f"{n}.png" for n in range(number, number + number % 3)], "messages": turns}

    rows = [talk(number, f"Question {number}?") for number in range(22)]
    rows[4]["messages"] = rows[4]["messages"][:1]
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = write_recipe(source=str(folder), dataset_name=str(tmp_path / "data"), answer=None, workers=1, held_out=3)
    preparing.main([path])
    found = manifest(tmp_path / "data")
    assert found["reason"].dropna().to_dict() == {4: "messages"}
    train, test = load_splits(load_recipe([path]))
    counts = [len(example["images"]) for part in (train, test) for example in to_examples(part, load_recipe([path]))]
    assert sorted(counts) == sorted(number % 3 for number in range(22) if number != 4)

    for row in rows:
        del row["images"]
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    preparing.main([path])
    train, _ = load_splits(load_recipe([path]))
    assert train.column_names[0] == "messages" and len(train) == 18


def test_webdataset_shards(tmp_path, write_recipe):
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "train-0.tar", "w") as tar:
        for number in range(20):
            for name, body in (
                (f"{number:03d}.jpg", encoded(drawn(number))),
                (f"{number:03d}.json", json.dumps({"title": f"T{number}", "price": number}).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    path = write_recipe(source=str(shards), dataset_name=str(tmp_path / "data"), answer="{title}: {price}", workers=1)
    preparing.main([path])
    train, test = load_splits(load_recipe([path]))
    assert len(train) + len(test) == 20 and {"title", "price", "image"} <= set(train.column_names)
    assert str(tmp_path) not in str(manifest(tmp_path / "data").to_dict())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"source_image_column": "picture"}, "`source_image_column` is 'picture'"),
        ({"group_column": "sku"}, "`group_column` is 'sku'"),
        ({"answer": "{name}"}, "`answer` reads {name}"),
        ({"source": "nowhere/shop.csv"}, "`source` is 'nowhere/shop.csv'"),
        ({"downscale": True}, "`downscale: true` needs `num_crops`"),
        ({"push": "me"}, "`push` is 'me'"),
        ({"near_duplicates": 40}, "`near_duplicates` is 40"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_fetched(tmp_path, write_prepare, changes, error):
    pd.DataFrame({"imageurl": ["http://127.0.0.1:1/a.jpg"], "title": ["a"]}).to_csv(tmp_path / "s.csv", index=False)
    keys = {"source": str(tmp_path / "s.csv")} | changes
    with pytest.raises(SystemExit) as stopped:
        preparing.main([write_prepare(keys.pop("source"), **keys)])
    assert error in str(stopped.value)
    assert not (tmp_path / "data").exists()


def test_a_folder_of_something_else_is_not_overwritten(tmp_path, write_prepare):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match=r"holds thesis.txt, which this command did not write"):
        preparing.main([write_prepare("s.csv")])
    assert (tmp_path / "data" / "thesis.txt").read_text() == "years of work"
