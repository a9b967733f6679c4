"""Scores worked out by hand, generation against generation one by one, and pictures that are really shuffled."""

import io
import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import REPOSITORY
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from test_scoring import ANSWER, REFERENCES, completions

from sft_phi3v import evaluation, preview
from sft_phi3v.data import ROW, load_splits
from sft_phi3v.evaluation import BlankPictures, Evaluation, ShuffledPictures, generate, verdict
from sft_phi3v.phi3_v import Phi3VForCausalLM
from sft_phi3v.recipe import load_recipe
from sft_phi3v.scoring import Completion, Scorer


def rows(colours, per_row=1):
    return [
        {
            "images": [Image.new("RGB", (64, 48 + 16 * index), colour)] * per_row,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * per_row + [{"type": "text", "text": "What" * (index + 1)}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": colour}]},
            ],
            "row": index,
        }
        for index, colour in enumerate(colours)
    ]


def test_every_row_gets_another_rows_pictures_and_keeps_the_rest():
    examples = rows(["red", "green", "blue", "white", "black"])
    shuffled = list(ShuffledPictures(examples, seed=0))
    given = [id(example["images"][0]) for example in shuffled]
    own = [id(example["images"][0]) for example in examples]
    assert sorted(given) == sorted(own)
    assert all(new != old for new, old in zip(given, own, strict=True))
    assert [example["messages"] for example in shuffled] == [example["messages"] for example in examples]
    assert given == [id(example["images"][0]) for example in ShuffledPictures(examples, seed=0)]


def test_pictures_are_shuffled_among_rows_with_as_many():
    examples = [*rows(["red", "green"], per_row=2), *rows(["blue", "white", "black"]), *rows(["pink"], per_row=0)]
    shuffled = list(ShuffledPictures(examples, seed=1))
    assert [len(example["images"]) for example in shuffled] == [2, 2, 1, 1, 1, 0]
    assert all(new["images"] is not old["images"] for new, old in zip(shuffled[:5], examples[:5], strict=True))


def test_blank_pictures_have_their_sizes_and_nothing_else():
    examples = [*rows(["red", "green"], per_row=2), *rows(["pink"], per_row=0)]
    blank = list(BlankPictures(examples))
    for before, after in zip(examples, blank, strict=True):
        assert [image.size for image in after["images"]] == [image.size for image in before["images"]]
        assert all(image.getcolors() == [(image.width * image.height, (128, 128, 128))] for image in after["images"])
        assert {**after, "images": 0} == {**before, "images": 0}


@pytest.mark.parametrize(
    ("better_p", "seen_p", "moved", "told"),
    [
        (0.001, 0.001, 9, "Better than before in label. It uses the picture: label is right in 90% of the rows, with "
         "other rows' pictures in 20% (always the commonest: 30%)."),
        (0.001, 0.4, 9, "Better than before in label. It does not look at the picture: with other rows' pictures it "
         "does as well."),
        (0.4, 0.001, 9, "No better than before in any field. It uses the picture: "),
        (0.001, 1.0, 0, "Whether it uses the picture is not known: no row could be given another row's."),
    ],
)  # fmt: skip
def test_the_verdict_in_words(better_p, seen_p, moved, told):
    def scores(share):
        return {"fields": {"label": {"exact": share}}}

    tests = {
        "better_than_before": {"label": {"difference": 0.9, "p": better_p}},
        "better_than_shuffled": {"label": {"difference": 0.7, "p": seen_p}},
    }
    shuffled = scores(0.2) | {"moved": moved}
    assert told in verdict({"after": scores(0.9) | tests, "after_shuffled": shuffled, "baseline": scores(0.3)})


@pytest.fixture(scope="module")
def model(tiny_folder):
    return Phi3VForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


def test_batched_generation_gives_what_one_by_one_gives(model, tiny_processor):
    examples = [*rows(["red", "green", "blue"]), *rows(["pink"], per_row=0), *rows(["black"], per_row=2)]
    model.train()
    together = generate(model, tiny_processor, examples, max_new_tokens=5, batch_size=3)
    alone = [generate(model, tiny_processor, [one], max_new_tokens=5, batch_size=1)[0] for one in examples]
    assert together == alone
    assert model.training  # as it was found
    assert [completion.reference for completion in together] == ["red", "green", "blue", "pink", "black"]


