"""Real processes: one, several, under FSDP2, on two "machines", killed, stopped and started again. Always one result.

make test-distributed        # prints what each configuration came to, and each kill
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from sft_phi3v import merge
from sft_phi3v.checkpoints import checkpoints, damage

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHED = str(REPOSITORY / "tests" / "launched.py")
RUN = str(REPOSITORY / "sft_phi3v" / "run.py")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS, HELD_OUT = 20, 3
KEYS = {
    "model_name_or_path": str(REPOSITORY / "recipes" / "tiny_base"),
    "dtype": "float32",
    "load_in_4bit": True,
    "use_bnb_nested_quant": True,
    "bnb_4bit_quant_storage": "float32",
    "use_peft": True,
    "lora_r": 8,
    "lora_dropout": 0.0,
    "bf16": False,
    "use_cpu": True,
    "held_out": HELD_OUT,
    "max_steps": STEPS,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 10,
    "eval_rows": 3,
    "generation_rows": 2,
    "max_new_tokens": 6,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 22 rows: a third has no picture, some have two, and answers are of 1 to 11 words."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "pictures").mkdir()
    rows, draw = [], random.Random(0)
    for number in range(22):
        colour = draw.choice(["red", "green", "blue"])
        Image.new("RGB", (60 + 9 * number, 80), colour).save(folder / "pictures" / f"{number}.png")
        answer = " ".join([colour] * (1 + 7 * number % 11))
        turns = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": answer}]
        rows.append({"images": [f"pictures/{number}.png"] * (number % 3), "messages": turns})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def started():
    """Starts commands, and kills what is left of them, and nothing else, at the end."""
    groups = []

    def start(command, log, **environment):
        with log.open("a") as file:
            process = subprocess.Popen(
                command,
                cwd=log.parent,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"} | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        groups.append(process.pid)
        return process

    yield start
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


def write(place, name, changes):
    """A recipe that trains into a folder of that name."""
    path = place / f"{name}.yaml"
    keys = KEYS | {"dataset_name": str(place / "rows.jsonl"), "output_dir": str(place / name)} | changes
    path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def launch(place, started):
    """Starts a run: `output_dir`, on which Accelerate config (None: without), and changed keys of the recipe."""

    def start(name, *flags, config=None, script=LAUNCHED, environment=None, **changes):
        path = write(place, name, changes)
        command = [sys.executable, script, str(path)]
        if config is not None:
            ports = [] if "--main_process_port" in flags else ["--main_process_port", "0"]
            config = REPOSITORY / "accelerate_configs" / f"{config}.yaml"
            accelerate = str(Path(sys.executable).with_name("accelerate"))
            command = [accelerate, "launch", "--config_file", str(config), *ports, *flags, script, str(path)]
        return started(command, place / f"{name}.log", **(environment or {}))

    return start


def finished(process, place, name, code=0):
    status = process.wait(300)
    assert status == code, (place / f"{name}.log").read_text()[-6000:]


def weights(folder):
    [path] = [*folder.glob("adapter_model.safetensors"), *folder.glob("model.safetensors")]
    return load_file(path)


def difference(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def losses(folder, key="loss"):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def rows_of(folder):
    """The rows that each step learned from, of all processes together; of the last time that it was made."""
    steps = {}
    for path in folder.glob("rows-*.jsonl"):
        own = dict(map(json.loads, path.read_text().splitlines()))
        for step, rows in own.items():
            steps.setdefault(step, []).extend(rows)
    return [sorted(steps[step]) for step in sorted(steps)]


FULL = {"load_in_4bit": None, "use_bnb_nested_quant": None, "bnb_4bit_quant_storage": None, "use_peft": None}
# Neither clipped nor divided by AdamW: a gradient of another size shows.
FULL |= {"lora_r": None, "lora_dropout": None, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0}
VISION = {"adapt": ["language_model", "projector", "vision_tower"]}
GLOO = {"use_cpu": None, "ddp_backend": "gloo", "dataloader_pin_memory": False}  # FSDP2, as launched.py has it
TWO = ["--num_processes", "2"]
TABLE = "one recipe, however it is run: 20 steps of 4 rows, compared with one process"


@pytest.fixture(scope="module")
def single(place, launch):
    """Folders of one process's runs, which the others must equal."""
    made = {}

    def of(kind):
        if kind not in made:
            changes = {"QLoRA": {}, "with vision": VISION, "full": FULL}[kind]
            name, start = f"single {kind}".replace(" ", "-"), time.monotonic()
            finished(launch(name, **changes, per_device_train_batch_size=2), place, name)
            made[kind] = place / name, time.monotonic() - start
        return made[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "config", "changes"),
    [
        ("QLoRA", "ddp", {}),
        ("QLoRA", "fsdp2", GLOO),
        ("with vision", "ddp", VISION),
        ("with vision", "fsdp2", VISION | GLOO),
        ("full", "ddp", FULL),
        ("full", "fsdp2", FULL | GLOO),
    ],
)
def test_several_processes_learn_what_one_learns(place, launch, single, table_row, kind, config, changes):
    whole, seconds = single(kind)
    name, start = f"{config}-{kind.replace(' ', '-')}", time.monotonic()
    finished(launch(name, *TWO, config=config, **changes), place, name)
    folder = place / name
    worst = difference(weights(whole), weights(folder))
    took = {"single": seconds, config: time.monotonic() - start}
    for how, path, processes, apart in (("single", whole, 1, "–"), (config, folder, 2, f"{worst:.1e}")):
        if how != "single" or config == "ddp":
            found = [f"{losses(path, key)[-1]:.6f}" for key in ("loss", "eval_loss")]
            table_row(TABLE, kind, how, processes, *found, apart, f"{took[how]:.0f} s")
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-4)
    assert losses(folder, "eval_loss") == pytest.approx(losses(whole, "eval_loss"), rel=1e-4)
    assert worst < (2e-5 if kind == "full" else 1e-4)  # AdamW makes much of little
    # Each step is of the same rows; in an epoch each comes once, though 19 rows do not divide by 4, nor by 2.
    steps = rows_of(folder)
    assert steps == rows_of(whole)
    epochs = [Counter(row for step in steps[first : first + 5] for row in step) for first in range(0, STEPS, 5)]
    assert all(set(epoch.values()) == {1} and len(epoch) == 22 - HELD_OUT for epoch in epochs)
    before, after = (json.loads((path / "metrics.json").read_text()) for path in (whole, folder))
    assert before["before"] == after["before"]
    assert before["after"]["rows"] == after["after"]["rows"] == HELD_OUT


