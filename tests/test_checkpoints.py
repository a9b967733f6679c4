"""Files, checkpoints and folders: whole or not there, of one run, and gone on from where that is right."""

import errno
import json
import multiprocessing
import os
import re
from pathlib import Path

import pytest
import yaml

from sft_phi3v import checkpoints
from sft_phi3v.checkpoints import check_output_dir, check_room, claimed, damage, finish, resumed_from
from sft_phi3v.recipe import Recipe, load_recipe

MINIMAL = "model_name_or_path: m\ndataset_name: d\noutput_dir: out\nuse_cpu: true\nbf16: false\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text: str = "", *argv: str) -> Recipe:
    Path("a.yaml").write_text(MINIMAL + text)
    return load_recipe(["a.yaml", *argv])


def checkpoint(step, folder="out"):
    """A small whole checkpoint."""
    aside = Path(folder, checkpoints.ASIDE, f"checkpoint-{step}")
    (aside / "inner").mkdir(parents=True)
    (aside / "adapter_model.safetensors").write_bytes(bytes(range(step % 256)) * 100)
    (aside / "inner" / "optimizer.pt").write_text(f"state {step}")
    finish(aside, target := Path(folder, f"checkpoint-{step}"))
    return target


def test_an_output_dir_with_another_run_is_refused():
    load("seed: 1\n").save("out")
    assert check_output_dir(load("seed: 1\n")) == check_output_dir(load("seed: 2\n")) == []  # nothing was learned yet
    Path("out/adapter_model.safetensors").touch()
    said = r"'out' already holds a run of another recipe \(out/recipe.yaml\):\n  seed: 1 → 2\n"
    with pytest.raises(ValueError, match=said):
        check_output_dir(load("seed: 2\n"))
    check_output_dir(load("seed: 2\n", "--output_dir", "fresh"))


def test_what_was_scored_before_training_with_another_recipe_is_forgotten(capsys):
    load("seed: 1\n").save("out")
    scores = Path("out/metrics.json")
    scores.write_text('{"before": {}}')
    assert resumed_from(load("seed: 1\n")) is None and scores.exists()
    assert resumed_from(load("seed: 2\n")) is None and not scores.exists()
    assert "start: nothing was trained in out yet; the recipe has changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "result", ["adapter_model.safetensors", "model-00001-of-00002.safetensors", "environment.json"]
)
def test_a_finished_run_is_not_overwritten_by_the_same_command(result):
    load().save("out")
    Path("out/environment.json").write_text("{}")
    Path("out/metrics.json").write_text('{"baseline": {}, "before": {}}')
    assert check_output_dir(load()) == []  # it died before it had learned anything
    Path("out", result).write_text('{"finished": true}')
    with pytest.raises(ValueError, match=r"already holds a run of this recipe(, which is over)?\. Give a fresh folder"):
        check_output_dir(load())


@pytest.mark.parametrize("argv", [[], ["--resume_from_checkpoint", "auto"], ["--resume_from_checkpoint", "true"]])
def test_the_same_command_goes_on_with_what_is_not_over(argv):
    load().save("out")
    assert argv[1:] == ["true"] or check_output_dir(load("", *argv)) == []
    first, second = checkpoint(5), checkpoint(50)
    assert check_output_dir(load("", *argv)) == [second, first]
    assert check_output_dir(load("max_steps: 90\nlogging_steps: 7\n", *argv)) == [second, first]
    Path("out/adapter_model.safetensors").touch()  # it was scoring what it had trained
    assert check_output_dir(load("", *argv)) == [second, first]
    Path("out/metrics.json").write_text('{"before": {}, "after": {}}')
    assert check_output_dir(load("", *argv)) == [second, first]  # or publishing
    environment()
    checkpoints.finished(Path("out"))
    if argv[1:] == ["true"]:  # such as for more steps
        assert check_output_dir(load("max_steps: 90\n", *argv)) == [second, first]
        return
    with pytest.raises(ValueError, match=r"a run of this recipe, which is over. .*--resume_from_checkpoint true"):
        check_output_dir(load("max_steps: 90\n", *argv))


def test_who_wants_no_resuming_gets_none():
    load().save("out")
    checkpoint(5)
    with pytest.raises(ValueError, match=r"already holds a run of this recipe\. Give a fresh folder"):
        check_output_dir(load("", "--resume_from_checkpoint", "false"))


@pytest.mark.parametrize("trace", ["checkpoint-10", "adapter_model.safetensors", "metrics.json"])
def test_an_output_dir_with_an_unknown_run_is_refused(trace):
    Path("out", trace).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"already holds a run \({trace}\)") as caught:
        check_output_dir(load())
    assert ("--resume_from_checkpoint true" in str(caught.value)) == trace.startswith("checkpoint")


