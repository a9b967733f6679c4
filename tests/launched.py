"""`sft_phi3v/run.py` as the tests launch it: it writes down which rows each step learned from, and can be killed.

KILL names the moment at which a process kills itself, as `kill -9` would, and KILL_RANK the process (default: 0); a
process that torchrun has started again lives on. SHARD_BYTES is how much a file of image features holds. Under FSDP2,
which wants GPUs, the CPU is told to be one.
"""

import json
import os
import signal
from types import SimpleNamespace

import bitsandbytes
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from sft_phi3v import checkpoints, evaluation, features, machine, run, trainer

RANK = os.environ.get("RANK", "0")

if os.environ.get("ACCELERATE_USE_FSDP"):
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # as model.py does where the recipe says `use_cpu`
    machine.torch = SimpleNamespace(accelerator=SimpleNamespace(is_available=lambda: True))
    machine.is_torch_bf16_gpu_available = lambda: True


def before(owner, name, act):
    """Calls `act` before each call of a function."""
    original = getattr(owner, name)

    def called(*args, **kwargs):
        act(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, called)


def learned(self, model, grad_norm=None):
    with open(f"{self.args.output_dir}/rows-{RANK}.jsonl", "a") as file:
        file.write(json.dumps([self.state.global_step, self.seen]) + "\n")
    layers = [module.gradient_checkpointing for module in model.modules() if isinstance(module, Phi3DecoderLayer)]
    with open(f"{self.args.output_dir}/recomputing-{RANK}.json", "w") as file:
        json.dump(layers, file)


class Recording(trainer.Trainer):
    """Knows the rows of a step that have something supervised in them."""

    def _get_num_items_in_batch(self, batch_samples, device):
        rows = [batch["rows"] for batch in batch_samples]
        items = super()._get_num_items_in_batch(batch_samples, device)
        self.seen = [
            row
            for names, batch in zip(rows, batch_samples, strict=True)
            for row, labels in zip(names, batch["labels"], strict=True)
            if (labels != -100).any()
        ]
        return items


def kill_at(moment):
    """The moment is a function's name, and after how many calls of it: `training_step:5`."""
    name, _, count = moment.partition(":")
    owner = {
        "training_step": trainer.Trainer,  # in the middle of a step
        "_save_optimizer_and_scheduler": trainer.Trainer,  # half a checkpoint is written
        "prediction_step": trainer.Trainer,  # in an evaluation
        "file_hashes": checkpoints,  # all of a checkpoint is written, and its list is not
        "rotate_checkpoints": trainer,  # a new checkpoint is there, and the old one still is
        "_generate_batch": evaluation,  # while it answers
        "save_state": trainer.Trainer,  # the adapter is in its place
    }[name]
    calls = []

    def act(*args, **kwargs):
        calls.append(1)
        if len(calls) == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)

    before(owner, name, act)


before(Recording, "_get_grad_norm", learned)
features.SHARD_BYTES = int(os.environ.get("SHARD_BYTES", features.SHARD_BYTES))
run.Trainer = Recording
if (
    os.environ.get("KILL")
    and os.environ.get("KILL_RANK", "0") == RANK
    and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
):
    kill_at(os.environ["KILL"])

if __name__ == "__main__":
    run.main()