@pytest.mark.parametrize(("config", "changes"), [("ddp", {}), ("fsdp2", GLOO)])
def test_in_several_processes_too_only_some_layers_recompute(place, launch, single, config, changes):
    name = f"{config}-some-layers"
    finished(launch(name, *TWO, config=config, checkpointed_layers=1, **changes), place, name)
    for rank in range(2):
        assert json.loads((place / name / f"recomputing-{rank}.json").read_text()) == [True, False, False, False]
    whole, _ = single("QLoRA")
    assert json.loads((whole / "recomputing-0.json").read_text()) == [True] * 4
    assert losses(place / name) == pytest.approx(losses(whole), rel=1e-4)
    assert difference(weights(whole), weights(place / name)) < 1e-4


def test_several_processes_make_image_features_once_and_learn_from_them(place, launch, single):
    whole, _ = single("QLoRA")
    for name, config, kind in (("features", "ddp", {}), ("found", "fsdp2", GLOO)):  # the second finds them made
        changes = kind | {"feature_cache": str(place / "cache"), "environment": {"SHARD_BYTES": "1"}}
        finished(launch(name, *TWO, config=config, **changes), place, name)
        assert losses(place / name) == pytest.approx(losses(whole), rel=1e-4)
        assert losses(place / name, "eval_loss") == pytest.approx(losses(whole, "eval_loss"), rel=1e-4)
        assert difference(weights(whole), weights(place / name)) < 1e-4
        [said] = [line for line in (place / f"{name}.log").read_text().splitlines() if "feature_cache: 14 " in line]
        assert f"; {14 if name == 'features' else 0} made in " in said
    assert len([*(place / "cache").rglob("*.safetensors")]) == 14


