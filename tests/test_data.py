"""Rows of every kind of source become the same examples, and every unusable row is named."""

import gc
import io
import json
import pickle
import time
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pillow

from sft_phi3v.data import ROW, Template, check_rows, load_splits, number, open_picture, to_examples
from sft_phi3v.recipe import Recipe, load_recipe


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def recipe(name, **keys) -> Recipe:
    given = {"answer": "Product: {title}, Full Price: {full_price}", "use_cpu": True, "bf16": False} | keys
    given |= {"model_name_or_path": "m", "dataset_name": str(name), "output_dir": "o"}
    Path("recipe.yaml").write_text(json.dumps({key: value for key, value in given.items() if value is not ...}))
    return load_recipe(["recipe.yaml"])


def picture(path: Path, color: int = 0, kind: str = "RGB") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new(kind, (12, 8), color).save(path)
    return str(path)


def rows(count: int = 10) -> list[dict]:
    return [{"image": f"pictures/{k}.png", "title": f"Scarf {k}", "full_price": 10.5 * k} for k in range(count)]


def write_pictures(folder: Path, count: int = 10) -> None:
    for k in range(count):
        picture(folder / "pictures" / f"{k}.png", k)


def write_table(path: Path, table: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = Dataset.from_list(table)
    {".csv": dataset.to_csv, ".jsonl": dataset.to_json, ".parquet": dataset.to_parquet}[path.suffix](path)
    return path


HELD_OUT_OF_40 = [9, 23, 17, 28, 0, 7, 6, 22]  # on every machine: a change here moves every score ever published


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_table_with_picture_paths_beside_it(tmp_path, suffix, whole_folder):
    table = write_table(tmp_path / "shop" / f"rows{suffix}", rows())
    write_pictures(tmp_path / "shop")
    asked = recipe(table.parent if whole_folder else table)
    train, held_out = load_splits(asked)
    assert (len(train), len(held_out)) == (9, 1)
    check_rows(train, asked)
    example = to_examples(train, asked)[3]
    number = train[3][ROW]
    assert example["row"] == number
    assert [(image.size, image.getpixel((0, 0))) for image in example["images"]] == [((12, 8), (number, 0, 0))]
    question, answer = "What is shown in this image?", f"Product: Scarf {number}, Full Price: {10.5 * number}"
    assert example["messages"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def test_picture_paths_may_be_absolute_or_count_from_the_working_directory(tmp_path):
    table = rows(2)
    table[0]["image"] = picture(tmp_path / "elsewhere" / "0.png")
    picture(tmp_path / "pictures" / "1.png")
    train, held_out = load_splits(recipe(write_table(tmp_path / "shop" / "rows.csv", table), held_out=1))
    assert len(train) == len(held_out) == 1


@pytest.mark.filterwarnings("ignore:unclosed file.*metadata:ResourceWarning")  # `datasets` leaves its CSV open
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_an_image_folder_with_metadata(tmp_path, suffix):
    write_pictures(tmp_path / "shop")
    table = [{"file_name": row.pop("image"), **row} for row in rows()]
    write_table(tmp_path / "shop" / f"metadata{suffix}", table)
    train, _ = load_splits(asked := recipe("shop"))
    gc.collect()
    assert {"image", "title", "full_price", ROW} == set(train.column_names)
    check_rows(train, asked)


def test_an_image_folder_with_classes_gives_their_names(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for label in ("coat", "scarf"):
            for k in range(count):
                picture(tmp_path / "shop" / split / label / f"{k}.png", k)
    train, held_out = load_splits(asked := recipe("shop", answer="A {label}."))
    assert (len(train), len(held_out)) == (8, 4)
    texts = {example["messages"][-1]["content"][0]["text"] for example in to_examples(train, asked)}
    assert texts == {"A coat.", "A scarf."}


def test_a_saved_dataset_with_pictures_inside(tmp_path):
    kind = ClassLabel(names=["a", "b"])
    columns = {"image": Image(), "title": Value("string"), "full_price": Value("int64"), "kind": kind}
    values = ([Pillow.new("RGB", (4, 4))] * 6, list("abcdef"), [1] * 6, [0, 1, 1, 0, 1, -1])
    whole = Dataset.from_dict(dict(zip(columns, values, strict=True)), Features(columns))
    whole.save_to_disk("one")
    DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk("two")
    train, held_out = load_splits(asked := recipe("one"))
    assert (len(train), len(held_out)) == (5, 1)
    train, held_out = load_splits(recipe("two"))
    assert (len(train), len(held_out)) == (6, 1)
    assert train["kind"][:] == ["a", "b", "b", "a", "b", None]
    check_rows(train, asked)
    assert to_examples(train, asked)[0]["images"][0].size == (4, 4)


def test_files_named_by_split(tmp_path):
    for name, count in (("train-0", 3), ("train-1", 2), ("val", 4)):
        write_table(tmp_path / "shop" / "data" / f"{name}.csv", rows(count))
    write_pictures(tmp_path / "shop")
    write_pictures(tmp_path / "shop" / "data")
    train, held_out = load_splits(recipe("shop", dataset_test_split="val"))
    assert (len(train), len(held_out)) == (5, 4)


@pytest.mark.parametrize(
    ("files", "keys", "counts", "said"),
    [
        ("burberry_train burberry_test", {}, (10, 4), "held out: split 'test'\n"),
        ("test_2024 shop", {}, (10, 4), "held out: split 'test'\n"),
        ("Train-00000-of-00001 eval", {"dataset_test_split": "eval"}, (10, 4), "held out: split 'eval'\n"),
        ("shop_fit check", {"dataset_train_split": "fit", "dataset_test_split": "check"}, (10, 4), "split 'check'\n"),
        ("shop test2", {}, (10, 4), "held out: split 'test'\n"),
        ("data validation", {}, (9, 1), "held out: 1 of the 10 rows of split 'train', seed 42; not used: validation ("),
        ("train val", {}, (9, 1), "not used: val (to score on one, name it: `dataset_test_split`)"),
        ("train old-rows", {}, (9, 1), "not used: old_rows ("),
    ],
)
def test_files_of_other_splits_are_not_trained_on(tmp_path, capsys, files, keys, counts, said):
    write_pictures(tmp_path / "shop")
    for name in files.split():
        first = name in ("shop", "data", "shop_fit") or "train" in name.lower()
        write_table(tmp_path / "shop" / f"{name}.csv", rows(10 if first else 4))
    assert tuple(map(len, load_splits(recipe("shop", **keys)))) == counts
    assert said in capsys.readouterr().out


def test_a_file_that_names_two_splits_is_refused(tmp_path):
    write_table(tmp_path / "shop" / "train_test.csv", rows())
    assert "train_test.csv names several splits (test, train): rename it" in error_of(lambda: loaded(name="shop"))


def test_json_files_in_a_folder_are_tables_where_there_are_no_others(tmp_path):
    write_pictures(tmp_path / "shop")
    for name, count in (("rows", 10), ("shop_test", 4)):
        (tmp_path / "shop" / f"{name}.json").write_text(json.dumps(rows(count)))
    (tmp_path / "shop" / "dataset_infos.json").write_text("{}")
    assert tuple(map(len, load_splits(recipe("shop")))) == (10, 4)
    write_table(tmp_path / "shop" / "rows.csv", rows(5))
    assert tuple(map(len, load_splits(recipe("shop")))) == (4, 1)


@pytest.mark.filterwarnings("ignore:unclosed file.*metadata:ResourceWarning")
def test_a_json_file_beside_the_metadata_of_pictures_is_no_table(tmp_path):
    write_pictures(tmp_path / "shop")
    write_table(tmp_path / "shop" / "metadata.jsonl", [{"file_name": row.pop("image"), **row} for row in rows()])
    (tmp_path / "shop" / "notes.json").write_text("{}")
    assert tuple(map(len, load_splits(recipe("shop")))) == (9, 1)


def test_csv_is_taken_as_it_stands(tmp_path):
    write_pictures(tmp_path)
    text = "image,title,code,price,size,empty\npictures/0.png,NA,00123,450,1,\npictures/1.png,None,7,19.90,,\n"
    (tmp_path / "train.csv").write_text(text)
    (tmp_path / "test.csv").write_text("image,title,code,price,size\npictures/2.png,null,1E5,3,3\n")
    (tmp_path / "shop").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").rename(tmp_path / "shop" / f"{split}.csv")
    train, held_out = load_splits(recipe("shop", answer="{title} {code} {price}"))
    table = [tuple(row[key] for key in ("title", "code", "price", "size")) for row in [*train, *held_out]]
    assert table == [("NA", "00123", 450.0, 1), ("None", "7", 19.9, None), ("null", "1E5", 3.0, 3)]
    assert train["empty"][:] == [None, None]


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_short_floats_read_as_they_were_written(tmp_path, kind):
    write_pictures(tmp_path, 3)
    columns = {"image": Value("string"), "title": Value("string"), "full_price": Value(kind)}
    table = [{"image": f"pictures/{k}.png", "title": "a", "full_price": 12.3} for k in range(3)]
    Dataset.from_list(table, Features(columns)).to_parquet(tmp_path / "rows.parquet")
    train, _ = load_splits(asked := recipe("rows.parquet", answer="Costs {full_price}"))
    assert to_examples(train, asked)[0]["messages"][-1]["content"][0]["text"] == "Costs 12.3"


def test_the_held_out_rows_depend_on_the_seed_alone(tmp_path):
    write_pictures(tmp_path, 40)
    write_table(tmp_path / "rows.jsonl", rows(40))
    asked = [recipe("rows.jsonl", seed=seed, held_out=share) for seed, share in ((1, 0.2), (1, 8), (2, 8))]
    drawn = [load_splits(one)[1][ROW][:] for one in asked]
    assert drawn[0] == drawn[1] == HELD_OUT_OF_40
    assert drawn[1] != drawn[2]
    train, held_out = load_splits(recipe("rows.jsonl"))
    assert sorted(train[ROW][:] + held_out[ROW][:]) == list(range(40))


IMAGE, TEXT, VIDEO = {"type": "image"}, {"type": "text", "text": "a"}, {"type": "video"}


def conversation(*turns, **columns) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **columns}


def as_example(row: dict, features: Features | None = None) -> dict:
    asked = recipe("unused", answer=...)
    dataset = Dataset.from_list([row], features=features)
    check_rows(dataset, asked)
    return to_examples(dataset, asked)[0]


def test_turns_of_plain_text_get_the_pictures_in_front_of_the_first_question(tmp_path):
    turns = [("system", "Be brief."), ("user", "Two?"), ("assistant", "Yes."), ("user", "Sure?"), ("assistant", "!")]
    text = Value("string")
    features = Features({"messages": List({"role": text, "content": text}), "images": List(Image())})
    images = [picture(tmp_path / "0.png", 1), picture(tmp_path / "1.png", 2)]
    example = as_example(conversation(*turns, images=images), features)
    kinds = [[part["type"] for part in message["content"]] for message in example["messages"]]
    assert kinds == [["text"], ["image", "image", "text"], ["text"], ["text"], ["text"]]
    assert [image.getpixel((0, 0))[0] for image in example["images"]] == [1, 2]


def test_parts_keep_their_place_and_lose_arrows_empty_keys(tmp_path):
    ask = [{"type": "text", "text": "Is"}, {"type": "image"}, {"type": "text", "text": "red?"}]
    row = conversation(("user", ask), ("assistant", [TEXT]), image=picture(tmp_path / "0.png"))
    dataset = Dataset.from_list([row]).cast_column("image", Image())
    example = to_examples(dataset, recipe("unused", answer=...))[0]
    assert example["messages"][0]["content"] == ask and len(example["images"]) == 1


def test_text_only_rows_have_no_pictures():
    assert as_example(conversation(("user", "Hello"), ("assistant", "Hi")))["images"] == []


def test_conversations_of_a_jsonl_file_with_lists_of_paths(tmp_path):
    write_pictures(tmp_path, 2)
    turns = [("user", "Which?"), ("assistant", "These.")]
    table = [conversation(*turns, images=["pictures/0.png", "pictures/1.png"]), conversation(*turns, images=[])]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    asked = recipe("chat.jsonl", answer=..., held_out=1)
    read = [example for part in load_splits(asked) for example in to_examples(part, asked)]
    assert sorted(len(example["images"]) for example in read) == [0, 2]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (conversation(("user", "Hello")), "the last turn is not the assistant's"),
        (conversation(("human", "Hello"), ("assistant", "Hi")), "role is 'human', expected system, user or assistant"),
        (conversation(("user", "Hello"), ("assistant", "")), "an assistant turn is empty"),
        (conversation(("user", [TEXT]), ("assistant", [IMAGE])), "an assistant turn is empty"),
        (conversation(("user", [TEXT]), ("assistant", [TEXT, IMAGE])), "not the user's"),
        (conversation(("user", [IMAGE]), ("assistant", [TEXT])), "1 image parts in `messages` and 0 pictures"),
        (conversation(("user", [VIDEO]), ("assistant", [TEXT])), "'video'"),
        ({"messages": []}, "the last turn is not the assistant's"),
    ],
)
def test_a_broken_conversation_is_named(row, words):
    dataset = Dataset.from_list([row])
    with pytest.raises(ValueError, match="row 0: ") as caught:
        check_rows(dataset, recipe("unused", answer=...))
    assert words in str(caught.value)


