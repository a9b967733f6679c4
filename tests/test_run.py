"""The whole program on a random model: what it prints, what it writes, and that it goes on where it was cut."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sft_phi3v import evaluation, preview, run
from sft_phi3v.data import load_splits, to_examples
from sft_phi3v.model import load_model
from sft_phi3v.phi3_v import Phi3VProcessor
from sft_phi3v.recipe import load_recipe

REPOSITORY = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("one_thread")


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_a_run_trains_scores_and_leaves_everything_behind(write_recipe, tmp_path, capsys):
    path = write_recipe(eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, logging_steps=1)
    run.main([path])
    printed = capsys.readouterr().out
    out = tmp_path / "out"

    # What would have shown a wrong mask, a wrong landing or a wrong quantisation:
    assert "rows: 32 to train on, 4 held out" in printed
    assert "⟦Colour: " in printed
    assert ".<|end|>⟧" in printed
    assert "<|image|>×313" in printed
    assert "language_model" in printed
    assert "4-bit nf4 + float32" in printed

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.keys() == {"before", "after", "after_shuffled", "after_blank", "baseline"}
    assert metrics["after_shuffled"].pop("moved") == 3
    for test in ("better_than_before", "better_than_shuffled"):
        assert metrics["after"].pop(test)["label"].keys() == {"difference", "p"}
    assert metrics["after"].pop("errors").keys() == {"worst", "by_category"}
    assert "It does not look at the picture" in printed
    for name, scores in metrics.items():
        baseline = set() if name == "baseline" else {"length", "confusion"}
        assert scores.keys() - baseline == {"rows", "parsed", "stopped", "fields", "intervals"}
        assert scores["rows"] == 3
        assert scores["fields"].keys() == {"label"}
        assert scores["fields"]["label"].keys() == {"exact", "normalised", "token_f1", "edit_similarity"}
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(
        line.keys() == {"row", "reference", "before", "after", "after_shuffled", "after_blank"} for line in lines
    )
    assert all(line["reference"].startswith("Colour: ") for line in lines)

    # LoRA's B matrices start at zero: every one of them has learned something.
    learned = adapter(out)
    assert len(learned) == 2 * 8
    assert all("language_model" in name for name in learned)
    assert all(weight.abs().sum() > 0 for name, weight in learned.items() if "lora_B" in name)

    # load_best_model_at_end: what is saved is the checkpoint with the best evaluation loss.
    best = json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert all(torch.equal(weight, adapter(best)[name]) for name, weight in learned.items())

    # The run can be repeated and understood from its folder alone.
    assert load_recipe([str(out / "recipe.yaml")]) == load_recipe([path])
    assert json.loads((out / "environment.json").read_text())["packages"]["trl"]
    text = "<|user|>\nWhat is this?<|end|>\n<|assistant|>\n"
    original, saved = (
        Phi3VProcessor.from_pretrained(load_recipe([path]).model.model_name_or_path),
        Phi3VProcessor.from_pretrained(out),
    )
    assert saved(text=text)["input_ids"] == original(text=text)["input_ids"]
    assert saved.image_processor.num_crops == original.image_processor.num_crops


def test_training_keeps_the_real_stop_tokens(write_recipe, monkeypatch):
    """Trainer aligns the model's special tokens with the tokenizer's, whose eos is not what ends a turn."""
    seen = {}
    original = run.Evaluation.run

    def remember(self, name, model, **kwargs):
        seen[name] = set(model.generation_config.eos_token_id)
        return original(self, name, model, **kwargs)

    monkeypatch.setattr(run.Evaluation, "run", remember)
    run.main([write_recipe(max_steps=1)])
    assert seen["after"] == seen["before"] == {32007, 32000}


def test_a_run_cut_in_the_middle_resumes_to_the_same_weights_bit_for_bit(write_recipe, tmp_path, monkeypatch):
    changes = {"save_steps": 2, "max_steps": 4, "lora_dropout": 0.1, "eval_strategy": "steps", "eval_steps": 1}
    changes |= {"model_name_or_path": str(REPOSITORY / "recipes" / "tiny_base")}  # a smaller vocabulary: half the time
    run.main([write_recipe(**changes, output_dir=str(tmp_path / "whole"))])

    class PowerCut(Exception):
        pass

    def cut(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise PowerCut
        return original(self, *args, **kwargs)

    original = run.Trainer.training_step
    path = write_recipe(**changes, output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr(run.Trainer, "training_step", cut)
        with pytest.raises(PowerCut):
            run.main([path])
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    before = json.loads((tmp_path / "cut" / "metrics.json").read_text())["before"]

    calls = []
    generate = evaluation.generate
    monkeypatch.setattr(
        evaluation, "generate", lambda *args, **kw: calls.append(kw["description"]) or generate(*args, **kw)
    )
    run.main([path, "--resume_from_checkpoint", "true"])
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # What was scored before the cut is taken over, not generated again from half-trained weights.
    sampled = ["generate (while it trains)"] * 2  # after steps 3 and 4
    assert calls == [*sampled, "generate (after)", "generate (after, shuffled)", "generate (after, blank)"]
    assert json.loads((tmp_path / "cut" / "metrics.json").read_text())["before"] == before


def conversations(folder, lengths):
    """Text-only rows whose answers have very different numbers of tokens."""
    folder.mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "abc " * n}]}
        for n in lengths
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / "rows.jsonl")


def trainer_for(recipe):
    prepared = preview.prepare(recipe)
    collator, train, held_out = prepared.collator, prepared.train, prepared.held_out
    trainer = run.Trainer(
        model=load_model(recipe),
        args=recipe.training,
        train_dataset=to_examples(train, recipe),
        eval_dataset=to_examples(held_out, recipe),
        data_collator=collator,
        processing_class=collator.processor,
    )
    evaluation = run.Evaluation(recipe, collator.processor, train, held_out)
    trainer.watch(recipe, evaluation, run.Tracking(recipe), preview.largest_batch(recipe, prepared))
    return trainer


def test_eval_loss_is_a_mean_over_supervised_tokens_whatever_the_batch_size(write_recipe, tmp_path):
    data = conversations(tmp_path / "text", [1, 2, 3, 5, 8, 13, 21, 34, 1, 1])
    losses = []
    for batch_size in (1, 2, 3, 5):
        path = write_recipe(
            dataset_name=data, answer=None, held_out=5, load_in_4bit=None, use_bnb_nested_quant=None, use_peft=None,
            per_device_eval_batch_size=batch_size,
        )  # fmt: skip
        trainer = trainer_for(load_recipe([path]))
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)

    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in trainer.eval_dataset:
            batch = trainer.data_collator([example])
            count = int((batch["labels"] != -100).sum())
            total += float(trainer.model(**batch).loss) * count
            tokens += count
    assert losses[0] == pytest.approx(total / tokens, abs=1e-5)


def test_the_loss_does_not_depend_on_how_a_batch_is_split_into_accumulation_steps(write_recipe, tmp_path):
    data = conversations(tmp_path / "text", [1, 34, 2, 21, 3, 13, 5, 8, 1, 2])
    found = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        path = write_recipe(
            dataset_name=data, answer=None, held_out=2, load_in_4bit=None, use_bnb_nested_quant=None, lora_dropout=0.0,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=2,
            logging_steps=1, train_sampling_strategy="sequential", output_dir=str(tmp_path / f"out{batch_size}"),
            optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        run.main([path])
        history = json.loads((tmp_path / f"out{batch_size}" / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        found.append((losses, adapter(tmp_path / f"out{batch_size}")))
    (losses, weights), *others = found
    assert len(losses) == 2
    for other_losses, other_weights in others:
        assert other_losses == pytest.approx(losses, abs=1e-5)
        assert all(torch.allclose(weights[name], other_weights[name], atol=1e-6) for name in weights)


def test_text_only_and_picture_rows_train_together(write_recipe, tmp_path, pictures_folder):
    rows = []
    for index, picture in enumerate(sorted(pictures_folder.glob("*/*.png"))[:12]):
        images = [str(picture)] * (index % 3)
        rows.append(
            {
                "images": images,
                "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"{index}"}],
            }
        )
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    run.main([write_recipe(dataset_name=str(path), answer=None, held_out=3)])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["after"]["fields"].keys() == {"answer"}


def test_overlong_rows_are_refused_or_dropped_before_the_model_is_loaded(write_recipe, tmp_path, capsys, monkeypatch):
    data = conversations(tmp_path / "text", [40, 2, 3, 1, 4, 5, 50, 6])  # held out with this seed: row 3
    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    keys = {"dataset_name": data, "answer": None, "held_out": 1, "max_length": 60}
    with pytest.raises(SystemExit, match=r"max_length: \d of \d rows are longer than 60 tokens"):
        run.main([write_recipe(**keys)])
    preview.prepare(load_recipe([write_recipe(**keys, overlong="drop")]))
    assert "overlong: left out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="max_length: 7 of 7 rows are longer than 5 tokens"):
        run.main([write_recipe(**{**keys, "max_length": 5}, overlong="drop")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "nowhere/to/be/found"}, "nowhere/to/be/found"),
        ({"answer": "{colour}"}, r"no such column: .*label"),
        ({"image_column": "photo"}, "image_column"),
        ({"model_name_or_path": "nowhere/at/all"}, "model_name_or_path"),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, "lora_target_modules"),
        ({"lora_rank": 8}, "lora_r"),
        ({"use_cpu": None, "bf16": True}, "use_cpu true"),
    ],
)
def test_what_a_new_user_gets_wrong_ends_in_one_clear_line(write_recipe, changes, message):
    with pytest.raises(SystemExit, match=rf"(?s)^error: .*{message}"):
        run.main([write_recipe(**changes)])


def test_another_runs_folder_is_not_overwritten(write_recipe, tmp_path):
    run.main([write_recipe(max_steps=1)])
    before = adapter(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"(?s)already holds a run of another recipe \(.*learning_rate: 0.001 → 0.5"):
        run.main([write_recipe(max_steps=1, learning_rate=0.5)])
    assert all(torch.equal(weight, before[name]) for name, weight in adapter(tmp_path / "out").items())


def test_evaluation_scores_the_saved_adapter_again(write_recipe, tmp_path, capsys):
    path = write_recipe()
    with pytest.raises(SystemExit, match="holds no trained model"):
        evaluation.main([path])
    run.main([path])
    first = json.loads((tmp_path / "out" / "metrics.json").read_text())
    completions = (tmp_path / "out" / "completions.jsonl").read_text()
    evaluation.main([path])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == first
    assert (tmp_path / "out" / "completions.jsonl").read_text() == completions
    assert "after, pictures shuffled" in capsys.readouterr().out


def test_the_saved_adapter_is_the_trained_one(write_recipe, tmp_path):
    path = write_recipe()
    recipe = load_recipe([path])
    run.main([path])
    saved = PeftModel.from_pretrained(load_model(recipe), tmp_path / "out")
    state = {name: weight for name, weight in saved.state_dict().items() if "lora_" in name}
    written = adapter(tmp_path / "out")
    assert {name.replace(".default", "") for name in state} == set(written)
    assert all(
        torch.equal(weight.float(), written[name.replace(".default", "")].float()) for name, weight in state.items()
    )


def test_preview_needs_no_weights_and_says_what_is_missing(write_recipe, capsys, monkeypatch):
    preview.main([write_recipe()])
    printed = capsys.readouterr().out
    assert printed.count("✓") == 4
    assert "⟦Colour:" in printed
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(SystemExit):
        preview.main([write_recipe(model_name_or_path="nowhere/at/all", use_cpu=None, bf16=True)])
    printed = capsys.readouterr().out
    assert re.search(r"✗ .*recipe\.yaml is for a GPU", printed)
    assert "✗ model_name_or_path: 'nowhere/at/all' cannot be read" in printed
    assert "✓ dataset_name: " in printed


def test_preview_shows_the_data_on_a_machine_without_the_gpu_that_training_needs(write_recipe, capsys):
    with pytest.raises(SystemExit):
        preview.main([write_recipe(use_cpu=None, bf16=True)])
    printed = capsys.readouterr().out
    assert printed.count("✗") == 1
    assert "⟦Colour:" in printed


def test_the_masked_example_is_green_on_a_terminal(write_recipe, tiny_processor):
    recipe = load_recipe([write_recipe()])
    train, _ = load_splits(recipe)
    example = to_examples(train, recipe)[0]
    shown = preview.masked_example(preview.runs_of(example, preview.Collator(tiny_processor)), colour=True)
    assert f"{preview.GREEN}Colour: " in shown
    assert shown.count(preview.GREEN) == 1
    assert "<|image|>×313" in shown


def test_evaluation_of_an_interrupted_scoring_leaves_the_runs_own_scores(write_recipe, tmp_path, monkeypatch):
    path = write_recipe()
    run.main([path])
    files = [tmp_path / "out" / name for name in ("metrics.json", "completions.jsonl")]
    before = [file.read_text() for file in files]

    def interrupted(*args, **kwargs):
        if "after" in kwargs["description"]:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    generate = evaluation.generate
    monkeypatch.setattr(evaluation, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main([path])
    assert [file.read_text() for file in files] == before


def test_evaluation_with_another_recipe_is_refused(write_recipe):
    run.main([write_recipe(max_steps=1)])
    with pytest.raises(SystemExit, match=r"trained by another recipe \(it differs in answer, held_out\)"):
        evaluation.main([write_recipe(max_steps=1, answer="It is {label}", held_out=7)])


def test_evaluation_scores_the_rows_that_the_run_scored(write_recipe, tmp_path):
    data = conversations(tmp_path / "text", [1, 2, 40, 1, 4, 5, 50, 7])
    path = write_recipe(dataset_name=data, answer=None, held_out=6, max_length=60, overlong="drop", eval_rows=None)
    run.main([path])
    first = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert first["after"]["rows"] < 6  # the long ones were left out
    evaluation.main([path])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == first


def test_a_full_fine_tuning_is_saved_whole_and_can_be_scored_again(write_recipe, tmp_path):
    keys = {"use_peft": None, "lora_r": None, "load_in_4bit": None, "use_bnb_nested_quant": None}
    path = write_recipe(**keys)
    run.main([path])
    first = json.loads((tmp_path / "out" / "metrics.json").read_text())
    evaluation.main([path])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == first
    saved = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(Path(load_recipe([path]).model.model_name_or_path) / "model.safetensors")
    assert saved.keys() == original.keys()  # Microsoft's names
    changed = [name for name in saved if not torch.equal(saved[name], original[name])]
    assert any(".layers." in name for name in changed)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"][:2] != 2


def test_previewing_the_burberry_recipe_says_what_it_would_need(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("WANDB_PROJECT", "before")  # the recipe's `env:` block sets it; put back afterwards
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit):
        preview.main(["recipes/burberry.yaml"])
    printed = capsys.readouterr().out
    assert "the recipe is right" in printed
    assert "microsoft/Phi-3-vision-128k-instruct" in printed
    assert "DBQ/Burberry.Product.prices.United.States" in printed


def test_help_is_quick_and_says_where_keys_are_described(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    assert stop.value.code == 0
    assert "--num_crops" in capsys.readouterr().out


def test_rows_of_several_data_sets_with_odd_text_end_in_a_card(write_recipe, pictures_folder, tmp_path):
    """A row's name is then a path and a number, which is no file name; and U+2028 ends a line to some readers."""
    paths = []
    for colour in ("red", "blue"):
        folder = tmp_path / "data" / colour
        folder.mkdir(parents=True)
        rows = [
            {"image": str(pictures_folder / colour / f"{number}.png"), "label": f"{colour}\u2028| <b>"}
            for number in range(8)
        ]
        (folder / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        paths.append({"path": str(folder)})
    path = write_recipe(
        datasets=paths, dataset_name=None, save_steps=1, max_steps=2, prompt="Which {{colour}}?", held_out=4
    )
    run.main([path])
    out = tmp_path / "out"
    text = (out / "README.md").read_text()
    assert "pictures of red, blue" in text
    assert "> Which {colour}?" in text
    assert len(list((out / "examples").glob("*.jpg"))) == 3
    assert text.count("![](examples/") == 3
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"metric_for_best_model": "label_rouge"}, "expected one of eval_loss, .*eval_label_exact"),
        ({"metric_for_best_model": "label_exact", "generation_rows": 0}, "with `generation_rows` above 0"),
        ({"metric_for_best_model": "label_exact", "greater_is_better": False}, "would keep the worst"),
        ({"metric_for_best_model": "loss", "greater_is_better": True}, "would keep the worst"),
    ],
)
def test_a_metric_that_cannot_choose_the_best_model_is_refused_before_it_is_loaded(
    keys, expected, write_recipe, monkeypatch
):
    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=f"error: `metric_for_best_model.*{expected}"):
        run.main([write_recipe(**keys, eval_strategy="steps", eval_steps=1)])


def test_a_score_of_generation_chooses_the_checkpoint_that_is_kept(write_recipe, tmp_path, monkeypatch):
    given = iter([0.5, 1.0, 0.0])
    sampled = evaluation.Evaluation.sampled
    monkeypatch.setattr(
        evaluation.Evaluation,
        "sampled",
        lambda *a: (sampled(*a)[0] | {"eval_label_exact": next(given)}, sampled(*a)[1]),
    )
    path = write_recipe(
        max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="label_exact",
    )  # fmt: skip
    run.main([path])
    best = adapter(tmp_path / "out" / "checkpoint-2")
    assert all(torch.equal(value, best[name]) for name, value in adapter(tmp_path / "out").items())
    assert not torch.equal(*(next(iter(adapter(tmp_path / "out" / f"checkpoint-{step}").values())) for step in (2, 3)))