def test_what_several_processes_trained_is_merged_and_proved(place, launch, single, table_row):
    name = "ddp-QLoRA"
    if not (place / name / "metrics.json").exists():
        finished(launch(name, *TWO, config="ddp"), place, name)
    merge.main([str(place / f"{name}.yaml")])
    assert (place / name / "merged" / "model.safetensors").is_file()


def test_two_machines_find_each_other_and_a_lost_process_costs_steps_and_not_the_run(place, launch, single, table_row):
    whole, _ = single("QLoRA")
    name, start, port = "nodes", time.monotonic(), str(random.randrange(20_000, 30_000))
    flags = [*TWO, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    flags += ["--rdzv_backend", "c10d", "--max_restarts", "2"]
    environment = {"KILL": "training_step:26", "KILL_RANK": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    how = {"config": "multi_node", "environment": environment}
    machines = [launch(name, *flags, "--machine_rank", "0", **how)]
    while not listening(int(port)):  # both are at one address here, and Accelerate wants it free at first
        assert machines[0].poll() is None, (place / f"{name}.log").read_text()
        time.sleep(0.1)
    machines.append(launch(name, *flags, "--machine_rank", "1", **how))
    for machine in machines:
        finished(machine, place, name)
    worst = difference(weights(whole), weights(place / name))
    found = [f"{losses(place / name, key)[-1]:.6f}" for key in ("loss", "eval_loss")]
    took = f"{time.monotonic() - start:.0f} s"
    table_row(TABLE, "QLoRA", "multi_node, a process killed", "1 + 1", *found, f"{worst:.1e}", took)
    assert worst < 1e-4
    log = (place / f"{name}.log").read_text()
    assert log.count("resume: going on from") == 1
    assert "connectFullMesh failed" not in log  # nobody looked for a process that was dead


def listening(port):
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


KILLS = "kill -9, and the same command again: adapter compared with that of a run that was left alone"
CUT = {"per_device_train_batch_size": 2, "lora_dropout": 0.1, "max_steps": 6, "save_steps": 2, "eval_steps": 3}
CUT |= {"save_total_limit": 1, "lr_scheduler_type": "constant"}  # a step too many would show
MOMENTS = [
    "training_step:4",
    "training_step:9",
    "_save_optimizer_and_scheduler:2",
    "file_hashes:2",
    "rotate_checkpoints:2",
    "prediction_step:2",
    "_generate_batch:2",
    "save_state:1",
]


@pytest.fixture(scope="module")
def left_alone(place, launch):
    """Folders of runs that nobody disturbed."""
    made = {}

    def of(kind, **how):
        if kind not in made:
            finished(launch(f"whole-{kind}", **how), place, f"whole-{kind}")
            made[kind] = weights(place / f"whole-{kind}")
        return made[kind]

    return of


def stream(place):
    """The rows as Parquet files of a few rows each, which `dataset_streaming` reads as it goes."""
    from datasets import Dataset, Image, List

    folder = place / "stream"
    if not folder.exists():
        rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
        for row in rows:
            row["images"] = [{"bytes": (place / image).read_bytes(), "path": None} for image in row["images"]]
        for number, start in enumerate(range(0, 18, 6)):
            part = Dataset.from_list(rows[start : start + 6]).cast_column("images", List(Image()))
            part.to_parquet(str(folder / "data" / f"train-{number}.parquet"))
        Dataset.from_list(rows[18:]).cast_column("images", List(Image())).to_parquet(
            str(folder / "data" / "test-0.parquet")
        )
    return {"dataset_name": str(folder), "dataset_streaming": True, "held_out": None, "dataloader_num_workers": 1}


def cut_and_gone_on(place, launch, name, moment, **how):
    """Runs until the moment, and then the same command again; the log of both."""
    process = launch(name, **how, environment={"KILL": moment})
    assert process.wait(200) != 0
    assert not (place / name / "adapter_config.json").exists() or moment.startswith("save_state")
    assert all(damage(path) is None for path in checkpoints(place / name))  # what is there is whole
    finished(launch(name, **how), place, name)
    return (place / f"{name}.log").read_text()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_goes_on_to_the_same_bits(place, launch, left_alone, table_row, moment):
    name = f"cut-{moment.replace(':', '-')}"
    log = cut_and_gone_on(place, launch, name, moment, **CUT)
    worst = difference(left_alone("single", **CUT), weights(place / name))
    resumed = [line.rsplit("/", 1)[-1] for line in log.splitlines() if line.startswith("resume: going on from")]
    table_row(KILLS, "one process", moment, ", ".join(resumed) or "from the start", worst)
    assert worst == 0
    assert [path.name for path in checkpoints(place / name)] == ["checkpoint-6"]
    assert not (place / name / ".saving").exists() or not [*(place / name / ".saving").iterdir()]


@pytest.mark.parametrize("moment", ["training_step:9", "_save_optimizer_and_scheduler:2"])
@pytest.mark.parametrize("kind", ["ddp", "stream"])
def test_several_processes_and_streams_do_so_too(place, launch, left_alone, table_row, kind, moment):
    how = CUT | ({"config": "ddp", "flags": TWO, "per_device_train_batch_size": 1} if kind == "ddp" else stream(place))
    flags = how.pop("flags", [])
    start = lambda name, **keys: launch(name, *flags, **keys)  # noqa: E731
    name = f"{kind}-{moment.replace(':', '-')}"
    if kind == "ddp":
        finished(start("whole-ddp", **how), place, "whole-ddp") if not (place / "whole-ddp").exists() else None
        whole = weights(place / "whole-ddp")
    else:
        whole = left_alone("stream", **how)
    cut_and_gone_on(place, start, name, moment, **how)
    worst = difference(whole, weights(place / name))
    table_row(KILLS, {"ddp": "two processes", "stream": "streaming"}[kind], moment, "checkpoint-2", worst)
    assert worst == 0


def test_planned_batches_are_of_all_rows_once_and_a_killed_run_goes_on_with_them(place, launch, table_row):
    how = CUT | {"config": "ddp", "per_device_train_batch_size": None, "max_tokens_per_batch": 1000}
    how |= {"gradient_accumulation_steps": 1, "max_steps": 8, "eval_steps": 8}
    finished(launch("whole-planned", *TWO, **how), place, "whole-planned")
    planned = re.search(r"batches: +(\d+) planned of at most 1,000", (place / "whole-planned.log").read_text())
    batches = int(planned[1])
    steps = rows_of(place / "whole-planned")
    epoch = batches // 2
    assert batches % 2 == 0 and epoch < 6 and len(steps) == 8  # the second epoch is under way at the kill
    first = Counter(row for step in steps[:epoch] for row in step)
    assert set(first.values()) == {1} and len(first) == 22 - HELD_OUT
    assert steps[epoch:] != steps[: 8 - epoch]
    moment = "training_step:8"  # after the checkpoint of step 6
    process = launch("cut-planned", *TWO, **how, environment={"KILL": moment})
    assert process.wait(200) != 0
    finished(launch("cut-planned", *TWO, **how), place, "cut-planned")
    assert "resume: going on from" in (place / "cut-planned.log").read_text()
    worst = difference(weights(place / "whole-planned"), weights(place / "cut-planned"))
    table_row(KILLS, "two processes, planned batches", moment, "checkpoint-6", worst)
    assert rows_of(place / "cut-planned") == steps
    assert worst == 0


@pytest.mark.parametrize("attempt", range(3))
def test_kills_at_random_moments(place, launch, left_alone, table_row, attempt):
    whole = left_alone("single", **CUT)
    name, draw, kills = f"random-{attempt}", random.Random(time.time()), []
    while True:
        process = launch(name, **CUT)
        try:
            assert process.wait(draw.uniform(3, 14)) == 0, (place / f"{name}.log").read_text()[-3000:]
            break
        except subprocess.TimeoutExpired:
            kills.append(len(kills))
            process.kill()
            process.wait(30)
            assert all(damage(path) is None for path in checkpoints(place / name))
        environment = place / name / "environment.json"
        if environment.exists() and '"finished": true' in environment.read_text():
            break  # it was killed after its last word: there is nothing to go on with
        if len(kills) == 4:
            finished(launch(name, **CUT), place, name)
            break
    worst = difference(whole, weights(place / name))
    table_row(KILLS, "one process", f"{len(kills)} times after 3 to 14 seconds", "", worst)
    assert worst == 0


STOPS = "SIGTERM and Ctrl-C: until the processes had ended, and the same command again"


@pytest.mark.parametrize(
    ("how", "number", "code"),
    [
        ("python", signal.SIGTERM, 75),
        ("python", signal.SIGINT, 75),
        ("single", signal.SIGTERM, -15),
        ("ddp", signal.SIGTERM, 1),  # torchrun signals the whole group of each process, and the workers with it
    ],
)
def test_a_run_that_is_asked_to_stop_saves_its_step(place, launch, table_row, left_alone, how, number, code):
    several = how == "ddp"
    keys = CUT | {"max_steps": 40, "save_steps": 100, "eval_strategy": "no", "eval_steps": None, "generation_rows": 0}
    keys |= {"per_device_train_batch_size": 1 if several else 2, "output_dir": None, "dataloader_num_workers": 1}
    name = f"stopped-{how}-{number.name}"
    keys["output_dir"] = str(place / name)
    start = dict(config=None if how == "python" else how, **keys)
    flags = TWO if several else []
    process = launch(name, *flags, **start)
    rows = place / name / "rows-0.jsonl"
    while not (rows.exists() and len(rows.read_text().splitlines()) >= 3):
        assert process.poll() is None, (place / f"{name}.log").read_text()[-3000:]
        time.sleep(0.05)
    process.send_signal(number)  # to the launcher alone
    asked = time.monotonic()
    assert process.wait(60) == code
    while alive(place / name):
        assert time.monotonic() < asked + 60
        time.sleep(0.1)
    took = time.monotonic() - asked
    [saved] = checkpoints(place / name)
    steps = len(rows.read_text().splitlines())
    assert saved.name == f"checkpoint-{steps}" and steps < 40
    assert "stopped after step" in (place / f"{name}.log").read_text()
    finished(launch(name, *flags, **start), place, name)
    whole = f"whole-stop-{'ddp' if several else 'single'}"
    if not (place / whole / "metrics.json").exists():
        finished(launch(whole, *flags, **{**start, "output_dir": str(place / whole)}), place, whole)
    worst = difference(weights(place / whole), weights(place / name))
    table_row(STOPS, how, number.name, code, f"{took:.1f} s", worst)
    assert worst == 0


def alive(folder):
    """Whether a process still works for the run."""
    mine = [path for path in Path("/proc").glob("[0-9]*/cmdline") if f"{folder}.yaml".encode() in quietly(path)]
    return bool(mine)


def quietly(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        ({"distributed_type": "MULTI_GPU", "use_cpu": True}, {"use_cpu": None}, "Add: --use_cpu true|2 processes were"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, {}, "`use_cpu: true` would run as DDP"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, GLOO, "Write `fsdp_version: 2`"),
    ],
)
def test_what_would_run_as_something_else_is_refused(place, started, config, changes, said):
    name = f"refused-{config['distributed_type']}-{len(changes)}"
    base = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, "mixed_precision": "no"}
    (place / "wrong.yaml").write_text(yaml.safe_dump(base | config | {"main_process_port": 0}))
    accelerate, log = str(Path(sys.executable).with_name("accelerate")), place / f"{name}.log"
    command = [
        accelerate,
        "launch",
        "--config_file",
        str(place / "wrong.yaml"),
        LAUNCHED if "ddp_backend" in changes else RUN,
    ]
    assert started([*command, str(write(place, name, changes))], log).wait(120) != 0
    assert re.search(rf"error: .*({said})", log.read_text()), log.read_text()[-3000:]
    assert not [*(place / name).glob("checkpoint-*")]