def test_out_of_memory_halves_the_batch_and_goes_on(model, tiny_processor, monkeypatch, capsys):
    examples = rows(["red", "green", "blue", "white", "black", "pink", "brown"])
    expected = generate(model, tiny_processor, examples, max_new_tokens=4, batch_size=4, progress=False)
    whole, sizes = evaluation._generate_batch, []

    def small_gpu(model, processor, batch, inputs, most, room=2):
        assert len(inputs["input_ids"]) == len(batch)
        sizes.append(len(batch))
        if len(batch) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(model, processor, batch, inputs, most)

    monkeypatch.setattr(evaluation, "_generate_batch", small_gpu)
    found = generate(model, tiny_processor, examples, max_new_tokens=4, batch_size=5, progress=False)
    assert found == expected
    assert sizes == [5, 2, 2, 2, 1]
    assert (
        capsys.readouterr().out == "out of memory: generating 2 rows at once from here on (`generation_batch_size`)\n"
    )

    monkeypatch.setattr(evaluation, "_generate_batch", partial(small_gpu, room=0))
    with pytest.raises(ValueError, match="One row alone does not fit into memory"):
        generate(model, tiny_processor, examples, max_new_tokens=4, batch_size=5, progress=False)


def test_another_error_of_the_device_is_not_taken_for_a_lack_of_memory(model, tiny_processor, monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(evaluation, "_generate_batch", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        generate(model, tiny_processor, rows(["red"]), max_new_tokens=4, batch_size=5, progress=False)


def test_generation_sees_the_prompt_and_never_the_answer(model, tiny_processor):
    examples = rows(["red"])
    changed = rows(["red"])
    changed[0]["messages"][1]["content"][0]["text"] = "something else"
    first, second = (
        generate(model, tiny_processor, row, max_new_tokens=5, batch_size=1)[0] for row in (examples, changed)
    )
    assert first.text == second.text
    assert (first.reference, second.reference) == ("red", "something else")


def test_generation_stops_at_the_end_of_the_turn(model, tiny_processor):
    assert set(model.generation_config.eos_token_id) == {32007, 32000}

    def end_every_turn(module, inputs, logits):
        logits[..., 32007] = 1e4
        return logits

    hook = model.lm_head.register_forward_hook(end_every_turn)
    try:
        found = generate(model, tiny_processor, rows(["red", "green"]), max_new_tokens=5, batch_size=2)
    finally:
        hook.remove()
    assert [(completion.text, completion.stopped) for completion in found] == [("", True)] * 2


def test_a_picture_that_cannot_be_decoded_is_named_by_its_row(model, tiny_processor):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "png")
    broken = rows(["red", "green"])
    broken[1]["images"] = [Image.open(io.BytesIO(file.getvalue()[:60]))]
    with pytest.raises(ValueError, match=r"Rows \[1, 0\] cannot be read: image file is truncated"):
        generate(model, tiny_processor, broken, max_new_tokens=5, batch_size=2)


@pytest.fixture
def source():
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    rows = Dataset.from_dict({"image": pictures, "title": ["a", "b", "c"]})
    return rows.add_column(ROW, [0, 1, 2])


def test_files_are_written_whole_and_read_back_on_resume(write_recipe, model, tiny_processor, tmp_path, source):
    recipe = load_recipe([write_recipe(answer="{title}", eval_rows=2)])
    evaluation = Evaluation(recipe, tiny_processor, source, source)
    assert not evaluation.resume()
    evaluation.run("before", model)
    evaluation.write()
    folder = tmp_path / "out"
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 2  # eval_rows
    assert all(line["before"].keys() == {"text", "stopped", "fields"} for line in lines)
    assert sorted(path.name for path in folder.iterdir()) == ["completions.jsonl", "metrics.json"]

    again = Evaluation(recipe, tiny_processor, source, source)
    assert again.resume()
    assert again.metrics == evaluation.metrics == json.loads((folder / "metrics.json").read_text())
    assert again.completions == evaluation.completions
    (folder / "completions.jsonl").write_text('{"row": 0, "reference": "a"')  # cut short by someone else
    assert not Evaluation(recipe, tiny_processor, source, source).resume()


def test_a_control_that_could_not_shuffle_says_so(write_recipe, model, tiny_processor, source):
    recipe = load_recipe([write_recipe(answer="{title}", eval_rows=1)])
    evaluation = Evaluation(recipe, tiny_processor, source, source)
    assert evaluation.run("after_shuffled", model)["moved"] == 0
    assert "after, 0 pictures shuffled" in evaluation.table()


def test_a_special_token_inside_a_completion_is_not_hidden(tiny_processor):
    decode = tiny_processor.tokenizer.decode
    assert "<|user|>" in decode(tiny_processor(text="a <|user|> b")["input_ids"])


def test_the_table_shows_every_score(write_recipe, tiny_processor):
    scorer = Scorer(ANSWER, REFERENCES)
    evaluation = Evaluation.__new__(Evaluation)
    evaluation.scorer = scorer
    evaluation.metrics = {name: scorer.score(completions(*REFERENCES)) for name in ("after", "before")}
    table = evaluation.table().splitlines()
    assert [line.split()[0] for line in table[1:]] == ["before", "after"]
    assert "price: within 10%" in table[0]
    assert table[1].split() == ["before", "3", "100.0%", "100.0%", "100.0%", "100.0%", "0.0%", "100.0%"]


def cut_after(batches, monkeypatch):
    """Evaluation is killed after so many batches; what it had generated by then."""
    real, seen = evaluation._generate_batch, []

    def generated(model, processor, examples, inputs, most):
        if len(seen) == batches:
            raise KeyboardInterrupt
        seen.append([example["row"] for example in examples])
        return real(model, processor, examples, inputs, most)

    monkeypatch.setattr(evaluation, "_generate_batch", generated)
    return seen


def test_an_evaluation_that_was_cut_does_not_generate_again_what_is_finished(finished_run, monkeypatch):
    folder, arguments = finished_run
    before = json.loads((folder / "metrics.json").read_text())
    recipe = load_recipe([*arguments, "--generation_batch_size", "1"])
    with monkeypatch.context() as patch:
        seen = cut_after(4, patch)  # three rows before, one after
        with pytest.raises(KeyboardInterrupt):
            evaluation.evaluate(recipe)
    finished = [row for batch in seen for row in batch]
    assert len(finished) == 4 and json.loads((folder / "metrics.json").read_text()) == before
    journals = sorted((folder / ".generated").iterdir())
    assert len(journals) == 2
    for journal in journals:
        with journal.open("a") as file:
            file.write('\n[1, 3, "Colour: re')  # a line that was cut
    with monkeypatch.context() as patch:
        seen = cut_after(99, patch)
        found = evaluation.evaluate(recipe)
    assert len(seen) == 4 * 3 - 4
    assert found.metrics == before == json.loads((folder / "metrics.json").read_text())
    assert not (folder / ".generated").exists()


def test_completions_of_other_weights_or_another_question_are_not_taken_over(finished_run, monkeypatch):
    folder, arguments = finished_run
    recipe = load_recipe([*arguments, "--generation_batch_size", "1"])
    with monkeypatch.context() as patch:
        cut_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            evaluation.evaluate(recipe)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, folder / "adapter_model.safetensors")
    with monkeypatch.context() as patch:
        seen = cut_after(99, patch)
        evaluation.evaluate(recipe)
    assert len(seen) == 4 * 3 - 3  # only those of the base model


