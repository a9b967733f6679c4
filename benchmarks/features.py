"""What `feature_cache` saves of a step, and what it takes: `python benchmarks/features.py [--size 100 1000]`.

A mid-size model with random weights (decoder of 4 layers, 512 wide; CLIP of 6 layers at its real width; float32) is
set up as `run.py` does it, with LoRA on the language model, once without and once with the cache. Measured are, one row
at a time: the collator (decode, cut; or read), and a step (forward, backward), each as the median of `--repeat`, in
seconds of the processor, which other programs on the machine disturb least.

The share that the cache saves is the vision tower's share of a step, which is far larger here than in Phi-3-vision,
whose decoder is 32 layers and 3,072 wide: `--shares` counts the operations of both, from sizes alone.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from models import full_size, mid_size, processor
from PIL import Image

from sft_phi3v.estimate import Setting, Shape, weights_of
from sft_phi3v.features import break_even
from sft_phi3v.fit import flops_per_row
from sft_phi3v.phi3_v import Phi3VForCausalLM
from sft_phi3v.recipe import load_recipe
from sft_phi3v.run import set_up


def write(folder: Path, size: tuple[int, int], rows: int) -> dict[str, Any]:
    """A model, a data set of noise, and the keys of a recipe."""
    torch.manual_seed(0)
    config, reader = mid_size(), processor(1)
    config.image_token_id = reader.image_token_id
    Phi3VForCausalLM(config).save_pretrained(folder / "model")
    reader.save_pretrained(folder / "model")
    for number in range(rows):
        (folder / "data" / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "data" / f"class {number % 2}" / f"{number}.png")
    keys = {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "data")}
    keys |= {"output_dir": str(folder / "out"), "answer": "It shows what is called {label}.", "use_peft": True}
    keys |= {"dtype": "float32", "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    return keys | {"save_strategy": "no", "eval_strategy": "no", "activation_checkpointing": False, "held_out": 1}


def median(repeat: int, act: Callable[[], Any]) -> tuple[float, Any]:
    act()
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        found = act()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), found


def measure(keys: dict[str, Any], folder: Path, repeat: int) -> tuple[float, float, float, str]:
    """Seconds of the collator and of a step; the loss; and what was printed."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    with redirect_stdout(io.StringIO()) as said:
        trainer, *_ = set_up(load_recipe([str(path)]))
    collate, batch = median(repeat, lambda: trainer.data_collator([trainer.train_dataset[0]]))
    batch.pop("rows")
    trainer.model.train()

    def step() -> float:
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss.item()

    seconds, loss = median(repeat, step)
    tokens = batch["input_ids"].shape[1]
    printed = said.getvalue().partition("feature_cache: ")[2].strip()
    return collate, seconds, loss, f"{tokens:,} tokens per row; {printed}".removesuffix("; ")


def shares() -> None:
    """The vision tower's and projector's share of the operations of training on one row with LoRA."""
    setting = Setting(checkpointing=False)
    print("share of a step's operations that image features take (LoRA on the language model):")
    for name, config in (("mid-size, as here", mid_size()), ("Phi-3-vision", full_size())):
        for crops in (4, 16):
            weights, shape = weights_of(config), Shape(1, 64, 0, 0, 32, ((1000, 1000),)).with_crops(crops)
            for checkpointing in (False, True):
                setting = Setting(checkpointing=checkpointing, lora=True)
                whole = flops_per_row(setting, config, weights, shape)
                without = Shape(1, shape.tokens, 0, 0, 32)
                left = flops_per_row(setting, config, weights, without) / whole
                kind = "with" if checkpointing else "without"
                what = f"{name}, {crops} crops, {kind} activation checkpointing"
                print(f"  {what:<58} {1 - left:>4.0%}: at most {1 / left:.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(100, 1000), help="width and height (default: 100 1000)")
    parser.add_argument("--num_crops", type=int, default=16)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--shares", action="store_true", help="only count operations")
    options = parser.parse_args()
    shares()
    if options.shares:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = write(folder, tuple(options.size), rows=4)
        keys |= {"num_crops": options.num_crops, "attn_implementation": options.attention}
        print(f"\n{options.size[0]} × {options.size[1]} pixels, num_crops {options.num_crops}, {options.attention}:")
        found = {}
        for what, changes in (("pictures", {}), ("features", {"feature_cache": str(folder / "cache")})):
            found[what] = collate, step, loss, said = measure(keys | changes, folder, options.repeat)
            shown = f"{1000 * collate:>8.1f} ms to collate, {step:>6.2f} s a step"
            print(f"from {what}: {shown}; loss {loss:.7f}; {said}", flush=True)
        (cut, plain, *_), (read, cached, *_) = found["pictures"], found["features"]
        [file] = (folder / "cache").rglob("*.safetensors")
        first = break_even(made=cut + plain - cached, written=0.0, read=read)
        megabytes = file.stat().st_size / 4e6
        print(
            f"a step is {plain / cached:.1f} times as fast, and with its batch {(cut + plain) / (read + cached):.1f}\n"
            f"{megabytes:.2f} MB per picture on disk; it pays from epoch {first} on"
        )


if __name__ == "__main__":
    main()
