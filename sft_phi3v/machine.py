"""What this machine, and the launcher that started the process, can do for a recipe.

Most wrong combinations run, and do something else: two "processes" that each train alone and write the same folder,
FSDP that is DDP, adapters that are not in the checkpoint. Each is refused with what to write instead.
"""

import os

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from transformers.utils import is_torch_bf16_gpu_available
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available

from sft_phi3v.recipe import Recipe, wants_bf16

LAYER = "Phi3DecoderLayer"


def check_machine(recipe: Recipe) -> None:
    """
    Refuse a recipe that this machine cannot run. To be called before the model is loaded.

    Args:
        recipe ([`Recipe`]): The recipe.

    Raises:
        ValueError: No GPU for a recipe that wants one; a GPU without bfloat16; several GPUs and no launcher; processes
            that would not work together, or a launcher's setting under which training or saving goes wrong.
    """
    _check_launcher(recipe)
    settings, launch = recipe.settings, f"accelerate launch sft_phi3v/run.py {recipe.path}"
    if settings.get("use_cpu"):
        return
    if not torch.accelerator.is_available():
        wants = [f"{key}: true" for key in ("bf16", "fp16", "load_in_4bit", "load_in_8bit") if settings.get(key)]
        raise ValueError(
            f"{recipe.path} is for a GPU ({', '.join(wants) or 'no use_cpu'}) and this machine shows none. If it has "
            "one, look at `nvidia-smi`, CUDA_VISIBLE_DEVICES and whether torch is a CUDA build. To run it on the CPU, "
            "which suits tiny models only, add: --use_cpu true --bf16 false --dtype float32"
        )
    if wants_bf16(settings) and not is_torch_bf16_gpu_available():
        raise ValueError(
            f"{recipe.path} says `bf16: true` and this GPU has no bfloat16 (NVIDIA has it from Ampere on). Add: "
            "--bf16 false --fp16 true --dtype float16"
        )
    if recipe.training.n_gpu > 1:
        raise ValueError(
            f"{recipe.training.n_gpu} GPUs are visible and no launcher started this process. For all of them: "
            f"{launch}. For one: CUDA_VISIBLE_DEVICES=0 {launch}"
        )


def check_restarts() -> None:
    """
    Refuses processes that torchrun would start again and that might then never find each other. It keeps the store in
    which they leave their addresses from one start to the next: whoever comes first waits for a process that is dead.
    To be called before the processes meet, which also this refusal would end in, as it is started again as well.

    Raises:
        ValueError: If torchrun may restart several processes, with one store for all starts.
    """
    several, restarts = os.environ.get("WORLD_SIZE", "1") != "1", os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if several and restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"`--max_restarts {restarts}`: processes that are started again would look for each other at the addresses "
            "of those that died. Give each start a store of its own, with `--rdzv_backend c10d` and, on every machine, "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of `accelerate launch` (or no --max_restarts: "
            "the same command, typed again, goes on too)."
        )


def check_kernels(recipe: Recipe) -> None:
    """
    Refuse `use_kernels: true` where there are none. For what trains: other commands load the model without.

    Args:
        recipe ([`Recipe`]): The recipe.

    Raises:
        ValueError: No GPU, FSDP, or no package that transformers can use.
    """
    if not recipe.task.use_kernels:
        return
    device = "cpu" if recipe.training.use_cpu else PartialState().device.type
    if device != "cuda":
        raise ValueError(f"`use_kernels: true`: there are kernels for CUDA devices only, not for {device}. Remove it.")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):  # the model comes to the GPU when it trains: too late for a check
        raise ValueError("`use_kernels: true` with FSDP: nothing would show whether they are used. Remove it.")
    if not is_kernels_available():
        raise ValueError(
            "`use_kernels: true` needs the package kernels, in a version that transformers knows: pip install "
            f"'kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}'. Or remove it."
        )


def free_memory() -> int:
    """
    Bytes that each process may take, before it has taken any: what is free on its GPU, or its share of the machine's
    memory. The least of all processes, which are to do the same.
    """
    state = PartialState()
    if state.device.type == "cuda":
        free: int = torch.cuda.mem_get_info(state.device)[0]
    else:
        free = psutil.virtual_memory().available // state.num_processes
    return min(gather_object([free]))


def _check_launcher(recipe: Recipe) -> None:
    """Refuses what `accelerate launch` was told and the recipe does not go with."""
    state, launched = PartialState(), int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = bool(recipe.settings.get("use_cpu"))
    if parse_flag_from_env("ACCELERATE_USE_CPU") and not on_cpu:
        raise ValueError(
            f"`accelerate launch` was told to use the CPU and {recipe.path} was not. Add: --use_cpu true --bf16 false "
            "--dtype float32 (or take `use_cpu` out of the Accelerate config)."
        )
    if launched != state.num_processes:
        raise ValueError(
            f"{launched} processes were launched and each sees {state.num_processes}: every one of them would train "
            "alone and write the same folder. On GPUs write `distributed_type: MULTI_GPU` into the Accelerate config, "
            "as accelerate_configs/ddp.yaml does; on CPUs `use_cpu: true` as well, there and in the recipe."
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        for problem, remedy in _fsdp_problems(recipe):
            raise ValueError(f"FSDP: {problem}. {remedy} (accelerate_configs/fsdp2.yaml is written so.)")


def _fsdp_problems(recipe: Recipe) -> list[tuple[str, str]]:
    """What would go wrong under FSDP, each with what to write."""
    model, settings = recipe.model, recipe.settings
    dtype, storage = str(model.dtype), str(model.bnb_4bit_quant_storage)
    found = []
    if settings.get("use_cpu"):
        found.append(("`use_cpu: true` would run as DDP", "Launch with accelerate_configs/ddp.yaml, or on GPUs."))
    if os.environ.get("FSDP_VERSION", "1") != "2":
        found.append(("version 1 flattens frozen and trained weights together", "Write `fsdp_version: 2`."))
    if os.environ.get("FSDP_STATE_DICT_TYPE") != "FULL_STATE_DICT":
        found.append(
            ("checkpoints would lack the adapter", "Write `fsdp_state_dict_type: FULL_STATE_DICT` into fsdp_config.")
        )
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        found.append(
            (
                "only one process would have the base model, and all of them score it before training",
                "Write `fsdp_cpu_ram_efficient_loading: false`.",
            )
        )
    if os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP") != LAYER:
        found.append(
            (
                "sharding other layers than the language model's would hang where one process has pictures and another "
                "has none",
                f"Write `fsdp_transformer_layer_cls_to_wrap: {LAYER}`.",
            )
        )
    if model.load_in_8bit:
        found.append(("8-bit weights cannot be sharded", "Write `load_in_4bit: true` instead of `load_in_8bit`."))
    if model.load_in_4bit and storage != dtype:
        found.append(
            (
                f"4-bit weights stored as {storage} are not sharded, each GPU would hold all of them",
                f"Write `bnb_4bit_quant_storage: {dtype}`, which is `dtype`, into the recipe.",
            )
        )
    return found