@pytest.mark.parametrize("what", ["base", "adapter", "checkpoint", "merged"])
def test_any_model_can_be_scored_on_any_split(what, merged_run, tmp_path, capsys):
    model = {
        "base": str(REPOSITORY / "recipes" / "tiny_base"),
        "adapter": str(merged_run),
        "checkpoint": str(next(merged_run.glob("checkpoint-*"))),
        "merged": str(merged_run / "merged"),
    }[what]
    out = tmp_path / "elsewhere"
    arguments = [str(merged_run / "recipe.yaml"), "--output_dir", str(out), "--model", model, "--split", "train"]
    evaluation.main([*arguments, "--limit", "4"])
    [folder] = (out / "scores").iterdir()
    printed = capsys.readouterr().out
    assert not (out / "metrics.json").exists() and str(folder) in printed
    assert "leakage: these rows are the ones to train on" in printed
    assert json.loads((folder / "data.json").read_text())["leakage"]["pictures"] == 4
    metrics = json.loads((folder / "metrics.json").read_text())
    names = ["baseline", "before", "model", "model_shuffled", "model_blank"]
    assert [*metrics] == (names if what != "base" else [name for name in names if name != "before"])
    assert {scores["rows"] for scores in metrics.values()} == {4}
    train, _ = load_splits(load_recipe(arguments))
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert {line["row"] for line in lines} <= {*train[ROW]}
    assert metrics["model"]["parsed"] == (0.0 if what == "base" else 1.0)
    if what == "merged":  # the very model that the run scored
        evaluation.main([str(merged_run / "recipe.yaml"), "--output_dir", str(out), "--model", model])
        own = json.loads((merged_run / "metrics.json").read_text())["after"]["fields"]
        [again] = [path for path in (out / "scores").iterdir() if path != folder]
        assert json.loads((again / "metrics.json").read_text())["model"]["fields"] == own