def test_resuming_needs_a_checkpoint():
    Path("out").mkdir()
    check_output_dir(load())
    with pytest.raises(ValueError, match="holds no checkpoint-"):
        check_output_dir(load("", "--resume_from_checkpoint", "true"))
    Path("out/checkpoint-5").mkdir()
    with pytest.raises(ValueError, match=r"'out/checkpoint-5' has no recipe.yaml in it: nothing says what it is of"):
        check_output_dir(load("", "--resume_from_checkpoint", "true"))
    load().save("out")
    for argv in (["--resume_from_checkpoint", "true"], ["--resume_from_checkpoint"]):
        check_output_dir(recipe := load("", *argv))
        assert recipe.resume is True and load().resume is None
    for wrong in ("out/checkpoint-6", "out"):
        with pytest.raises(ValueError, match=rf"'{wrong}', which is no such folder.*checkpoint-5"):
            check_output_dir(load("", "--resume_from_checkpoint", wrong))


def test_a_checkpoint_that_was_moved_away_still_knows_its_recipe():
    load("seed: 1\n").save("elsewhere/checkpoint-5")
    resume = ["--resume_from_checkpoint", "elsewhere/checkpoint-5"]
    assert check_output_dir(load("seed: 1\n", *resume)) == [Path("elsewhere/checkpoint-5")]
    with pytest.raises(ValueError, match=r"(?s)another recipe began that run .*seed: 1 → 2"):
        check_output_dir(load("seed: 2\n", *resume))


def test_a_checkpoint_that_was_named_is_not_moved():
    load().save("out")
    bad = checkpoint(5)
    (bad / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="none of the checkpoints out/checkpoint-5 is whole"):
        resumed_from(load("", "--resume_from_checkpoint", "out/checkpoint-5"))
    assert bad.is_dir()


@pytest.mark.parametrize("given", ["true", "out/checkpoint-5"])
def test_a_run_is_resumed_with_its_own_recipe(given):
    load("seed: 1\nmax_steps: 5\nsave_steps: 5\n").save("out")
    Path("out/checkpoint-5").mkdir()
    resume = ["--resume_from_checkpoint", given]
    check_output_dir(load("seed: 1\nmax_steps: 9\nsave_total_limit: 2\nenv: {WANDB_PROJECT: b}\n", *resume))
    said = r"another recipe began that run \(.*recipe.yaml\):\n  held_out: 0.1 → 0.2\n  seed: 1 → 2\nPut these back"
    with pytest.raises(ValueError, match=said):
        check_output_dir(load("seed: 2\nheld_out: 0.2\nmax_steps: 9\n", *resume))


def test_another_recipe_does_not_go_on_and_is_told_where_it_differs():
    load("seed: 1\n").save("out")
    checkpoint(5)
    with pytest.raises(ValueError, match=r"another recipe \(out/recipe.yaml\):\n  seed: 1 → 2\nGive a fresh") as caught:
        check_output_dir(load("seed: 2\nmax_steps: 9\n"))
    assert "--resume_from_checkpoint" not in str(caught.value)


