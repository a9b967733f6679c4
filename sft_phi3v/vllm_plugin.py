"""Serving with vLLM: an entry point that vLLM finds by itself where this package is installed beside it.

vLLM has the model; what it lacks on today's transformers is the configuration class of `phi3_v`, and a processor that
answers its questions. Works with transformers 5.19, which vLLM 0.32 wants: only `phi3_v` of this package is imported.
"""

from typing import Any

import torch
from transformers import AutoProcessor, BatchFeature

from sft_phi3v.phi3_v import Phi3VConfig
from sft_phi3v.phi3_v import Phi3VProcessor as _Phi3VProcessor
from sft_phi3v.phi3_v.image_processing_phi3_v import CROP


class Phi3VProcessor(_Phi3VProcessor):  # the name is what `processor_class` in the folder says
    """The processor, with what vLLM's Phi3V asks for: the original's names, and pictures padded to one shape."""

    @property
    def img_tokens(self) -> list[str]:
        """The tags that pictures can have."""
        return [f"<|image_{number}|>" for number in range(1, 1000)]

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """Tokens that a picture of this size takes."""
        return self.image_processor.num_image_tokens(width, height)

    def __call__(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:
        """As the processor, but `pixel_values` are `(pictures, num_crops + 1, 3, 336, 336)`, with zeros at the end."""
        batch = super().__call__(images, text, *args, **kwargs)
        if "pixel_values" in batch:
            sizes = torch.as_tensor(batch["image_sizes"])
            crops = torch.as_tensor(batch["pixel_values"]).split(((sizes // CROP).prod(dim=1) + 1).tolist())
            most = (kwargs.get("num_crops") or self.image_processor.num_crops) + 1
            padded = torch.zeros(len(crops), most, 3, CROP, CROP)
            for row, picture in zip(padded, crops, strict=True):
                row[: len(picture)] = picture
            batch["pixel_values"] = padded
        return batch


def register() -> None:
    """Called by vLLM (entry point `vllm.general_plugins`). Importing `phi3_v` has made the configuration known."""
    AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)
