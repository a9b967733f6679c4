"""Phi-3-Vision for transformers 5, composed from transformers' own CLIP vision tower and Phi-3 decoder.

Importing this package makes `model_type: phi3_v` known to `AutoConfig`, `AutoImageProcessor`, `AutoProcessor`,
`AutoModelForImageTextToText` and `AutoModelForCausalLM`. Nothing here knows of the rest of the project: the day
transformers ships `phi3_v`, this folder is deleted.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from sft_phi3v.phi3_v.attention import SDPA_BY_ROW
from sft_phi3v.phi3_v.configuration_phi3_v import Phi3VConfig
from sft_phi3v.phi3_v.image_processing_phi3_v import Phi3VImageProcessor
from sft_phi3v.phi3_v.modeling_phi3_v import Phi3VForCausalLM, Phi3VModel, Phi3VPreTrainedModel
from sft_phi3v.phi3_v.processing_phi3_v import Phi3VProcessor

AutoConfig.register("phi3_v", Phi3VConfig)
AutoImageProcessor.register(Phi3VConfig, image_processor_classes={"pil": Phi3VImageProcessor})
AutoProcessor.register(Phi3VConfig, Phi3VProcessor)
AutoModel.register(Phi3VConfig, Phi3VModel)
AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM)
AutoModelForImageTextToText.register(Phi3VConfig, Phi3VForCausalLM)

__all__ = [
    "SDPA_BY_ROW",
    "Phi3VConfig",
    "Phi3VForCausalLM",
    "Phi3VImageProcessor",
    "Phi3VModel",
    "Phi3VPreTrainedModel",
    "Phi3VProcessor",
]
