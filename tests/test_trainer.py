"""What must not go wrong silently, and must not be lost, in one process; test_distributed.py has the others."""

import json
import math
import multiprocessing
import os
import resource
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sft_phi3v import run, trainer
from sft_phi3v.checkpoints import checkpoints, damage
from sft_phi3v.collator import Collator
from sft_phi3v.interruption import INTERRUPTION

REPOSITORY = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
KEYS = {
    "model_name_or_path": str(REPOSITORY / "recipes" / "tiny_base"),
    "max_steps": 5,
    "save_steps": 2,
    "logging_steps": 1,
    "lora_dropout": 0.1,
    "generation_rows": 0,
    "eval_rows": 1,
    "max_new_tokens": 1,
    "train_sampling_strategy": "sequential",
}


@pytest.fixture
def recipe(write_recipe):
    return lambda **changes: write_recipe(**(KEYS | changes))


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(first, second):
    first, second = adapter(first), adapter(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def history(folder, key):
    entries = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry[key]) for entry in entries if key in entry]


@pytest.fixture
def broken_batch(monkeypatch):
    """The pictures of the third batch are not numbers; the names of its rows."""
    original, batches = Collator.__call__, []

    def collate(self, examples):
        batch = original(self, examples)
        if len(examples) == 2:
            batches.append([str(example["row"]) for example in examples])
            if len(batches) == 3:
                crops = len(batch["pixel_values"]) + len(batch["image_sizes"])  # bytes are without the global ones
                batch["pixel_values"] = torch.full((crops, 3, 336, 336), math.nan)
        return batch

    monkeypatch.setattr(Collator, "__call__", collate)
    return batches


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows(recipe, tmp_path, broken_batch):
    with pytest.raises(SystemExit) as end:
        run.main([recipe()])
    report = json.loads((tmp_path / "out" / "nonfinite.json").read_text())
    rows = sorted(broken_batch[2])
    assert (report["step"], report["not_finite"], report["rows"]) == (3, "loss", rows)
    assert len(report["gradients"]) == 32
    saved = tmp_path / "out" / "checkpoint-2"
    said = (
        f"error: step 3: the loss is not a finite number, with rows {', '.join(rows)}. What was learned before is in "
    )
    assert str(end.value).startswith(f"{said}{saved}. ")
    assert damage(saved) is None
    assert all(weight.isfinite().all() for weight in adapter(saved).values())


def test_steps_without_a_number_are_left_out_if_the_recipe_says_so(recipe, tmp_path, broken_batch, capsys):
    run.main([recipe(nonfinite="skip")])
    assert "the loss is not a finite number, with rows" in capsys.readouterr().out
    losses = [loss for _, loss in history(tmp_path / "out", "loss")]
    assert len(losses) == 5 and losses.count(0.0) == 1 and all(map(math.isfinite, losses))
    assert all(weight.isfinite().all() for weight in adapter(tmp_path / "out").values())


def test_what_is_always_no_number_is_not_left_out_for_ever(recipe, monkeypatch):
    monkeypatch.setattr(trainer, "MOST_SKIPPED", 2)
    original = Collator.__call__

    def collate(self, examples):
        return original(self, examples) | {"pixel_values": torch.full((2 * len(examples), 3, 336, 336), math.nan)}

    monkeypatch.setattr(Collator, "__call__", collate)
    with pytest.raises(SystemExit, match=r"step 3: the loss .* 2 steps before it were left out for the same"):
        run.main([recipe(nonfinite="skip")])


def test_a_gradient_that_is_no_number_is_found_where_the_loss_is_one(recipe, tmp_path, monkeypatch):
    original = trainer.SFTTrainer.training_step

    def poisoned(self, model, *args):
        loss = original(self, model, *args)
        if self.state.global_step == 2:
            next(parameter for parameter in model.parameters() if parameter.requires_grad).grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", poisoned)
    with pytest.raises(SystemExit, match="step 3: the gradient is not a finite number"):
        run.main([recipe()])
    assert len(json.loads((tmp_path / "out" / "nonfinite.json").read_text())["gradients"]) == 1
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_a_disk_that_is_full_is_said_and_the_old_checkpoint_is_not_touched(recipe, tmp_path, monkeypatch):
    """The system refuses to write on, in the middle of the second checkpoint."""
    original, limits = trainer.SFTTrainer._save_optimizer_and_scheduler, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self, output_dir):
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        original(self, output_dir)

    path = recipe(save_total_limit=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.SFTTrainer, "_save_optimizer_and_scheduler", full)
        try:
            with pytest.raises(SystemExit) as end:
                run.main([path])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = tmp_path / "out"
    assert f"error: {folder / 'checkpoint-4'} could not be written: " in str(end.value)
    assert f"The last whole checkpoint is {folder / 'checkpoint-2'}. Make room" in str(end.value)
    assert [damage(path) for path in checkpoints(folder)] == [None]
    assert not (folder / ".saving").exists()
    run.main([path])  # room was made
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-5"]


