"""The flat `config.json` of Phi-3-Vision: Phi-3's fields, plus `img_processor` (CLIP) and `embd_layer` (HD transform).

On disk the file keeps Microsoft's form (`rope_theta`, `rope_scaling` of type "su"), so that other loaders of the
original checkpoint read what we write. In memory the rope settings take transformers' form, `rope_parameters`.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, Phi3Config

# The published config.json gives no sizes for the vision tower: the original is openai/clip-vit-large-patch14-336.
VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

# The only HD transform that the published models use, and the only one that this port computes.
EMBD_LAYER = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}


@strict
class Phi3VConfig(Phi3Config):
    r"""
    Configuration of a Phi-3-Vision model. It is a [`~transformers.Phi3Config`], so the decoder reads it directly.

    Args:
        img_processor (`dict`, *optional*):
            Vision tower. `layer_idx` (defaults to `-2`) is the CLIP hidden state whose patches are used; `clip_config`
            holds the sizes of a tower other than ViT-L/14-336, with the keys of [`~transformers.CLIPVisionConfig`].
        embd_layer (`dict`, *optional*):
            HD transform. Only the published setting is accepted.
        image_token_id (`int`, *optional*, defaults to `32044`):
            Id of `<|image|>`, which stands in `input_ids` once for every image feature.

    Raises:
        ValueError: If `embd_layer` or the rope type is one that no published checkpoint uses.
    """

    model_type = "phi3_v"

    img_processor: dict[str, Any] | None = None
    embd_layer: dict[str, Any] | None = None
    image_token_id: int = 32044

    def __post_init__(self, **kwargs: Any) -> None:
        # `auto_map` points at remote code, and the attention implementation belongs to the machine, not to the model:
        # Microsoft's file asks for flash-attention, which would make every CPU load fail.
        for key in ("auto_map", "_attn_implementation"):
            kwargs.pop(key, None)
        self.img_processor = self.img_processor or {
            "name": "clip_vision_model",
            "model_name": "openai/clip-vit-large-patch14-336",
            "image_dim_out": VIT_L_14_336["hidden_size"],
            "num_img_tokens": 144,
        }
        self.embd_layer = self.embd_layer or dict(EMBD_LAYER)
        for key, expected in EMBD_LAYER.items():
            if self.embd_layer.get(key, expected) != expected:
                raise ValueError(
                    f"embd_layer.{key} is {self.embd_layer[key]!r}: only {expected!r}, as in the published "
                    "Phi-3-vision and Phi-3.5-vision models, is implemented."
                )
        if scaling := kwargs.get("rope_scaling"):
            rope_type = scaling.get("rope_type", scaling.get("type"))
            if rope_type not in ("su", "longrope"):
                raise ValueError(f"rope_scaling.type is {rope_type!r}: expected 'su' or 'longrope'.")
            factors = {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
            # Phi3Config would let its own default (4096) overwrite the inner value: both must say the same.
            factors["original_max_position_embeddings"] = self.original_max_position_embeddings
            factors["factor"] = self.max_position_embeddings / self.original_max_position_embeddings
            kwargs["rope_scaling"] = {"rope_type": "longrope", **factors}
        super().__post_init__(**kwargs)

    @property
    def vision_config(self) -> CLIPVisionConfig:
        """Sizes of the vision tower, as CLIP's own configuration."""
        assert self.img_processor is not None
        return CLIPVisionConfig(**{**VIT_L_14_336, **self.img_processor.get("clip_config", {})})

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration with the rope settings in Microsoft's form."""
        output = super().to_dict()
        rope = output.pop("rope_parameters", None) or {}
        output["rope_theta"] = rope.get("rope_theta", self.default_theta)
        output["rope_scaling"] = None
        if rope.get("rope_type") == "longrope":
            output["rope_scaling"] = {
                "type": "su",
                "short_factor": rope["short_factor"],
                "long_factor": rope["long_factor"],
            }
        return output
