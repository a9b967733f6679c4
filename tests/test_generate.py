"""Pictures in, answers out: any model, any form of input, and nothing half-written."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sft_phi3v import generate
from sft_phi3v.data import Template

REPOSITORY = Path(__file__).resolve().parents[1]
ANSWER = "Product: {title}, Category: {category3_code}, Full Price: {full_price}"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, colour, size in (
        ("b.png", "red", (60, 40)),
        ("a.jpg", "blue", (40, 90)),
        ("more/c.png", "green", (50, 50)),
    ):
        Image.new("RGB", size, colour).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_is_answered_in_order_whatever_the_batch(finished_run, pictures, tmp_path):
    folder, _ = finished_run
    found = []
    for batch_size in ("1", "2"):
        output = tmp_path / f"{batch_size}.jsonl"
        generate.main(["--model", str(folder), str(pictures), "--output", str(output), "--batch_size", batch_size])
        found.append(lines(output))
    assert [Path(line["image"]).name for line in found[0]] == ["a.jpg", "b.png", "c.png"]
    assert found[0] == found[1]
    template = Template("Colour: {label}.")
    for line in found[0]:
        assert line.keys() == {"image", "text", "stopped", "fields"}
        assert line["fields"] == template.parse(line["text"])


def test_the_adapter_and_the_merged_model_answer_alike(merged_run, pictures, tmp_path):
    found = []
    for model in (merged_run, merged_run / "merged"):
        generate.main(
            ["--model", str(model), str(pictures), "--output", str(tmp_path / "a.jsonl"), "--batch_size", "3"]
        )
        found.append(lines(tmp_path / "a.jsonl"))
    assert found[0] == found[1]


def test_one_picture_is_answered_while_it_is_written(merged_run, pictures, tmp_path, capsys):
    model = str(merged_run / "merged")
    generate.main(["--model", model, str(pictures / "a.jpg")])
    told = capsys.readouterr().out
    generate.main(["--model", model, str(pictures / "a.jpg"), "--output", str(tmp_path / "a.jsonl")])
    (line,) = lines(tmp_path / "a.jsonl")
    assert told.startswith(line["text"])
    expected = "  (another form)" if line["fields"] is None else f"  label: {line['fields']['label']}"
    assert expected in told


def test_a_base_model_is_asked_without_a_recipe(pictures, tmp_path, capsys):
    model = str(REPOSITORY / "recipes" / "tiny_base")
    generate.main(
        ["--model", model, str(pictures), "--max_new_tokens", "8", "--prompt", "What is shown in this image?"]
    )
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [Path(name).name for name, _ in rows] == ["a.jpg", "b.png", "c.png"]
    assert all(text for _, text in rows)


def test_the_demos_recipe_reads_its_fields(merged_run, pictures, tmp_path):
    """The answer's template comes with the model, and --prompt replaces its question."""
    folder = tmp_path / "model"
    shutil.copytree(merged_run / "merged", folder)
    text = (folder / "recipe.yaml").read_text().replace("'Colour: {label}.'", f"'{ANSWER}'")
    (folder / "recipe.yaml").write_text(text)
    loaded = generate.load(str(folder))
    assert Template(loaded.task.answer).fields == ("title", "category3_code", "full_price")


