"""What a machine and a launcher cannot do for a recipe is refused, with what to write instead."""

import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from sft_phi3v import machine, preview, run
from sft_phi3v.machine import check_kernels, check_machine, check_restarts, free_memory
from sft_phi3v.recipe import Recipe, load_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
MINIMAL = "model_name_or_path: m\ndataset_name: d\noutput_dir: out\nuse_cpu: true\nbf16: false\n"
QLORA = MINIMAL.replace("use_cpu: true\nbf16: false\n", "load_in_4bit: true\nuse_peft: true\ndtype: bfloat16\n")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text: str = "", *argv: str, base: str = MINIMAL) -> Recipe:
    Path("a.yaml").write_text(base + text)
    return load_recipe(["a.yaml", *argv])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_a_gpu_recipe_loads_without_a_gpu_and_does_not_run():
    with pytest.raises(ValueError, match=r"is for a GPU \(load_in_4bit: true\) and this machine shows none") as caught:
        check_machine(load(base=QLORA))
    assert "--use_cpu true --bf16 false --dtype float32" in str(caught.value)
    check_machine(load("", "--use_cpu", "true", "--bf16", "false", "--dtype", "float32", base=QLORA))


def test_kernels_are_refused_where_there_are_none(monkeypatch):
    check_kernels(load())
    with pytest.raises(ValueError, match="`use_kernels: true`: there are kernels for CUDA devices only, not for cpu"):
        check_kernels(load("use_kernels: true"))
    recipe = load("use_kernels: true")
    recipe.training.use_cpu = False
    monkeypatch.setattr(machine, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(machine, "is_kernels_available", lambda: False)
    with pytest.raises(ValueError, match=r"`use_kernels: true` needs the package kernels.*pip install 'kernels>=0"):
        check_kernels(recipe)
    monkeypatch.setattr(machine, "is_kernels_available", lambda: True)
    check_kernels(recipe)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="`use_kernels: true` with FSDP"):
        check_kernels(recipe)


def test_preview_says_that_there_are_none(write_recipe, capsys):
    with pytest.raises(SystemExit):
        preview.main([write_recipe(use_kernels=True)])
    assert "✗ `use_kernels: true`: there are kernels for CUDA devices only, not for cpu." in capsys.readouterr().out


def test_what_memory_is_free(monkeypatch):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=9_000))
    state = SimpleNamespace(device=torch.device("cpu"), num_processes=2)
    monkeypatch.setattr(machine, "PartialState", lambda: state)
    monkeypatch.setattr(machine, "gather_object", lambda found: [*found, 5_000])
    assert free_memory() == 4_500, "processes on one machine share its memory"
    state.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6_000, 8_000))
    assert free_memory() == 5_000, "the other process's GPU has less"