def error_of(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def loaded(**keys):
    asked = recipe(keys.pop("name", "rows.csv"), **keys)
    for part in load_splits(asked):
        check_rows(part, asked)


@pytest.fixture
def shop(tmp_path):
    write_pictures(tmp_path)
    write_table(tmp_path / "rows.csv", rows())


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"answer": "{titel}"}, ["`answer` reads {titel}", "no such column", "title, full_price, image"]),
        ({"prompt": "What {x}?"}, ["`prompt` reads {x}"]),
        ({"image_column": "photo"}, ["`image_column` is 'photo'", "title, full_price"]),
        ({"image_column": "full_price"}, ["`image_column` 'full_price' holds Value('float64')"]),
        ({"answer": ...}, ["`answer` is missing", "title, full_price"]),
        ({"answer": "{title"}, ["`answer` is '{title'"]),
        ({"dataset_train_split": "training", "name": "pictures"}, ["'training'", "has the splits train"]),
        ({"dataset_test_split": "dev"}, ["`dataset_test_split` is 'dev'", "has the splits train"]),
        ({"dataset_test_split": "train"}, ["is the train split"]),
        ({"held_out": 10}, ["`held_out` is 10", "leaves no train rows", "has 10 rows"]),
        ({"name": "nothing/of/this"}, ["'nothing/of/this': no such file or folder"]),
        ({"name": "missing.csv"}, ["no such file or folder"]),
        ({"name": "recipe.yaml"}, ["expected a file of .parquet, .jsonl, .json, .csv"]),
        ({"name": "DBQ/Burberry"}, ["'DBQ/Burberry'", "would be fetched from the", "cannot be reached",
          "(or `source`, where its rows hold URLs, and prepare it)"]),
        ({"answer": "Product: title"}, ["`answer` is 'Product: title', the same for every row", "as in {title}"]),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named(keys, words):
    message = error_of(lambda: loaded(**keys))
    assert all(word in message for word in words), message


