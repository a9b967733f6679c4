"""`sft_phi3v/run.py` under FSDP2 on a machine without GPUs: what looks for a GPU is told that the CPU is one."""

from types import SimpleNamespace

import bitsandbytes
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from sft_phi3v import machine, run

PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # as model.py does where the recipe says `use_cpu`
machine.torch = SimpleNamespace(accelerator=SimpleNamespace(is_available=lambda: True))
machine.is_torch_bf16_gpu_available = lambda: True

if __name__ == "__main__":
    run.main()
