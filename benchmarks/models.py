"""Phi-3-Vision in any size with random weights, as a run would train it, and batches for it: nothing is downloaded."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from sft_phi3v.collator import Collator
from sft_phi3v.estimate import Setting
from sft_phi3v.model import target_pattern
from sft_phi3v.phi3_v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor

TINY_BASE = Path(__file__).resolve().parents[1] / "recipes" / "tiny_base"


def config_of(
    hidden: int, layers: int, heads: int, inner: int, clip_layers: int, clip_width: int = 1024
) -> Phi3VConfig:
    """A Phi-3-Vision of other sizes, with the vocabulary of the real one."""
    factors = hidden // heads // 2
    return Phi3VConfig(
        vocab_size=32064,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "su", "short_factor": [1.0] * factors, "long_factor": [2.0] * factors},
        img_processor={
            "name": "clip_vision_model",
            "image_dim_out": clip_width,
            "num_img_tokens": 144,
            "clip_config": {
                "num_hidden_layers": clip_layers,
                "hidden_size": clip_width,
                "intermediate_size": 4 * clip_width,
                "num_attention_heads": clip_width // 64,
            },
        },
    )


def tiny() -> Phi3VConfig:
    """To see that a benchmark runs."""
    return config_of(64, 2, 2, 128, 2, 64)


def mid_size() -> Phi3VConfig:
    """125.6 million weights: CLIP at its real width, six layers deep, and a small decoder."""
    return config_of(512, 4, 8, 1536, 6)


def full_size() -> Phi3VConfig:
    """Phi-3-vision-128k-instruct: 4.15 billion weights."""
    return config_of(3072, 32, 32, 8192, 24)


SIZES = {"tiny": tiny, "mid": mid_size, "full": full_size}


def processor(num_crops: int) -> Phi3VProcessor:
    """The demo's, whose tokenizer is small; what it costs to read text does not depend on that."""
    return Phi3VProcessor.from_pretrained(TINY_BASE, num_crops=num_crops)


def random_model(config: Phi3VConfig, setting: Setting, device: str, *, attention: str) -> nn.Module:
    """
    The model that a run would train.

    Args:
        config ([`Phi3VConfig`]): Its sizes.
        setting ([`~sft_phi3v.estimate.Setting`]): Quantised, adapted, checkpointed or not.
        device (`str`): Where its weights are made.
        attention (`str`): `attn_implementation`.

    Returns:
        `nn.Module`: In training mode. The vision tower and the projector are frozen, unless they are adapted.
    """
    # PEFT still asks under the name that transformers has moved on from.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # it repacks 4-bit weights, through which nothing trains
    torch.manual_seed(0)
    # The tokenizer is smaller than the vocabulary: the image token has its id there.
    config.image_token_id = processor(1).image_token_id
    with torch.device(device):
        model = Phi3VForCausalLM._from_config(
            config, dtype=getattr(torch, setting.dtype), attn_implementation=attention
        )
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    if setting.bits == 4:
        quantise(model, setting, device)
    trained: nn.Module = model
    if setting.lora:
        pattern = target_pattern(setting.adapt, model)
        trained = get_peft_model(
            model, LoraConfig(r=setting.rank, lora_dropout=setting.dropout, target_modules=pattern)
        )
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as TRL's trainer does
    if setting.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if setting.lora:
            trained.enable_input_require_grads()
    return trained.train()


def quantise(model: nn.Module, setting: Setting, device: str) -> None:
    """Puts 4-bit linears in the place of the decoder's."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".language_model." in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _in_4bit(linear, setting, device))


def _in_4bit(linear: nn.Linear, setting: Setting, device: str) -> nn.Module:
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16 if setting.autocast else getattr(torch, setting.dtype),
        compress_statistics=setting.nested,
        quant_type="nf4",
    )
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=setting.nested, quant_type="nf4", module=made
    )
    return made.to(device)


def noise(width: int, height: int) -> Image.Image:
    """A picture of random pixels: nothing in it compresses, or is ever the same."""
    generator = np.random.default_rng([width, height])
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def examples(sizes: Sequence[tuple[int, int]], answer: str = "A red coat with two rows of buttons.") -> list[Any]:
    """Rows with one picture each of these widths and heights, or without for (0, 0)."""
    return [
        {
            "images": [noise(*size)] if any(size) else [],
            "messages": [
                {"role": "user", "content": "What is shown in this image?"},
                {"role": "assistant", "content": answer},
            ],
            "row": row,
        }
        for row, size in enumerate(sizes)
    ]


def batch_of(sizes: Sequence[tuple[int, int]], num_crops: int, *, padding_free: bool, device: str = "cpu") -> Any:
    """The batch that training would see."""
    batch = Collator(processor(num_crops), padding_free=padding_free)(examples(sizes))
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