def test_urls_are_not_pictures(tmp_path):
    table = [{"imageurl": f"https://shop/{k}.jpg", "title": "a", "full_price": 1} for k in range(4)]
    write_table(tmp_path / "rows.csv", table)
    message = error_of(loaded)
    assert "Column 'imageurl' holds URLs. Nothing is downloaded" in message
    told = ("source: rows.csv\n", "source_image_column: imageurl\n", "dataset_name: data/NAME\n", "prepare recipe.yaml")
    assert all(line in message for line in told)
    message = error_of(lambda: loaded(image_column="imageurl"))
    assert "row 0, column 'imageurl' holds the URL https://shop/0.jpg" in message


@pytest.mark.usefixtures("shop")
def test_a_missing_picture_file_is_named(tmp_path):
    (tmp_path / "pictures" / "7.png").unlink()
    assert "row 7, column 'image': no picture file 'pictures/7.png'" in error_of(loaded)


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize("damage", ["text", "half a png", "empty"])
def test_a_broken_picture_is_named(tmp_path, damage):
    file = tmp_path / "pictures" / "7.png"
    file.write_bytes({"text": b"<html>404</html>", "half a png": file.read_bytes()[:50], "empty": b""}[damage])
    asked = recipe("rows.csv")
    train, held_out = load_splits(asked)
    broken = train if 7 in train[ROW] else held_out
    message = error_of(lambda: check_rows(broken, asked))
    assert "row 7: the picture" in message and "7.png cannot be read" in message
    if damage != "half a png":  # its size can be read; its pixels fail where they are first needed, in the collator
        assert "row 7: the picture" in error_of(lambda: list(to_examples(broken, asked)))