def test_what_cannot_fit_is_said_before_training(recipe, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit, match=r"error: `output_dir` .*: a checkpoint takes 0.7 MB, and its disk has 0.0 MB"):
        run.main([recipe()])


def asked(monkeypatch, owner, name, step, number=signal.SIGTERM):
    """Sends a signal to this process when a function is called after so many steps."""
    original = getattr(owner, name)

    def act(self, *args, **kwargs):
        if self.state.global_step == step and INTERRUPTION.asked is None:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, act)


@pytest.mark.parametrize("number", [signal.SIGINT])  # SIGTERM: below
def test_a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on(recipe, tmp_path, monkeypatch, capfd, number):
    run.main([recipe(output_dir=str(tmp_path / "whole"))])
    path = recipe()
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        asked(patch, trainer.SFTTrainer, "training_step", 2, number)
        with pytest.raises(SystemExit) as end:
            run.main([path])
    assert end.value.code == 75
    assert signal.getsignal(number) is handler
    printed = capfd.readouterr().out
    assert f"{number.name}: stopping" in printed
    assert "stopped after step 3 of 5, which is saved: the same command goes on from there." in printed
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3", "checkpoint-2"]
    run.main([path])
    assert f"resume: going on from {tmp_path / 'out' / 'checkpoint-3'}" in capfd.readouterr().out
    assert same(tmp_path / "whole", tmp_path / "out")