def test_a_file_of_prompts(merged_run, pictures, tmp_path):
    asked = [
        {"image": "a.jpg", "id": 7},
        {"image": "b.png", "prompt": "Which colour?"},
        {"images": ["a.jpg", "more/c.png"], "prompt": "Which is older?"},
        {"prompt": "And without a picture?"},
        {"images": ["a.jpg"], "messages": [{"role": "user", "content": "What?"}]},
        {
            "images": ["a.jpg"],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "See:"}, {"type": "image"}]},
                {"role": "assistant", "content": "I see."},
                {"role": "user", "content": "And?"},
            ],
        },
        {"image": "missing.png"},
        {"image": "thin.png", "note": "a\u2028b"},
    ]
    Image.new("RGB", (1, 5000)).save(pictures / "thin.png")
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in asked) + "\n\n"
    (pictures / "prompts.jsonl").write_text(text, encoding="utf-8-sig")
    output = tmp_path / "answers.jsonl"
    arguments = ["--model", str(merged_run / "merged"), str(pictures / "prompts.jsonl"), "--output", str(output)]
    with pytest.raises(SystemExit, match=r"error: 2 of 8 inputs could not be read"):
        generate.main(arguments)
    found = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    for line, before in zip(found, asked, strict=True):
        assert line | before == line  # everything that was asked is kept
    assert "No such file" in found[-2]["error"] and "text" not in found[-2]
    assert "cannot be cut into crops" in found[-1]["error"]
    assert all("text" in line for line in found[:-2])
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 1: Expecting value"),
        ('"text"', "line 1: "),
        ('{"images": ["a.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]}',
         "line 1: 2 image parts in `messages` and 1 pictures"),
        ('{"messages": []}', "there is nothing to answer"),
        ('{"image": "a.jpg", "text": "mine"}', "the key 'text' is one of the answer's"),
        ("\n", "this file is empty"),
        ('{"messages": [{"role": "assistant", "content": "Hello."}]}', "there is nothing to answer"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(line, message, merged_run, pictures, capsys):
    (pictures / "prompts.jsonl").write_text(line)
    with pytest.raises(SystemExit):
        generate.main(["--model", str(merged_run / "merged"), str(pictures / "prompts.jsonl")])
    told = capsys.readouterr().err
    assert "error: " in told and message in told and "prompts.jsonl" in told


def test_what_is_wrong_is_one_line(finished_run, pictures, tmp_path, monkeypatch, capsys):
    folder, _ = finished_run

    def error_of(*arguments):
        with pytest.raises(SystemExit):
            generate.main(list(arguments))
        return capsys.readouterr().err.splitlines()[-1]

    picture = str(pictures / "a.jpg")
    assert "no such file" in error_of("--model", str(folder), str(tmp_path / "nowhere.png"))
    (tmp_path / "empty").mkdir()
    assert "holds neither adapter_config.json nor config.json" in error_of("--model", str(tmp_path / "empty"), picture)
    assert "this folder holds no pictures" in error_of("--model", str(folder), str(tmp_path / "empty"))
    assert "--batch_size is 0, expected 1 or more" in error_of("--model", str(folder), picture, "--batch_size", "0")
    text = (
        (folder / "recipe.yaml").read_text().replace("image_column: image", "image_column: image\nprompt: '{brand}?'")
    )
    (folder / "recipe.yaml").write_text(text.replace("prompt: What is shown in this image?\n", ""))
    assert "The recipe's `prompt` reads {brand}" in error_of("--model", str(folder), picture)
    (folder / "recipe.yaml").unlink()
    assert "is an adapter without recipe.yaml" in error_of("--model", str(folder), picture)


def test_an_adapter_whose_base_has_moved(finished_run, pictures, capsys):
    folder, _ = finished_run
    record = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(record | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(SystemExit):
        generate.main(["--model", str(folder), str(pictures / "a.jpg")])
    assert "say where it lies: --base_model" in capsys.readouterr().err
    base = str(REPOSITORY / "recipes" / "tiny_base")
    generate.main(["--model", str(folder), str(pictures / "a.jpg"), "--base_model", base])


def test_a_recipe_beside_a_model_sets_no_environment(merged_run, pictures, tmp_path, monkeypatch, capsys):
    """Anybody may have written it: HTTPS_PROXY, say, would send the token to them."""
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    folder = tmp_path / "model"
    shutil.copytree(merged_run / "merged", folder)
    with (folder / "recipe.yaml").open("a") as file:
        file.write("env: {HTTPS_PROXY: 'http://elsewhere'}\n")
    assert generate.load(str(folder)).task.answer == "Colour: {label}."
    assert "HTTPS_PROXY" not in os.environ
    with (folder / "recipe.yaml").open("a") as file:
        file.write("key_of_another_version: 1\n")
    assert generate.load(str(folder)).task.answer is None  # a whole model can be asked all the same
    assert "recipe.yaml" in capsys.readouterr().err


def test_pictures_are_upright_as_in_training(merged_run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 30), "red").save(tmp_path / "phone.jpg", exif=exif)
    loaded = generate.load(str(merged_run / "merged"))
    (prompt,) = generate.prompts([str(tmp_path / "phone.jpg")], "What?")
    assert [image.size for image in generate._pictures(loaded, prompt)] == [(30, 60)]


def test_cut_in_the_middle_it_leaves_no_file_that_looks_whole(merged_run, pictures, tmp_path, monkeypatch):
    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate", cut)
    output = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate.main(["--model", str(merged_run / "merged"), str(pictures), "--output", str(output)])
    assert not output.exists()
