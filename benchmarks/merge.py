"""How much memory and time a merge takes: the full 4.15 B architecture, with random weights made here.

    python benchmarks/merge.py --output_dir FOLDER            # 20 GB of disk
    python benchmarks/merge.py --output_dir FOLDER --layers 2 # to try it out

Writes a checkpoint of Phi-3-vision's size shard by shard, a random LoRA adapter for it and a few pictures, and runs
`python -m sft_phi3v.merge` on them: quantise, dequantise, merge, write, load, compare.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from datasets import Dataset, Features, Image, Value
from huggingface_hub import split_state_dict_into_shards_factory
from peft import LoraConfig
from PIL import Image as Picture
from safetensors.torch import save_file
from torch import nn

from sft_phi3v.merge import DTYPE, disk_weights
from sft_phi3v.model import target_pattern
from sft_phi3v.phi3_v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor

TOKENIZER = Path(__file__).parents[1] / "recipes" / "tiny_base"  # its 896 words are the first of the 32,064


def config(layers: int) -> Phi3VConfig:
    """Phi-3-vision-128k-instruct, but for the values of its rope factors."""
    return Phi3VConfig(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0 + index for index in range(48)]},
        **{key: json.loads((TOKENIZER / "config.json").read_text())[key] for key in ("image_token_id", "eos_token_id")},
        bos_token_id=1,
        pad_token_id=890,
    )


def write_base(folder: Path, layers: int) -> None:
    """Random weights, a shard of 2 GB in memory at a time."""
    weights = {name: weight for name, (_, weight) in sorted(disk_weights(config(layers)).items())}
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda weight: weight.numel() * DTYPE.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size="2GB",
    )
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            norm = "norm" in name and name.endswith("weight")
            shard[name] = torch.ones(weights[name].shape, dtype=DTYPE) if norm else _random(weights[name].shape)
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    described = config(layers)
    described.architectures, described.dtype = ["Phi3VForCausalLM"], DTYPE
    described.save_pretrained(folder)
    shutil.copy(TOKENIZER / "generation_config.json", folder)
    Phi3VProcessor.from_pretrained(TOKENIZER).save_pretrained(folder)


def _random(shape: torch.Size, std: float = 0.02) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32).normal_(std=std).to(DTYPE)


def write_adapter(folder: Path, base: Path, rank: int = 32) -> None:
    """An adapter on every linear of the language model that changes what it says."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(base))
    pattern = target_pattern(["language_model"], model)
    LoraConfig(
        r=rank, lora_alpha=rank, target_modules=pattern, task_type="CAUSAL_LM", base_model_name_or_path=str(base)
    ).save_pretrained(folder)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".language_model." in name:
            tensors[f"base_model.model.{name}.lora_A.weight"] = _random(torch.Size((rank, module.in_features))).float()
            tensors[f"base_model.model.{name}.lora_B.weight"] = _random(torch.Size((module.out_features, rank))).float()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_rows(folder: Path, rows: int) -> None:
    """Noise as pictures: the weights are noise too."""
    pictures = [Picture.effect_noise((336, 336), 40 + row).convert("RGB") for row in range(2 * rows)]
    features = Features({"image": Image(), "label": Value("string")})
    data = {"image": pictures, "label": [f"number {row}" for row in range(2 * rows)]}
    Dataset.from_dict(data, features=features).to_parquet(folder / "train.parquet")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=2, help="held-out rows to compare on")
    options = parser.parse_args()
    torch.manual_seed(0)
    base, run, data = (options.output_dir / name for name in ("base", "run", "data"))
    if not (run / "adapter_model.safetensors").exists():
        for folder in (base, run, data):
            folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        write_base(base, options.layers)
        write_rows(data, options.rows)
        write_adapter(run, base)
        print(f"checkpoint, adapter and rows written in {time.monotonic() - start:.0f} s", flush=True)
    recipe = {
        "model_name_or_path": str(base),
        "dtype": "bfloat16",
        "load_in_4bit": True,
        "use_bnb_nested_quant": True,
        "use_peft": True,
        "dataset_name": str(data),
        "held_out": options.rows,
        "answer": "This is {label}.",
        "output_dir": str(run),
        "num_crops": 1,
        "max_new_tokens": 4,
        "generation_batch_size": 1,
        "use_cpu": True,
        "bf16": False,
        "lora_r": 32,
        "lora_alpha": 32,
    }
    path = options.output_dir / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    start = time.monotonic()
    # Noise has no favourite word: two models that agree to a few per cent may well prefer different ones.
    command = [sys.executable, "-m", "sft_phi3v.merge", str(path), "--merge_tolerance", "0.5"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")})
    own = 0.0
    while process.poll() is None:
        own = max(own, _own_memory(process.pid))
        time.sleep(0.2)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    size = sum(file.stat().st_size for file in (run / "merged").glob("*.safetensors")) / 1e9
    print(
        f"exit {process.returncode}; {size:.2f} GB merged; peak memory {own:.2f} GB, with mapped files, which the "
        f"kernel drops where it needs the room, {peak:.2f} GB; {seconds:.0f} s"
    )


def _own_memory(pid: int) -> float:
    """GB that a process holds beside the files that it has mapped."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) * 1024 / 1e9 for line in status.splitlines() if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