@pytest.mark.parametrize("inside", [False, True])
def test_a_jpeg_cut_off_in_its_pixels_is_found(tmp_path, inside):
    buffer = io.BytesIO()
    Pillow.effect_noise((200, 200), 50).save(buffer, "JPEG")
    cut = buffer.getvalue()[:-3000]
    (tmp_path / "cut.jpg").write_bytes(cut)
    image = {"bytes": cut, "path": None} if inside else {"bytes": None, "path": "cut.jpg"}
    features = Features({"image": Image(), "title": Value("string"), "full_price": Value("int64")})
    dataset = Dataset.from_list([{"image": image, "title": "a", "full_price": 1}], features)
    assert "truncated" in error_of(lambda: check_rows(dataset, recipe("unused")))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "MPO", "WEBP", "PNG"])
def test_a_picture_of_any_kind_that_was_cut_off_is_found(kind):
    buffer = io.BytesIO()
    image = Pillow.effect_noise((200, 200), 50).convert("RGB")
    image.save(buffer, kind, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
    table = [{"title": "a", "full_price": 1, "image": {"bytes": content, "path": None}}
             for content in (buffer.getvalue(), buffer.getvalue()[: len(buffer.getvalue()) // 3])]  # fmt: skip
    features = Features({"title": Value("string"), "full_price": Value("int64"), "image": Image()})
    message = error_of(lambda: check_rows(Dataset.from_list(table, features), recipe("unused")))
    assert "row 1: the picture cannot be read" in message and "row 0" not in message


@pytest.mark.parametrize("column", ["image", "title", "full_price"])
def test_an_empty_field_is_named(tmp_path, column):
    write_pictures(tmp_path)
    table = rows()
    table[4][column] = None
    message = error_of(lambda: loaded(name=write_table(tmp_path / "rows.jsonl", table)))
    assert "row 4: " in message and column in message


def test_many_bad_rows_are_counted(tmp_path):
    write_pictures(tmp_path)
    table = write_table(tmp_path / "rows.csv", [row | {"title": None} for row in rows()])
    message = error_of(lambda: loaded(name=table))
    assert message.count("is empty") == 5 and "... and 4 more" in message


def test_a_file_without_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("image,title,full_price\n")
    assert "no rows" in error_of(loaded)


def test_answers_that_cannot_be_read_back_are_counted(caplog):
    blank = {"image": Pillow.new("RGB", (2, 2)), "title": "a"}
    table = [blank | {"full_price": price} for price in ("1", "2, Full Price: 3")]
    check_rows(Dataset.from_list(table), recipe("unused"))
    assert "1 of 2 answers do not read back" in caplog.text and "row 1" in caplog.text


@pytest.mark.parametrize("chat", [False, True])
def test_markup_in_rows_is_counted(caplog, chat):
    titles = ("a", "b<|end|>", "<|image_1|>c")
    if chat:
        table = [conversation(("user", title), ("assistant", "Hi")) for title in titles]
    else:
        table = [{"image": Pillow.new("RGB", (2, 2)), "title": title, "full_price": 1} for title in titles]
    check_rows(Dataset.from_list(table), recipe("unused", **({"answer": ...} if chat else {})))
    assert "2 of 3 rows hold markup" in caplog.text and "(first: row 1): it is learned as plain text" in caplog.text


@pytest.mark.parametrize("key", ["prompt", "answer"])
def test_rows_with_messages_need_no_templates(key):
    asked = recipe("unused", **({"answer": ...} | {key: "What, {title}?"}))
    dataset = Dataset.from_list([conversation(("user", "Hello"), ("assistant", "Hi"))])
    assert f"`{key}` is given and the rows hold `messages`" in error_of(lambda: to_examples(dataset, asked))


def test_examples_can_be_sent_to_a_worker_process():
    table = [{"image": Pillow.new("RGB", (2, 2)), "title": "a", "full_price": 1}]
    examples = pickle.loads(pickle.dumps(to_examples(Dataset.from_list(table), recipe("unused"))))
    assert examples[0]["images"][0].size == (2, 2)


BURBERRY = "Product: {title}, Category: {category3_code}, Full Price: {full_price}"


@pytest.mark.parametrize(
    "title", ["Scarf", "Scarf, red", "Bag, Category: none", "{x} (5%) [a] \\d+", "a\nb", "Écharpe"]
)
def test_what_is_rendered_parses_back(title):
    row = {"title": title, "category3_code": "SCARVES", "full_price": 1290.0}
    parsed = Template(BURBERRY).parse(Template(BURBERRY).render(row))
    assert parsed == {"title": title, "category3_code": "SCARVES", "full_price": "1290.0"}


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("{p:.2f}", {"p": 1290}, "1290.00"),
        ("{p:,.2f} USD", {"p": 1290.5}, "1,290.50 USD"),
        ('{{"a": "{a}"}}', {"a": "x"}, '{"a": "x"}'),
        ("{a} or {a}?", {"a": "x"}, "x or x?"),
        ("{Full Price}", {"Full Price": 3}, "3"),
        ("{a:>4}|", {"a": "x"}, "   x|"),
        ("\n Costs {p}\n", {"p": 3}, "Costs 3"),  # as a YAML block scalar ends
        ("{a}{{{b}", {"a": "x", "b": "y"}, "x{y"),
    ],
)
def test_formats_render_and_read_back(template, row, text):
    made = Template(template)
    assert made.render(row) == text and made.reads_back(row) and made.parse(f"\n {text} ") is not None


@pytest.mark.parametrize("text", ["", "Scarf", "Product: a, Category: b", "Product: , Category: b, Full Price: 1"])
def test_other_text_does_not_parse(text):
    assert Template(BURBERRY).parse(text) is None


def test_reading_back_takes_no_longer_for_text_that_repeats_itself():
    start = time.process_time()
    assert Template("{a}, {b}, {c}, {d}, {e}.").parse("x, " * 450) is None
    assert Template("{a}, {b}, {c}.").parse("x, " * 9000 + "y.") == {"a": "x, " * 8998 + "x", "b": "x", "c": "y"}
    assert time.process_time() - start < 1


def test_a_field_that_stands_twice_must_say_the_same():
    assert Template("{a} or {a}?").parse("x or y?") is None
    assert Template("Yes.", key="prompt").parse(" Yes.\n") == {} and Template("Yes.", key="prompt").parse("No.") is None


@pytest.mark.parametrize("text", ["{a}{b}", "{}", "{a!r}", "{a", "a}", "a", " "])
def test_a_template_that_cannot_be_read_back_is_refused(text):
    assert "`answer` is" in error_of(lambda: Template(text))


def test_a_value_that_does_not_fit_its_format_is_named():
    assert "column 'p' holds 'dear'" in error_of(lambda: Template("{p:.2f}").render({"p": "dear"}))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1290", 1290), ("$1,290.00", 1290), ("1,290 USD", 1290), ("US$ 12.", 12), ("1,234,567", 1234567)),
        *(("-3.5", -3.5), (".5", 0.5), ("12,50", None), ("1.290,00", None), ("3 for 2", None), ("dear", None)),
        *(("", None), ("--5", None), ("-", None), ("EUR 5", 5), ("5 €", 5), ("1290USD", 1290), ("0.50", 0.5), ("0", 0)),
        *(("CAT01", None), ("CAT 1", None), ("Class 1", None), ("A-1", None), ("size 38 EU", None), ("38 EU", None)),
        *(("eur 5", None), ("5%", None), ("$", None), ("00123", None), ("1,23", None), ("5 EUR.", None)),
    ],
)
def test_numbers_as_people_write_them(text, value):
    assert number(text) == value


