"""What W&B and TensorBoard were given, read back from their files: numbers, pictures, recipe, models, no secrets."""

import hashlib
import itertools
import json
import os
import re
import struct
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
import yaml
from conftest import REPOSITORY, offline_wandb
from datasets import Dataset
from PIL import Image
from wandb.proto import wandb_internal_pb2
from wandb.sdk.launch.sweeps import utils as sweeps

from sft_phi3v import run
from sft_phi3v.data import ROW, load_splits, to_examples
from sft_phi3v.evaluation import Evaluation, thumbnail
from sft_phi3v.recipe import load_recipe
from sft_phi3v.scoring import Completion
from sft_phi3v.tracking import Launch, Meter, Tracking, WandB

PLANTED = ("hf_planted", "plantedplanted")


def records(path):
    """The records of an offline W&B run: a LevelDB log of 32 KiB blocks after a header of 7 bytes."""
    data, position, part = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no header fits into the rest of a block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def logs_of(folder):
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)


def items(message):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message}


@pytest.fixture(scope="module")
def training(merged_run):
    """What W&B holds of the training, and of the merge that followed."""
    trained, merged = logs_of(merged_run)
    return list(records(trained)), list(records(merged))


def history(found):
    return [items(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]


def artifacts(found):
    return {
        record.artifact.name: record.artifact
        for record in found
        if record.WhichOneof("record_type") == "artifact" and record.artifact.type == "model"
    }


def flat(value, prefix="eval"):
    """Every number of metrics.json, by its path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        if key not in ("confusion", "errors"):
            yield from flat(inner, f"{prefix}/{key}")
    if isinstance(value, int | float):
        yield prefix, value


def test_every_number_of_metrics_json_is_in_wandb_and_in_tensorboard(merged_run, training):
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    wanted = dict(flat(json.loads((merged_run / "metrics.json").read_text())))
    assert len(wanted) > 100
    found = {}
    for step in history(training[0]):
        found |= step
    assert {name: found[name] for name in wanted} == wanted

    scalars, last = {}, {}
    for path in merged_run.glob("runs/*/events*"):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.setdefault(value.tag, {})[event.step] = value.simple_value
                    last[value.tag] = value.simple_value
    assert {name: last[name] for name in wanted} == pytest.approx(wanted, rel=1e-6, abs=1e-9)  # float32
    assert scalars["train/loss"].keys() == {6, 12, 18, 24}
    assert scalars["eval/label_exact"].keys() == {12, 24}


def test_the_history_says_how_training_went(training, merged_run):
    steps = {step["train/global_step"]: step for step in history(training[0]) if "train/loss" in step}
    assert steps.keys() == {6, 12, 18, 24}
    states = json.loads((merged_run / "trainer_state.json").read_text())["log_history"]
    for state in states:
        if "loss" in state:
            seen = {name: steps[state["step"]][f"train/{name}"] for name in state.keys() - {"step"}}
            assert seen == {name: value for name, value in state.items() if name != "step"}
    assert [step for step, logged in steps.items() if "train/time_to_first_step" in logged] == [6]
    for step in steps.values():
        assert step["train/learning_rate"] >= 0 and step["train/grad_norm"] > 0
        assert 0 < step["train/supervised_tokens_per_second"] < step["train/tokens_per_second"]
        assert step["train/pictures_per_second"] > 0
        assert 0 < step["train/data_wait"] < 1
        assert 0.1 < step["train/peak_memory_gb"] < 24
    tokens = [steps[step]["train/num_supervised_tokens"] for step in sorted(steps)]
    lengths = json.loads((merged_run / "data.json").read_text())["histograms"]["supervised"]["edges"]
    rows = 4 * 24  # per_device_train_batch_size, max_steps
    assert tokens == sorted(tokens) and lengths[0] * rows <= tokens[-1] <= lengths[-1] * rows
    generated = [step for step in history(training[0]) if "eval/label_exact" in step]
    assert [step["train/global_step"] for step in generated] == [12, 24]
    assert all("eval/parsed" in step and "eval/label_token_f1" in step for step in generated)


def tables(found, folder):
    """The tables of an offline run and their pictures by hash, as they wait to be uploaded."""
    staging = folder / "wandb" / "artifacts" / "staging"  # the run's folder may have been copied since
    tables, pictures = [], {}
    for record in found:
        if record.WhichOneof("record_type") == "artifact" and record.artifact.type == "run_table":
            for entry in record.artifact.manifest.contents:
                path = staging / Path(entry.local_path).name
                if entry.path.endswith("table.json"):
                    tables.append(json.loads(path.read_text()))
                else:
                    pictures[hashlib.sha256(path.read_bytes()).hexdigest()] = path
    return tables, pictures


def test_the_same_pictures_are_shown_at_each_evaluation_with_what_was_made_of_them(training, merged_run):
    assert [step["train/global_step"] for step in history(training[0]) if "completions/path" in step] == [0, 12, 24, 24]
    found, pictures = tables(training[0], merged_run)
    lines = [json.loads(line) for line in (merged_run / "completions.jsonl").read_text().splitlines()]
    by_row = {str(line["row"]): line for line in lines}
    _, held_out = load_splits(recipe := load_recipe([str(merged_run / "recipe.yaml")]))
    examples = dict(zip(map(str, held_out[ROW]), to_examples(held_out, recipe), strict=True))
    for table in found:
        assert table["columns"] == [
            *("model", "step", "row", "picture", "reference", "completion", "stopped", "label: right", "label: error")
        ]
        assert len(table["data"]) == 2  # generation_rows
        for model, _, row, picture, reference, completion, stopped, right, error in table["data"]:
            assert reference == by_row[row]["reference"]
            assert right == (reference == completion) and (error == 0) == (reference == completion)
            if model in by_row[row]:
                assert (completion, stopped) == (by_row[row][model]["text"], by_row[row][model]["stopped"])
            with Image.open(pictures[picture["sha256"]]) as shown:
                own = thumbnail(examples[row]["images"][0])
                assert shown.size == own.size
                assert max(abs(a - b) for a, b in zip(shown.getpixel((5, 5)), own.getpixel((5, 5)), strict=True)) < 8
    assert [table["data"][0][0] for table in found] == ["before", "while it trains", "while it trains", "after"]
    assert [table["data"][0][1] for table in found] == [0, 12, 24, 24]
    assert len({json.dumps([[row[2], row[3]["sha256"]] for row in table["data"]]) for table in found}) == 1


def test_the_config_is_the_recipe_and_what_it_ran_on(training, merged_run):
    [config] = [items(record.config.update) for record in training[0] if record.WhichOneof("record_type") == "config"]
    assert config["learning_rate"] == 5e-3 and config["load_in_4bit"] is True and config["lora_r"] == 16
    assert config["model_name_or_path"] == "tiny_base" and config["answer"] == "Colour: {label}."
    environment = json.loads((merged_run / "environment.json").read_text())
    del environment["local_paths"], environment["finished"]
    assert config["environment"] == environment


def test_adapter_and_merged_model_are_artifacts_of_the_same_run(training, merged_run):
    first, second = ({record.run.run_id for record in found if record.HasField("run")} for found in training)
    assert first == second == {json.loads((merged_run / "tracking.json").read_text())["wandb"]}
    [run_id] = first
    adapter, merged = (artifacts(found) for found in training)
    files = {entry.path: entry for entry in adapter[f"adapter-{run_id}"].manifest.contents}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files.keys()
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in files)
    assert files["adapter_model.safetensors"].size == (merged_run / "adapter_model.safetensors").stat().st_size
    assert "last" in adapter[f"adapter-{run_id}"].aliases
    files = {entry.path for entry in merged[f"merged-{run_id}"].manifest.contents}
    assert files == {path.name for path in (merged_run / "merged").iterdir()}


def test_no_secret_and_no_path_of_this_machine_is_logged(training, merged_run, trained_run):
    texts = []
    for record in itertools.chain(*training):
        for entry in record.artifact.manifest.contents:
            entry.local_path = ""  # where the file waits to be uploaded: not part of what is
        texts.append(record.SerializeToString())
    logged = [*merged_run.glob("wandb/offline-run-*/files/**/*"), *merged_run.glob("runs/**/*")]
    logged += (merged_run / "wandb" / "artifacts" / "staging").glob("*")
    texts += [path.read_bytes() for path in logged if path.is_file()]
    assert sum(map(len, texts)) > 100_000
    forbidden = [*PLANTED, str(trained_run.parents[1]), str(REPOSITORY), str(Path.home())]
    for text in forbidden:
        assert not any(text.encode() in part for part in texts), text


@pytest.mark.parametrize("broken", ["log", "init", "log_artifact"])
def test_a_tracker_that_fails_is_said_once_and_training_goes_on(broken, write_recipe, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise wandb.errors.CommError("the server said: 503")

    with offline_wandb(), monkeypatch.context() as patch:
        patch.setattr(wandb if broken == "init" else wandb.Run, broken, fails)
        run.main([write_recipe(report_to="wandb", logging_steps=1, max_steps=2, eval_rows=1)])
    printed = capsys.readouterr().out
    assert printed.count("tracking: WandB failed and is left out from here on: the server said: 503") == 1
    assert "after" in json.loads((tmp_path / "out" / "metrics.json").read_text())
    wandb.finish()


def test_a_tracker_that_is_not_there_is_an_error_before_anything_is_loaded(write_recipe, tmp_path):
    for name, expected in (("comet_ml", "pip install comet-ml"), ("wundb", "wundb is not supported")):
        with pytest.raises(SystemExit, match=f"error: `report_to` is .*{expected}"):
            run.main([write_recipe(report_to=name)])
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_goes_on_as_the_same_wandb_run(write_recipe, tmp_path):
    with offline_wandb(log_model="checkpoint"):
        path = write_recipe(report_to="wandb", max_steps=4, save_strategy="steps", save_steps=2, logging_steps=1)
        run.main([path, "--max_steps", "2"])
        run.main([path, "--resume_from_checkpoint", "true"])
    first, second = ([*records(log)] for log in logs_of(tmp_path / "out"))
    assert {record.run.run_id for record in [*first, *second] if record.HasField("run")} == {
        json.loads((tmp_path / "out" / "tracking.json").read_text())["wandb"]
    }
    counted = [[step["train/num_supervised_tokens"] for step in history(found) if "train/loss" in step]
               for found in (first, second)]  # fmt: skip
    assert len(counted[0]) == len(counted[1]) == 2
    every = [*counted[0], *counted[1]]
    assert sorted(set(every)) == every  # it counts on
    aliases = [set(record.artifact.aliases) for record in [*first, *second]
               if record.WhichOneof("record_type") == "artifact" and record.artifact.type == "model"]  # fmt: skip
    assert [one - {"latest"} for one in aliases] == [{"step-2"}, {"last"}, {"step-4"}, {"last"}]


def test_the_meter_counts_what_the_batches_hold():
    meter = Meter()
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
    batch = {"labels": labels, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 1]]), "image_sizes": torch.ones(2, 2)}
    text = {"labels": labels[:1], "attention_mask": torch.tensor([[1, 1, 0]])}
    meter.fetched([batch, text], time.perf_counter() - 0.2)
    time.sleep(0.05)
    meter.on_step_end(None, None, None)
    found = meter.take()
    assert found["num_supervised_tokens"] == 5
    assert found["tokens_per_second"] / found["supervised_tokens_per_second"] == pytest.approx(8 / 5)
    assert found["tokens_per_second"] / found["pictures_per_second"] == pytest.approx(8 / 2)
    assert 0.7 < found["data_wait"] < 0.81  # 0.2 of at least 0.25 seconds
    assert meter.take()["tokens_per_second"] == 0


def test_the_first_step_says_once_what_the_time_before_it_went_into(capsys):
    meter, launch, state = Meter(), Launch(), SimpleNamespace(is_world_process_zero=True)
    launch.passed("imports")
    time.sleep(0.06)
    launch.passed("data")
    launch.passed("model")
    time.sleep(0.06)
    launch.passed("data")
    meter.launch = launch
    meter.fetched([], time.perf_counter())
    meter.on_step_end(None, state, None)
    said = capsys.readouterr().out
    total, parts = re.search(r"^started: first step after ([\d.]+) s \((.+)\)$", said, flags=re.MULTILINE).groups()
    parts = dict(part.rsplit(" ", 1) for part in parts.split(", "))
    assert list(parts) == ["imports", "data", "model", "first step"]
    assert 0.1 <= float(parts["data"]) <= float(total) - float(parts["imports"]) + 0.2  # each is rounded
    assert meter.take()["time_to_first_step"] == pytest.approx(float(total), abs=0.051)
    meter.fetched([], time.perf_counter())
    meter.on_step_end(None, state, None)
    assert "time_to_first_step" not in meter.take() and not capsys.readouterr().out


def test_the_example_sweep_trains_what_wandb_asks_for(tmp_path, monkeypatch):
    """Rendered as W&B's agent does it, and run with a launcher that only says what it was given."""
    sweep = yaml.safe_load((REPOSITORY / "recipes" / "sweeps" / "burberry.yaml").read_text())
    asked = {name: {"value": one.get("values", [one.get("min")])[-1]} for name, one in sweep["parameters"].items()}
    arguments = sweeps.create_sweep_command_args({"args": asked})["args"]
    command = sweeps.create_sweep_command(sweep["command"])
    at = command.index("${args}")
    launcher = tmp_path / "accelerate"
    launcher.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc"}
    said = subprocess.run(
        [*command[:at], *arguments, *command[at + 1 :]],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env=environment,
    ).stdout.split("\n")
    assert said[:2] == ["launch", "sft_phi3v/run.py"]
    monkeypatch.chdir(REPOSITORY)
    recipe = load_recipe([one for one in said[2:] if one], set_environment=False)
    assert recipe.training.output_dir == "outputs/sweep/abc"
    assert (recipe.training.learning_rate, recipe.model.lora_r, recipe.task.num_crops) == (2e-5, 64, 16)
    assert sweep["metric"]["name"] == "eval/after/fields/full_price/within_10pct"


def test_the_path_of_a_mixtures_data_set_does_not_reach_a_table(write_recipe, tiny_processor):
    rows = Dataset.from_dict(
        {"image": [Image.new("RGB", (60, 40), "red")], "label": ["red"], ROW: ["/home/me/coats:17"]}
    )
    evaluation = Evaluation(load_recipe([write_recipe()]), tiny_processor, rows, rows)
    tracking, seen = Tracking(evaluation.recipe), []
    wandb_stub = WandB.__new__(WandB)
    wandb_stub.table = lambda columns, cells, step: seen.append(dict(zip(columns, cells[0], strict=True)))
    tracking.trackers.append(wandb_stub)
    tracking.show(evaluation, [Completion("/home/me/coats:17", "Colour: red.", "Colour: blue.", True)], "after", 3)
    [row] = seen
    assert row.pop("picture").size == (60, 40)
    assert row == {
        "model": "after",
        "step": 3,
        "row": "coats:17",
        "reference": "Colour: red.",
        "completion": "Colour: blue.",
        "stopped": True,
        "label: right": 0.0,
        "label: error": pytest.approx(1.0),
    }