def test_several_gpus_want_a_launcher(monkeypatch):
    recipe = load()
    recipe.settings.pop("use_cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    recipe.training._n_gpu = 4
    with pytest.raises(
        ValueError, match=r"4 GPUs are visible and no launcher.*accelerate launch sft_phi3v/run.py a.yaml"
    ):
        check_machine(recipe)
    recipe.training._n_gpu = 1
    check_machine(recipe)


def test_a_gpu_without_bfloat16_is_told_so(monkeypatch):
    recipe = load(base=QLORA)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(machine, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match=r"has no bfloat16.*--bf16 false --fp16 true"):
        check_machine(recipe)


@pytest.fixture
def launched(monkeypatch):
    """As `accelerate launch` would say it, in the environment."""

    def say(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return say


def test_a_launcher_on_the_cpu_wants_a_recipe_on_the_cpu(launched):
    right, wrong = load(), load(base=QLORA)
    launched(ACCELERATE_USE_CPU="True")
    check_machine(right)
    with pytest.raises(ValueError, match=r"was told to use the CPU and a.yaml was not. Add: --use_cpu true"):
        check_machine(wrong)


def test_processes_that_do_not_know_each_other_are_refused(launched):
    recipe = load()
    launched(WORLD_SIZE="2")
    with pytest.raises(ValueError, match=r"2 processes were launched and each sees 1: every one of them would train"):
        check_machine(recipe)


def test_processes_that_would_look_for_dead_ones_are_refused_before_they_meet(launched):
    check_restarts()
    launched(WORLD_SIZE="2", TORCHELASTIC_MAX_RESTARTS="0", TORCHELASTIC_USE_AGENT_STORE="True")
    check_restarts()
    launched(TORCHELASTIC_MAX_RESTARTS="3")
    with pytest.raises(SystemExit, match=r"error: `--max_restarts 3`: .* TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        run.main(["a.yaml"])  # which is not even there
    launched(LOCAL_RANK="1")  # says it once
    with pytest.raises(SystemExit, match=r"^1$"):
        run.main(["a.yaml"])
    launched(TORCHELASTIC_USE_AGENT_STORE="False")
    check_restarts()


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Phi3DecoderLayer",
}


FULL = "model_name_or_path: m\ndataset_name: d\noutput_dir: out\n"
LORA = f"{FULL}dtype: bfloat16\nuse_peft: true\n"


@pytest.mark.parametrize(
    ("base", "variables", "message"),
    [
        (f"{FULL}use_cpu: true\nbf16: false\n", {}, "`use_cpu: true` would run as DDP"),
        (FULL, {"FSDP_VERSION": "1"}, "Write `fsdp_version: 2`"),
        (LORA, {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "would lack the adapter"),
        (FULL, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
        (FULL, {"FSDP_TRANSFORMER_CLS_TO_WRAP": "CLIPEncoderLayer"}, "would hang"),
        (f"{LORA}load_in_8bit: true\n", {}, "8-bit weights cannot be sharded"),
        (f"{LORA}load_in_4bit: true\n", {}, "Write `bnb_4bit_quant_storage: bfloat16`, which is `dtype`"),
    ],
)
def test_fsdp_is_refused_where_it_would_do_something_else(launched, base, variables, message):
    recipe = load(base=base)
    launched(**(FSDP | variables))
    with pytest.raises(ValueError, match=f"^FSDP: .*{message}"):
        check_machine(recipe)


@pytest.mark.parametrize(
    "base", [FULL, LORA, f"{LORA}load_in_4bit: true\nbnb_4bit_quant_storage: bfloat16\n"], ids=["full", "LoRA", "QLoRA"]
)
def test_fsdp_takes_what_our_config_says(launched, base):
    recipe = load(base=base)
    config = yaml.safe_load((REPOSITORY / "accelerate_configs" / "fsdp2.yaml").read_text())["fsdp_config"]
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    launched(ACCELERATE_USE_FSDP="true", **{names.get(key, key.upper()): str(value) for key, value in config.items()})
    assert not machine._fsdp_problems(recipe)


@pytest.mark.parametrize(("preempted", "status"), [(True, 143), (False, 3)])
def test_the_slurm_job_passes_the_signal_on_and_goes_back_into_the_queue(tmp_path, preempted, status):
    """SLURM's commands are stand-ins that write down what they were called with."""
    commands = {
        "scontrol": 'echo "scontrol $*" >> calls; echo node1',
        "srun": 'echo "srun $TORCH_DISABLE_SHARE_RDZV_TCP_STORE $*" >> calls; '
        + 'trap "sleep 0.3; exit 143" TERM; echo $$ > pid; '
        + ("while true; do sleep 0.05; done" if preempted else "exit 3"),
    }
    for name, body in commands.items():
        Path(name).write_text(f"#!/bin/bash\n{body}\n")
        Path(name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    environment |= {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]"}
    script = REPOSITORY / "accelerate_configs" / "slurm.sbatch"
    job = subprocess.Popen(["bash", str(script), "recipe.yaml", "--max_steps", "5"], env=environment)
    while preempted and not Path("pid").exists():
        time.sleep(0.02)
    if preempted:
        job.terminate()
    assert job.wait(20) == status
    called = Path("calls").read_text()
    assert "srun 1 " in called
    assert "--num_machines 2 --num_processes 16 --main_process_ip node1 --rdzv_backend c10d" in called
    assert "sft_phi3v/run.py recipe.yaml --max_steps 5" in called
    assert ("scontrol requeue 17" in called) == preempted