def test_an_evaluation_that_a_signal_ends_is_made_up_for(recipe, tmp_path, monkeypatch, capfd):
    """What is the best checkpoint may depend on it."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "generation_rows": 2}
    run.main([recipe(**best, output_dir=str(tmp_path / "whole"))])
    path = recipe(**best)
    with monkeypatch.context() as patch:
        asked(patch, trainer.Trainer, "prediction_step", 2)
        with pytest.raises(SystemExit) as end:
            run.main([path])
    assert end.value.code == 75
    assert (tmp_path / "out" / "checkpoint-2" / "evaluation_due").is_file()
    run.main([path])
    assert history(tmp_path / "out", "eval_loss") == history(tmp_path / "whole", "eval_loss")
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "out")]
    assert len({Path(state["best_model_checkpoint"]).name for state in states}) == 1
    assert same(tmp_path / "whole", tmp_path / "out")


def test_evaluating_does_not_change_what_is_learned(recipe, tmp_path):
    run.main([recipe(max_steps=3, output_dir=str(tmp_path / "without"))])
    run.main([recipe(max_steps=3, eval_strategy="steps", eval_steps=1, generation_rows=2)])
    assert same(tmp_path / "without", tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_workers_as_well_takes_nothing_from_the_step(recipe, tmp_path, monkeypatch, number):
    """torchrun, `timeout` and terminals signal whole groups."""
    original = trainer.SFTTrainer.training_step

    def act(self, *args):
        if self.state.global_step == 2 and INTERRUPTION.asked is None:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            for process in (*(worker.pid for worker in workers), os.getpid()):
                os.kill(process, number)
        return original(self, *args)

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", act)
    with pytest.raises(SystemExit) as end:
        run.main([recipe(dataloader_num_workers=2)])
    assert end.value.code == 75
    assert checkpoints(tmp_path / "out")[0].name == "checkpoint-3"
    for worker in multiprocessing.active_children():
        worker.terminate()  # as Python does when it ends
        worker.join(20)
        assert worker.exitcode == 0


def test_a_run_that_is_cut_after_its_last_step_makes_no_other(recipe, tmp_path, monkeypatch):
    run.main([recipe(max_steps=3, lr_scheduler_type="constant", output_dir=str(tmp_path / "whole"))])

    class PowerCut(Exception):
        pass

    def cut(self):
        raise PowerCut

    path = recipe(max_steps=3, lr_scheduler_type="constant")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "save_state", cut)
        with pytest.raises(PowerCut):
            run.main([path])
    run.main([path])
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 3
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3", "checkpoint-2"]
    assert same(tmp_path / "whole", tmp_path / "out")


def test_a_recipe_may_change_where_nothing_was_learned_yet(recipe, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(trainer.SFTTrainer, "training_step", lambda *args: (_ for _ in ()).throw(KeyError("cut")))
        with pytest.raises(KeyError):
            run.main([recipe(max_steps=1)])
    assert (tmp_path / "out" / "metrics.json").exists()
    run.main([recipe(max_steps=1, lora_r=4)])
    assert "nothing was trained in" in capsys.readouterr().out


def test_a_signal_before_training_ends_the_run_at_once(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        run.main([recipe()])
    assert end.value.code == 75
    assert not checkpoints(tmp_path / "out")


def test_the_newest_checkpoint_is_not_used_if_it_is_damaged(recipe, tmp_path, capsys, monkeypatch):
    run.main([recipe(output_dir=str(tmp_path / "whole"), max_steps=6)])
    path = recipe(max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(run, "finished", lambda folder: None)  # it died while it published
        run.main([path])
    folder = tmp_path / "out"
    with (folder / "checkpoint-4" / "optimizer.pt").open("r+b") as file:
        file.truncate(1000)
    run.main([path, "--max_steps", "6"])
    printed = capsys.readouterr().out
    assert "checkpoint-4 is damaged and not used: optimizer.pt is not as it was written (1,000 bytes)" in printed
    assert "resume: going on from" in printed and "checkpoint-2" in printed
    assert len(adapter(folder)) == len(adapter(tmp_path / "whole"))
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    assert all(damage(path) is None for path in checkpoints(folder))


@pytest.mark.parametrize(
    ("owner", "name"), [(trainer.SFTTrainer, "training_step"), (trainer.SFTTrainer, "_maybe_log_save_evaluate")]
)
def test_too_little_memory_is_answered_with_what_helps_most(recipe, monkeypatch, owner, name):
    def full(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, *args, **kwargs)

    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(SystemExit) as end:
        run.main([recipe(per_device_train_batch_size=4)])
    said = str(end.value)
    assert said.startswith("error: The GPU's memory was not enough: a step of this recipe takes some ")
    assert "per_device_train_batch_size" in said and "What helps most:" in said


def layer_counts(monkeypatch):
    """How often each layer was computed: of decoder and CLIP, in training. They are counted inside the checkpoint."""
    calls = {"decoder": Counter(), "vision": Counter()}
    watch = trainer.Trainer.watch

    def hooked(self, *args):
        watch(self, *args)
        parts = self.model.get_base_model().model if hasattr(self.model, "get_base_model") else self.model.model
        for part, layers, norm in (
            ("decoder", parts.language_model.layers, "input_layernorm"),
            ("vision", parts.vision_tower.encoder.layers, "layer_norm1"),
        ):
            for index, layer in enumerate(layers):
                layer.get_submodule(norm).register_forward_hook(
                    lambda module, *_, part=part, index=index: calls[part].update([index] * module.training)
                )

    monkeypatch.setattr(trainer.Trainer, "watch", hooked)
    return calls


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"adapt": ["language_model", "vision_tower"]},
        {"use_peft": None, "load_in_4bit": None, "adapt": None, "lora_dropout": None, "max_steps": 2},
    ],
    ids=["QLoRA", "LoRA in CLIP too", "full"],
)
def test_so_many_layers_recompute_and_nothing_else_changes(recipe, tmp_path, monkeypatch, keys):
    with monkeypatch.context() as patch:
        seen = layer_counts(patch)
        run.main([recipe(activation_checkpointing=False, output_dir=str(tmp_path / "off"), **keys)])
    plain, steps = load(tmp_path / "off"), seen["decoder"][0]
    assert plain[0] and steps
    layers = len(seen["decoder"])
    for count in (0, 1, layers):
        with monkeypatch.context() as patch:
            seen = layer_counts(patch)
            folder = tmp_path / str(count)
            run.main([recipe(checkpointed_layers=count, output_dir=str(folder), **keys)])
        assert seen["decoder"] == {index: steps * (2 if index < count else 1) for index in range(layers)}
        trained = keys.get("use_peft", True) is None or "vision_tower" in (keys.get("adapt") or [])
        assert set(seen["vision"].values()) == {steps * (2 if trained else 1)}, "CLIP's are as they were"
        weights, losses = load(folder)
        assert losses == plain[1]
        assert weights.keys() == plain[0].keys()
        assert all(torch.equal(weight, plain[0][name]) for name, weight in weights.items())


def load(folder):
    """What was trained, and the loss and the norm of the gradients of each step."""
    files = sorted(folder.glob("*model*.safetensors"))
    weights = {name: weight for file in files for name, weight in load_file(file).items()}
    return weights, (history(folder, "loss"), history(folder, "grad_norm"))


def test_auto_recomputes_as_few_layers_as_fit_and_says_so(recipe, tmp_path, monkeypatch, capsys):
    seen = layer_counts(monkeypatch)
    path = recipe(checkpointed_layers="auto")
    run.main([path])
    layers = len(seen["decoder"])
    assert f"checkpointing: 0 of {layers} decoder layers recompute; estimated 0." in capsys.readouterr().out
    assert len(set(seen["decoder"].values())) == 1
    # On a smaller machine the same recipe goes on with more.
    monkeypatch.setattr(run, "free_memory", lambda: 1_000_000)
    seen["decoder"].clear()
    run.main([path, "--max_steps", "6", "--resume_from_checkpoint", "true"])
    said = capsys.readouterr().out
    assert f"checkpointing: {layers} of {layers} decoder layers recompute" in said
    assert "of 0.0 GB, which leaves less than 10% over" in said
    assert set(seen["decoder"].values()) == {2}, "one step more, each layer twice"


def test_more_layers_than_there_are_is_said(recipe):
    with pytest.raises(SystemExit, match=r"`checkpointed_layers` is 99, expected 0 to 4: the decoder has 4 layers."):
        run.main([recipe(checkpointed_layers=99)])