def test_pictures_are_opened_upright_and_not_decoded():
    lying = Pillow.new("RGB", (40, 20), "red")
    exif = lying.getexif()
    exif[0x0112] = 6  # held by its right side
    rotated, plain = io.BytesIO(), io.BytesIO()
    lying.save(rotated, "JPEG", exif=exif)
    lying.save(plain, "PNG")
    features = Features({"image": Image(), "title": Value("string"), "full_price": Value("int64")})
    rows = [
        {"image": {"bytes": content, "path": None}, "title": "a", "full_price": 1}
        for content in (rotated.getvalue(), plain.getvalue()[:60])
    ]
    examples = to_examples(Dataset.from_list(rows, features), recipe("unused"))
    assert examples[0]["images"][0].size == (20, 40)
    assert examples[1]["images"][0].size == (40, 20)  # a picture cut short has a size; only its pixels are missing
    with pytest.raises(OSError):
        examples[1]["images"][0].load()


def test_of_an_upright_picture_from_a_camera_no_pixel_is_decoded_to_know_its_size():
    exif = Pillow.Exif()
    exif[0x0112] = 1  # upright
    file = io.BytesIO()
    Pillow.effect_noise((200, 100), 50).save(file, "JPEG", exif=exif)
    half = file.getvalue()[: file.tell() // 2]
    image = open_picture({"bytes": half, "path": None})
    assert image.size == (200, 100)
    with pytest.raises(OSError):
        image.load()
