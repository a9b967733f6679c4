"""The sample sources: every form is read as meant, every planted fault is what it says, and the server misbehaves."""

import asyncio
import http.client
import io
import json
import struct
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, load_dataset
from PIL import Image, ImageOps

from sft_phi3v import samples
from sft_phi3v.samples import FAULTS, FORMS, Server, faults_of, source_path, write_source

BUILDERS = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}
TABLE = {"product_code", "title", "category3_code", "full_price"}


def read(folder: Path, form: str) -> Dataset:
    source, cache = source_path(folder, form), str(folder.with_name(f"{folder.name}.cache"))
    if source.suffix in BUILDERS:
        rows = load_dataset(BUILDERS[source.suffix], data_files=str(source), cache_dir=cache)
    else:
        rows = load_dataset(str(source), cache_dir=cache)
    return rows["train"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def planted_in(folder: Path, kinds: list[str], **options: object) -> list[dict[str, str | None]]:
    """A CSV source in which each of the faults stands once, in rows 1, 3, 5, …; its rows as text."""
    write_source(folder, "csv", rows=2 * len(kinds), faults=0.5, kinds=kinds, **options)
    table = pd.read_csv(folder / "rows.csv", dtype=str, keep_default_na=False)
    return table.to_dict("records")


def picture_of(folder: Path, row: dict[str, str]) -> bytes:
    return (folder / "pictures" / row["image"].rpartition("/")[2]).read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_by_datasets_and_its_bytes_follow_from_the_arguments(form: str, tmp_path: Path) -> None:
    options = {"rows": 24, "faults": 0.25, "distinct": 8}
    planted = write_source(tmp_path / "one", form, seed=1, **options)
    assert write_source(tmp_path / "two", form, seed=1, **options) == planted
    write_source(tmp_path / "three", form, seed=2, **options)
    one, two, three = (files(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    pictures = {name for name in one if Path(name).suffix in (".jpg", ".parquet", ".tar")}
    assert pictures
    same = {one[name] for name in pictures} & {three.get(name) for name in pictures}
    assert same <= {samples._PAGE}

    rows = read(tmp_path / "one", form)
    assert len(rows) == 24
    columns = {
        "embedded": {"image"},
        "folder": {"image"},
        "webdataset": {"jpg", "json", "__key__", "__url__"},
        "classes": {"image", "label"},
        "conversations": {"images", "messages"},
    }
    if form == "burberry":
        assert " ".join(rows.column_names) == (
            "website_name competence_date country_code currency_code brand category1_code category2_code "
            "category3_code product_code title itemurl imageurl full_price price full_price_eur price_eur flg_discount"
        )
    else:
        tabular = form not in ("webdataset", "classes", "conversations")
        assert set(rows.column_names) == columns.get(form, {"image"}) | (TABLE if tabular else set())


@pytest.mark.parametrize("form", ["embedded", "folder", "classes", "webdataset"])
def test_faults_name_the_rows_as_datasets_numbers_them(form: str, tmp_path: Path) -> None:
    planted = write_source(tmp_path / "source", form, rows=60, faults=0.3, kinds=["tiny"], distinct=9)
    rows = read(tmp_path / "source", form)
    pictures = rows["jpg" if form == "webdataset" else "image"]
    tiny = [number for number, picture in enumerate(pictures) if picture.size == (1, 1)]
    assert tiny == [one.row for one in planted] and len(tiny) == 18


def test_several_picture_columns_and_rows_that_lack_the_last(tmp_path: Path) -> None:
    for form, reference in (("jsonl", "pictures/0000001_2.jpg"), ("folder", "0000001_2.jpg")):
        write_source(tmp_path / form, form, rows=8, pictures=2)
        rows = read(tmp_path / form, form)
        assert [row["image_2"] is None for row in rows] == [False, False, False, True] * 2
        path = source_path(tmp_path / form, form)
        text = (path / "metadata.jsonl" if path.is_dir() else path).read_text()
        assert reference in text.splitlines()[1]
    first, second = (tmp_path / "jsonl" / "pictures" / name for name in ("0000001.jpg", "0000001_2.jpg"))
    assert first.read_bytes() != second.read_bytes()


def test_conversations_have_one_several_or_no_pictures(tmp_path: Path) -> None:
    write_source(tmp_path / "source", "conversations", rows=120, distinct=60, faults=0.1, kinds=["no_answer"])
    lines = [json.loads(line) for line in (tmp_path / "source" / "rows.jsonl").read_text().splitlines()]
    assert Counter(len(line["images"]) for line in lines).keys() == {0, 1, 2, 3}
    for number, line in enumerate(lines):
        parts = [part for turn in line["messages"] for part in turn["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(line["images"])
        assert line["messages"][-1]["role"] == ("user" if number % 10 == 9 else "assistant")
    asked = [line["messages"][0]["content"][-1]["text"] for line in lines if not line["images"]]
    assert len(set(asked)) == len(asked) > 3  # equal questions without a picture would be duplicates


def test_burberrys_prices_and_urls(tmp_path: Path) -> None:
    write_source(tmp_path / "source", "burberry", rows=40, base_url="http://127.0.0.1:9/", distinct=40)
    table = pd.read_csv(tmp_path / "source" / "rows.csv")
    assert list(table["imageurl"]) == [f"http://127.0.0.1:9/pictures/{number:07d}.jpg" for number in range(40)]
    assert ((table["price"] < table["full_price"]) == (table["flg_discount"] == 1)).all()
    assert set(table["flg_discount"]) == {0, 1}


def test_faults_are_spread_evenly_through_all_kinds_and_written_down(tmp_path: Path) -> None:
    kinds = faults_of("csv", served=True)
    assert set(FAULTS) - set(kinds) == {"no_answer"}
    rows = 4 * len(kinds)
    planted = write_source(
        tmp_path / "source", "csv", rows=rows, faults=0.25, base_url="http://127.0.0.1:9", distinct=2
    )
    assert [one.fault for one in planted if one.row % 4 == 3] == kinds
    assert [(one.row % 4, one.fault) for one in planted if one.row % 4 != 3] == [(2, "conflict"), (2, "near_duplicate")]
    expected = {one.fault: (one.reason, one.notes, one.attempts) for one in planted}
    assert expected["missing"] == ("http_404", (), None)
    assert expected["trickle"] == ("timeout", (), None)
    assert expected["cut"] == (None, (), 2)
    assert expected["16_bit"] == (None, ("16_bit",), None)
    lines = json.loads((tmp_path / "source" / "faults.json").read_text())
    assert [(line["row"], line["fault"], line["reason"]) for line in lines] == [
        (one.row, one.fault, one.reason) for one in planted
    ]
    assert "no_file" in {one.reason for one in write_source(tmp_path / "paths", "csv", rows=40, faults=0.5, distinct=1)}


def test_faults_in_pictures_are_what_they_say(tmp_path: Path) -> None:
    kinds = [name for name in samples._IN_PICTURES if name != "bomb"]
    rows = planted_in(tmp_path / "source", kinds, seed=3)
    content = {kind: picture_of(tmp_path / "source", row) for kind, row in zip(kinds, rows[1::2], strict=True)}
    write_source(tmp_path / "good", "csv", rows=len(rows), seed=3)
    opened = {kind: Image.open(io.BytesIO(content[kind])) for kind in kinds if kind not in ("html_as_jpeg", "svg")}
    assert content["html_as_jpeg"].startswith(b"<!doctype html>")
    assert content["svg"].startswith(b"<svg")
    with pytest.raises(OSError, match="truncated"):
        opened["truncated"].load()
    assert opened["tiny"].size == (1, 1)
    assert (opened["animated"].format, opened["animated"].n_frames) == ("GIF", 2)
    assert (opened["cmyk"].format, opened["cmyk"].mode) == ("JPEG", "CMYK")
    assert (opened["16_bit"].mode, np.asarray(opened["16_bit"]).max() > 255) == ("I;16", True)
    for kind in ("exif_rotated", "cmyk"):  # they still show the row's product
        shown = ImageOps.exif_transpose(opened[kind]).convert("RGB")
        good = Image.open(tmp_path / "good" / "pictures" / f"{2 * kinds.index(kind) + 1:07d}.jpg")
        assert np.abs(np.asarray(shown, float) - np.asarray(good, float)).mean() < 8
    assert opened["exif_rotated"].getexif()[0x0112] == 6


def test_the_bomb_is_a_small_file_that_declares_900_million_pixels() -> None:
    content = samples._bomb()
    assert len(content) < 200_000
    assert struct.unpack(">II", content[16:24]) == (30_000, 30_000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(content))
    small = Image.open(io.BytesIO(samples._bomb(50)))
    small.load()  # checks every checksum
    assert small.size == (50, 50)


def test_faults_in_rows_are_what_they_say(tmp_path: Path) -> None:
    kinds = list(samples._IN_ROWS)
    kinds.remove("no_answer")
    rows = planted_in(tmp_path / "source", kinds)
    before, row = dict(zip(kinds, rows[::2], strict=True)), dict(zip(kinds, rows[1::2], strict=True))
    assert not (tmp_path / "source" / row["missing"]["image"]).exists()
    assert row["no_picture"]["image"] == ""
    assert (row["empty_title"]["title"], row["placeholder"]["title"]) == ("", "N/A")
    for kind in ("duplicate", "conflict", "near_duplicate"):
        assert row[kind]["image"] != before[kind]["image"]
    labels = {kind: [one[kind]["title"] for one in (before, row)] for kind in kinds}
    assert labels["duplicate"][0] == labels["duplicate"][1]
    assert labels["conflict"][0] != labels["conflict"][1]
    for kind, same in (("duplicate", True), ("conflict", True), ("near_duplicate", False)):
        pictures = [picture_of(tmp_path / "source", one[kind]) for one in (before, row)]
        assert (pictures[0] == pictures[1]) is same
    one, other = (Image.open(io.BytesIO(content)).convert("L").resize((32, 32)) for content in pictures)
    assert np.abs(np.asarray(one, float) - np.asarray(other, float)).mean() < 4


def test_few_drawings_make_many_different_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = samples.draw_picture
    monkeypatch.setattr(samples, "draw_picture", lambda *given: drawn.append(given) or draw(*given))
    write_source(tmp_path / "source", "csv", rows=300, distinct=3, seed=11)
    assert len(drawn) == 3
    pixels = {Image.open(path).tobytes() for path in (tmp_path / "source" / "pictures").iterdir()}
    assert len(pixels) == 300
    table = pd.read_csv(tmp_path / "source" / "rows.csv")
    assert table.groupby("product_code")["title"].nunique().tolist() == [1, 1, 1]


@pytest.mark.parametrize("form", ["csv", "parquet", "embedded", "folder", "webdataset", "conversations"])
def test_rows_are_not_held_in_memory(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = samples._good_row(samples._Plan(form, 1, 0, 0.0, None, None, 1, None), 0)

    def large(plan: object, number: int) -> samples._Row:
        picture = samples._Picture(f"{number:07d}.jpg", bytes([number % 256]) * 50_000)
        return samples._Row(number, good.code, good.product, good.title, [picture])

    monkeypatch.setattr(samples, "_good_row", large)
    write_source(tmp_path / "warm", form, rows=1)
    tracemalloc.start()
    try:
        write_source(tmp_path / "source", form, rows=600)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(files(tmp_path / "source")) > (600 if form not in ("embedded", "webdataset") else 2)
    assert peak < 15_000_000 < 600 * 50_000


def test_the_same_again_is_left_alone_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "source"
    planted = write_source(folder, "csv", rows=6, faults=0.5)
    monkeypatch.setattr(samples, "draw_picture", lambda *given: pytest.fail("drawn twice"))
    assert write_source(folder, "csv", rows=6, faults=0.5) == planted
    for options in ({"rows": 7, "faults": 0.5}, {"rows": 6, "faults": 0.5, "base_url": "http://127.0.0.1:9"}):
        with pytest.raises(ValueError, match="is there already, and not made with these arguments"):
            write_source(folder, "csv", **options)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="give a new folder's name"):
        write_source(mine, "csv", rows=6)
    assert files(mine) == {"notes.txt": b"keep"}


def test_what_was_cut_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(samples, "_encoded", lambda *given, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_source(tmp_path / "source", "csv", rows=3)
    assert not (tmp_path / "source").exists()
    write_source(tmp_path / "source", "csv", rows=3)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("xls", {}, "form is 'xls', expected one of csv, jsonl"),
        ("csv", {"rows": 0}, "rows is 0, expected 1 or more"),
        ("csv", {"distinct": 0}, "distinct is 0, expected 1 or more"),
        ("csv", {"faults": 0.6}, r"faults is 0.6, expected a share from 0 to 0.5"),
        ("embedded", {"base_url": "http://127.0.0.1:9"}, "holds the pictures themselves"),
        ("burberry", {"pictures": 2}, "one picture column, not 2; several can have csv"),
        ("csv", {"kinds": ["cut"]}, "kinds holds 'cut'; 'csv', not served, can have truncated"),
        ("classes", {"kinds": ["empty_title"]}, "kinds holds 'empty_title'"),
    ],
)
def test_wrong_arguments_are_refused(form: str, options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_source(tmp_path / "source", form, **{"rows": 4, **options})
    assert not (tmp_path / "source").exists()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    """A served CSV source with each fault once, and the path of each fault's picture."""
    folder = tmp_path_factory.mktemp("served") / "source"
    kinds = [*samples._IN_SERVING, "missing", "svg"]
    with Server(folder) as server:
        rows = planted_in(folder, kinds, base_url=server.url)
        assert all(row["image"].startswith(f"{server.url}/") for row in rows)
        paths = {kind: row["image"].removeprefix(server.url) for kind, row in zip(kinds, rows[1::2], strict=True)}
        yield server, paths, rows[0]["image"].removeprefix(server.url)


def get(client: http.client.HTTPConnection, path: str) -> tuple[int, str | None, bytes]:
    client.request("GET", path)
    response = client.getresponse()
    return response.status, response.headers["Content-Type"], response.read()


@pytest.fixture
def client(served):
    connection = http.client.HTTPConnection(served[0].url.removeprefix("http://"), timeout=10)
    yield connection
    connection.close()


def test_good_pictures_come_whole_over_one_connection(served, client) -> None:
    server, _, path = served
    before, content = server.requests, (server.folder / path[1:]).read_bytes()
    assert get(client, path) == (200, "image/jpeg", content)
    connection = client.sock
    assert get(client, f"{path}?width=100") == (200, "image/jpeg", content)
    assert client.sock is connection
    assert (server.requests - before, server.seen[path]) == (2, 1)
    assert server.bytes > 2 * len(content)


@pytest.mark.parametrize("path", ["/", "/rows.csv", "/faults.json", "/pictures/../rows.csv", "/pictures/..", "/a/b/c"])
def test_nothing_but_pictures_is_served(path: str, served, client) -> None:
    assert get(client, path)[0] == 404


def test_failures_that_pass(served, client) -> None:
    server, paths, _ = served
    assert get(client, paths["server_error"])[0] == 500
    client.request("GET", paths["busy"])
    response = client.getresponse()
    assert (response.status, response.headers["Retry-After"], response.read()) == (429, "1", b"")
    with pytest.raises(http.client.IncompleteRead) as error:
        get(client, paths["cut"])
    content = {kind: picture_of(server.folder, {"image": paths[kind]}) for kind in ("server_error", "busy", "cut")}
    assert 0 < len(error.value.partial) < len(content["cut"])
    client.close()
    for kind in content:
        assert get(client, paths[kind]) == (200, "image/jpeg", content[kind])


def test_failures_that_stay(served, client) -> None:
    server, paths, _ = served
    for kind, expected in {
        "missing": (404, "text/plain"),
        "html_page": (200, "text/html; charset=utf-8"),
        "text_plain": (200, "text/plain"),
        "octet_stream": (200, "application/octet-stream"),
        "svg": (200, "image/svg+xml"),
    }.items():
        assert get(client, paths[kind])[:2] == expected, kind
    for kind in ("text_plain", "octet_stream"):
        assert Image.open(io.BytesIO(get(client, paths[kind])[2])).format == "JPEG"
    for kind, location in {
        "redirect": "/pictures/",
        "redirect_loop": paths["redirect_loop"],
        "redirect_to_file": "file:///etc/passwd",
        "redirect_to_metadata": "http://169.254.169.254/",
        "redirect_to_private": "http://10.0.0.1/",
    }.items():
        client.request("GET", paths[kind])
        response = client.getresponse()
        assert (response.status, response.read()) == (302, b""), kind
        assert response.headers["Location"].startswith(location)
    client.request("GET", paths["redirect"])
    (response := client.getresponse()).read()
    assert get(client, response.headers["Location"])[2] == picture_of(server.folder, {"image": paths["redirect"]})


def test_bodies_without_an_end(served, client) -> None:
    _, paths, path = served
    for kind, length, more in (("huge", "1000000000", 5_000_000), ("endless", None, 5_000_000), ("trickle", None, 3)):
        client.request("GET", paths[kind])
        response = client.getresponse()
        assert (response.status, response.headers["Content-Length"]) == (200, length)
        assert len(response.read(more)) == more
        response.close()
        client.close()
    assert get(client, path)[0] == 200  # it has not tired the server


def test_many_connections_wait_at_once(tmp_path: Path) -> None:
    write_source(tmp_path / "source", "csv", rows=1)

    async def ask(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /pictures/0000000.jpg HTTP/1.1\r\nHost: here\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0]))
        writer.close()
        await writer.wait_closed()
        return head[:15]

    async def ask_all(port: int) -> list[bytes]:
        return await asyncio.gather(*(ask(port) for _ in range(200)))

    with Server(tmp_path / "source", latency=0.5) as server:
        assert set(asyncio.run(ask_all(int(server.url.rpartition(":")[2])))) == {b"HTTP/1.1 200 OK"}
        assert server.requests == 200
        assert server.peak > 100
        with pytest.raises(ValueError, match=r"port \d+ cannot be served on: Address already in use"):
            Server(tmp_path, port=int(server.url.rpartition(":")[2]))