def test_a_resumed_run_may_move_but_not_into_another_run():
    load().save("out")
    Path("out/checkpoint-5").mkdir()
    resume = ["--resume_from_checkpoint", "out/checkpoint-5", "--output_dir", "moved"]
    check_output_dir(load("", *resume))
    Path("moved/checkpoint-1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"'moved' already holds a run \(checkpoint-1\)"):
        check_output_dir(load("", *resume))


def test_an_output_dir_that_is_a_file_is_refused():
    Path("out").write_text("")
    with pytest.raises(ValueError, match="which is a file"):
        check_output_dir(load())


def test_a_checkpoint_is_listed_with_all_its_files():
    found = checkpoint(7)
    assert json.loads((found / "whole.json").read_text()).keys() == {"adapter_model.safetensors", "inner/optimizer.pt"}
    assert damage(found) is None
    assert not list(Path("out", checkpoints.ASIDE).iterdir())


def shorter(path):
    path.write_bytes(path.read_bytes()[:-1])


def other(path):
    path.write_bytes(b"x" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("harm", "file", "said"),
    [
        (shorter, "adapter_model.safetensors", r"adapter_model.safetensors is not as it was written \(4,999 bytes\)"),
        (other, "inner/optimizer.pt", "inner/optimizer.pt is not as it was written"),
        (Path.unlink, "adapter_model.safetensors", "adapter_model.safetensors is missing"),
        (Path.unlink, "whole.json", "no whole.json, which is written last"),
        (shorter, "whole.json", "no whole.json|is not"),
    ],
)
def test_a_damaged_checkpoint_is_seen_and_the_one_before_it_used(harm, file, said, capsys):
    load().save("out")
    good, bad = checkpoint(40), checkpoint(50)
    if file == "whole.json" and harm is shorter:
        (bad / file).write_text((bad / file).read_text()[:20])
    else:
        harm(bad / file)
    assert resumed_from(load()) == good
    assert not bad.exists() and Path("out/damaged-checkpoint-50").is_dir()  # a rotation must not count it
    assert re.search(f"resume: out/checkpoint-50 is damaged and not used: .*{said}", capsys.readouterr().out)
    (good / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="none of the checkpoints out/checkpoint-40 is whole"):
        resumed_from(load())


def test_a_checkpoint_may_be_written_again():
    first = checkpoint(40)
    (first / "inner" / "optimizer.pt").write_text("of another time line")
    assert damage(checkpoint(40)) is None
    assert sorted(path.name for path in Path("out").iterdir()) == [checkpoints.ASIDE, "checkpoint-40"]


def test_the_newest_is_the_one_with_the_highest_number():
    load().save("out")
    for step in (90, 100, 9):
        checkpoint(step)
    assert resumed_from(load()) == Path("out/checkpoint-100")


def environment(processes=1):
    Path("out/environment.json").write_text(json.dumps({"processes": processes}))


def test_a_step_must_stay_of_as_many_rows():
    load("per_device_train_batch_size: 1\ngradient_accumulation_steps: 8\n").save("out")
    checkpoint(5)
    environment(processes=2)
    spread = "per_device_train_batch_size: 4\ngradient_accumulation_steps: 4\n"
    assert resumed_from(load(spread)) == Path("out/checkpoint-5")
    with pytest.raises(ValueError, match=r"a step of that run is of 16 rows, of this one 8 \(1 processes ×"):
        resumed_from(load())
    with pytest.raises(ValueError, match=r"rows are shared out by per_device_train_batch_size, the number of proc"):
        saved = yaml.safe_load(Path("out/recipe.yaml").read_text()) | {"dataset_streaming": True}
        Path("out/recipe.yaml").write_text(yaml.safe_dump(saved))
        resumed_from(load(f"{spread}dataset_streaming: true\n"))


def test_planned_batches_must_stay_as_they_were():
    planned = "max_tokens_per_batch: 9000\ngradient_accumulation_steps: 2\n"
    load(planned).save("out")
    checkpoint(5)
    environment()
    assert resumed_from(load(planned)) == Path("out/checkpoint-5")
    with pytest.raises(ValueError, match="max_tokens_per_batch: 9000 → 8000"):
        resumed_from(load(planned.replace("9000", "8000")))
    with pytest.raises(ValueError, match="batches are planned for gradient_accumulation_steps, which changed"):
        resumed_from(load(planned.replace("steps: 2", "steps: 4")))
    environment(processes=2)
    with pytest.raises(ValueError, match="batches are planned for the number of processes, which changed"):
        resumed_from(load(planned))
    with pytest.raises(ValueError, match="max_tokens_per_batch: 9000 → null"):
        resumed_from(load("gradient_accumulation_steps: 2\n"))


def test_two_runs_in_one_folder_are_refused():
    def hold(ready, leave):
        with claimed(Path("out")):
            ready.set()
            leave.wait(30)

    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=hold, args=(ready, leave))
    process.start()
    assert ready.wait(30)
    try:
        said = rf"'out' is in use: process {process.pid} on .* is at work"
        with pytest.raises(ValueError, match=said), claimed(Path("out")):
            pass
    finally:
        process.kill()
        process.join(30)
    with claimed(Path("out")):  # the kernel gives it free, however a process ends
        pass


def test_what_does_not_fit_on_the_disk_is_not_begun():
    check_room(Path("not/yet/there"), 1000, "a checkpoint")
    with pytest.raises(ValueError, match=r"a checkpoint takes 1,000,000,000,000.0 MB, and its disk has"):
        check_room(Path("not/yet/there"), 10**18, "a checkpoint")


def test_a_disk_that_fills_up_while_a_checkpoint_is_finished_costs_nothing(monkeypatch):
    old = checkpoint(40)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint(50)
    assert damage(old) is None and not Path("out/checkpoint-50").exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"which cannot be written: Not a directory"),
        claimed(tmp_path / "file" / "out"),
    ):
        pass