def test_a_model_or_a_split_that_is_not_there_is_named(merged_run, tmp_path):
    recipe = str(merged_run / "recipe.yaml")
    for arguments, expected in (
        (["--model", str(tmp_path)], "holds neither adapter_config.json nor config.json"),
        (["--model", str(tmp_path / "nowhere")], "there is no folder"),
        (["--split", "validation"], "`split` is 'validation'; .* has the splits train"),
        (["--limit", "0"], "`limit` is 0, expected 1 or more"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{expected}"):
            evaluation.main([recipe, *arguments])


def test_worst_rows_and_categories_are_found():
    scorer = Scorer(ANSWER, REFERENCES * 4)
    assert scorer.kinds["category"] == "category"
    right = [Completion(row, text, text, True) for row, text in enumerate(REFERENCES * 4)]
    assert scorer.worst(right)["worst"] == {"title": [], "category": [], "price": []}
    texts = [completion.text for completion in right]
    texts[5] = texts[5].replace(scorer.parse(texts[5])["title"], "something else altogether")
    texts[2] = "no form at all"
    found = scorer.worst([replace(one, text=text) for one, text in zip(right, texts, strict=True)])
    assert found["worst"]["title"][0] == 2 and set(found["worst"]["title"]) == {2, 5}
    assert found["worst"]["category"] == found["worst"]["price"] == [2]
    shares = found["by_category"]["category"]
    assert sum(one["rows"] for one in shares.values()) == 12
    assert sum(one["rows"] * one["right"] for one in shares.values()) == pytest.approx(10)


def test_a_picture_that_stands_in_both_splits_byte_for_byte_is_counted_and_said(write_recipe, tmp_path, capsys):
    table = tmp_path / "data"
    table.mkdir()
    for split, colours in (("train", ["red", "green", "blue"]), ("test", ["white", "green", "black"])):
        rows = []
        for number, colour in enumerate(colours):
            Image.new("RGB", (60, 80), colour).save(table / f"{split}{number}.png")
            rows.append({"image": f"{split}{number}.png", "label": colour})
        (table / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared = preview.prepare(load_recipe([write_recipe(dataset_name=str(table))]))
    assert prepared.overview["leakage"] == {"pictures": 1, "rows": [1]}
    assert "leakage: 1 held-out rows show a picture that is trained on as well" in capsys.readouterr().out
    (table / "test1.png").write_bytes((table / "test0.png").read_bytes())
    prepared = preview.prepare(load_recipe([write_recipe(dataset_name=str(table))]))
    assert prepared.overview["leakage"] == {"pictures": 0, "rows": []}
    assert "leakage" not in capsys.readouterr().out


def test_a_model_whose_vision_tower_is_zeroed_is_called_out(merged_run, tmp_path, capsys):
    blind = tmp_path / "blind"
    shutil.copytree(merged_run / "merged", blind)
    path = blind / "model.safetensors"
    weights = {
        name: torch.zeros_like(value) if "img_processor" in name else value for name, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    arguments = [str(merged_run / "recipe.yaml"), "--output_dir", str(tmp_path / "out"), "--split", "train"]
    arguments += ["--limit", "24", "--generation_batch_size", "24"]
    for model, expected in (
        (merged_run / "merged", "It uses the picture: label is right in"),
        (blind, "It does not look"),
    ):
        evaluation.main([*arguments, "--model", str(model)])
        assert expected in capsys.readouterr().out
