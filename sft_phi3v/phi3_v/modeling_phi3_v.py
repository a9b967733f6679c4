"""Phi-3-Vision: pictures → CLIP → HD transform → projector → into the token embeddings → Phi-3 decoder.

For one picture cut into h×w local crops:

    crops (h·w + 1, 3, 336, 336) → CLIP (h·w + 1, 576, 1024) → 2×2 merge (h·w + 1, 12, 12, 4096)
    → local grid with a newline after each row (12h·(12w + 1), 4096), separator (1, 4096), global grid (12·13, 4096)
    → projector ((h·w + 1)·144 + 1 + (h + 1)·12, 3072), one vector for each `<|image|>` in `input_ids`

The names of the tensors in memory follow transformers (`vision_tower`, `multi_modal_projector`, `language_model`); on
disk they are Microsoft's, renamed by the mapping at the end of this file.
"""

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, Phi3Model
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.utils.generic import can_return_tuple

from sft_phi3v.phi3_v.attention import SDPA_BY_ROW
from sft_phi3v.phi3_v.configuration_phi3_v import Phi3VConfig
from sft_phi3v.phi3_v.image_processing_phi3_v import CROP, normalised


class Phi3VPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every Phi-3-Vision model."""

    config: Phi3VConfig
    config_class = Phi3VConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "Phi3DecoderLayer",
        "Phi3VLastLayer",
        "CLIPEncoderLayer",
        "CLIPVisionEmbeddings",
        "Phi3VProjector",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Older checkpoints hold the token embeddings a second time under this name.
    _keys_to_ignore_on_load_unexpected = [r"vision_embed_tokens\.wte\.weight"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Phi3VProjector):
            init.normal_(module.separator, std=self.config.initializer_range)
            init.normal_(module.newline, std=self.config.initializer_range)


class Phi3VProjector(nn.Module):
    """The learned separators of the HD transform, and the MLP from CLIP's width to the decoder's."""

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        width = 4 * config.vision_config.hidden_size  # four merged patches
        self.separator = nn.Parameter(torch.zeros(1, 1, width))  # between the local and the global grid
        self.newline = nn.Parameter(torch.zeros(1, 1, 1, width))  # at the end of each grid row
        self.linear_1 = nn.Linear(width, config.hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)

    def arrange(self, merged: torch.Tensor, image_sizes: list[tuple[int, int]]) -> torch.Tensor:
        """
        Puts the crops of each picture back into their grids: local grid, separator, global grid.

        Args:
            merged (`torch.Tensor` of shape `(crops, side, side, width)`): Merged patches, global crops first.
            image_sizes (`list[tuple[int, int]]`): Height and width of each padded picture, in pixels.

        Returns:
            `torch.Tensor` of shape `(image features of all pictures, width)`.
        """
        side, width = merged.shape[1], merged.shape[-1]
        sequence = []
        start = 0
        for height, wide in image_sizes:
            rows, columns = height // CROP, wide // CROP
            crops = merged[start : start + rows * columns + 1]
            start += rows * columns + 1
            local = crops[1:].view(rows, columns, side, side, width)
            local = local.permute(0, 2, 1, 3, 4).reshape(rows * side, columns * side, width)
            sequence += [self._with_newlines(local), self.separator[0], self._with_newlines(crops[0])]
        return torch.cat(sequence)

    def _with_newlines(self, grid: torch.Tensor) -> torch.Tensor:
        """`(rows, columns, width)` → `(rows · (columns + 1), width)`."""
        newline = self.newline[0].expand(grid.shape[0], 1, -1)
        return torch.cat([grid, newline], dim=1).flatten(0, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features.to(self.newline.dtype))))


class Phi3VLastLayer(Phi3DecoderLayer):
    """The decoder's last layer: behind attention no position needs another, and what nobody asks for is left out."""

    def forward(
        self, hidden_states: torch.Tensor, *, kept_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.resid_attn_dropout(attended)
        if kept_positions is not None:
            hidden_states = hidden_states.flatten(0, 1)[kept_positions].unsqueeze(0)
        computed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.resid_mlp_dropout(computed)


class Phi3VModel(Phi3VPreTrainedModel):
    r"""
    Phi-3-Vision without its language modelling head.

    Args:
        config ([`Phi3VConfig`]): Sizes of the model.
    """

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        vision_config = config.vision_config
        vision_config._attn_implementation = config._attn_implementation
        self.vision_tower = CLIPVisionModel(vision_config)
        self.multi_modal_projector = Phi3VProjector(config)
        self.language_model = Phi3Model(config)
        self.language_model.layers[-1] = Phi3VLastLayer(config, config.num_hidden_layers - 1)
        self.vision_batch_size: int | None = None  # crops that CLIP reads at a time; all of them where nothing is said
        # hidden_states[-2] is the output of all but the last layer; the last one is loaded and saved, never computed.
        layer_idx = (config.img_processor or {}).get("layer_idx", -2)
        self.vision_layers = range(vision_config.num_hidden_layers + 1)[layer_idx]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(crops, 3, 336, 336)`):
                Crops of all pictures. The original's padded form `(pictures, crops, 3, 336, 336)` is accepted too; its
                padding crops are dropped. Bytes (uint8) are the local crops alone: the global ones are made here.
            image_sizes (`torch.Tensor` of shape `(pictures, 2)`): Height and width of each padded picture, in pixels.

        Returns:
            `torch.Tensor` of shape `(image features of all pictures, hidden_size)`.

        Raises:
            ValueError: If the number of crops is not the one that `image_sizes` calls for.
        """
        sizes = [(int(height), int(width)) for height, width in image_sizes.tolist()]
        grids = [(height // CROP, width // CROP) for height, width in sizes]
        as_bytes = pixel_values.dtype == torch.uint8
        counts = [rows * columns + (not as_bytes) for rows, columns in grids]
        if pixel_values.ndim == 5:
            pixel_values = torch.cat([crops[:count] for crops, count in zip(pixel_values, counts, strict=True)])
        if len(pixel_values) != sum(counts):
            raise ValueError(
                f"pixel_values hold {len(pixel_values)} crops, but image_sizes {sizes} call for {sum(counts)}: "
                "they do not belong to the same pictures."
            )
        if as_bytes:
            crops = zip(grids, pixel_values.split(counts), strict=True)
            pixel_values = torch.cat([normalised(local.unflatten(0, grid)) for grid, local in crops])
        batches = pixel_values.split(self.vision_batch_size or len(pixel_values))
        merged = torch.cat([self._merge_patches(self._vision_features(crops)) for crops in batches])
        return self.multi_modal_projector(self.multi_modal_projector.arrange(merged, sizes))

    def _vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(crops, 3, 336, 336)` → `(crops, 576, width)`: CLIP up to the layer whose output is used, without CLS."""
        tower = self.vision_tower
        trained = any(parameter.requires_grad for parameter in tower.parameters())
        # Said outright, because enable_input_require_grads() makes the patch embedding require a gradient, and a
        # frozen tower would then keep every activation for nothing.
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            hidden_states = tower.pre_layrnorm(tower.embeddings(pixel_values))
            for layer in tower.encoder.layers[: self.vision_layers]:
                hidden_states = layer(hidden_states, attention_mask=None)
        return hidden_states[:, 1:]

    def _trains_vision(self) -> bool:
        parts = (self.vision_tower, self.multi_modal_projector)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def _zero_from_vision(self) -> torch.Tensor:
        """
        Zero, with a graph through tower and projector. Where processes share a step, one of them may have no picture:
        gradients are summed tensor by tensor, and each must have one of each.
        """
        blank = next(self.multi_modal_projector.parameters()).new_zeros(2, 3, CROP, CROP)
        return 0 * self.get_image_features(blank, torch.tensor([[CROP, CROP]])).sum()

    @staticmethod
    def _merge_patches(features: torch.Tensor) -> torch.Tensor:
        """`(crops, 576, width)` → `(crops, 12, 12, 4·width)`: each 2×2 block of patches becomes one vector."""
        crops, patches, width = features.shape
        side = int(patches**0.5)
        blocks = features.view(crops, side // 2, 2, side // 2, 2, width)
        blocks = blocks.permute(0, 1, 3, 2, 4, 5)  # (crops, 12, 12, 2, 2, width)
        return blocks.reshape(crops, side // 2, side // 2, 4 * width)

    def _place(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, features: Any, image_sizes: torch.Tensor
    ) -> torch.Tensor:
        """Writes the image features over the embeddings of `<|image|>`, in order, after counting both."""
        if features.shape[-1] != inputs_embeds.shape[-1]:
            raise ValueError(f"image_features are {features.shape[-1]} wide, the model {inputs_embeds.shape[-1]}.")
        is_image = input_ids == self.config.image_token_id
        tokens = int(is_image.sum())
        if tokens != len(features):
            raise ValueError(
                f"input_ids hold {tokens} image tokens (id {self.config.image_token_id}), but the {len(image_sizes)} "
                f"pictures give {len(features)} image features. The ids were probably truncated, made with another "
                "num_crops, or belong to other pictures; or the text holds a literal <|image|>."
            )
        # Equal totals can hide one token too many in one picture and one too few in the next: compare run by run.
        # A picture is always followed by <s>, so that every run of image tokens is one picture.
        flat = nn.functional.pad(is_image, (1, 1)).flatten()
        edges = torch.nonzero(flat[1:] != flat[:-1]).flatten()
        runs = edges[1::2] - edges[::2]
        grid = (image_sizes // CROP).to(runs.device)
        expected = (grid[:, 0] * grid[:, 1] + 1) * 144 + 1 + (grid[:, 0] + 1) * 12
        if runs.shape != expected.shape or not torch.equal(runs, expected):
            raise ValueError(
                f"input_ids hold runs of {runs.tolist()} image tokens, but the pictures give {expected.tolist()} image "
                "features: the pictures are in another order than in the text."
            )
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), features.to(inputs_embeds))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        use_cache: bool | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): `image_token_id` once per image feature.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 at padding.
            pixel_values (`torch.FloatTensor` of shape `(crops, 3, 336, 336)`, *optional*):
                Crops of all pictures of the batch, in the order in which they appear in `input_ids`.
            image_sizes (`torch.LongTensor` of shape `(pictures, 2)`, *optional*): Height and width, padded, in pixels.
            kept_positions (`torch.LongTensor` of shape `(kept,)`, *optional*):
                Positions in the flattened `(batch · length)` to give; the last layer computes no others.
            cu_seq_lens_q (`torch.IntTensor` of shape `(rows + 1,)`, *optional*):
                Where each row starts, and the end, for rows that lie behind each other in a batch of one. With
                `position_ids` that start again in each row, and all else that flash attention wants.
            image_features (`torch.FloatTensor` of shape `(image tokens, hidden_size)`, *optional*):
                What [`Phi3VModel.get_image_features`] gave for these pictures, in place of `pixel_values`.

        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` of shape `(batch, length, hidden_size)`, or
            `(1, kept, hidden_size)`.

        Raises:
            ValueError: If pixels or features come without image tokens, or image tokens without them, or both come, or
                their numbers differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if "cu_seq_lens_q" in kwargs and self.language_model.config._attn_implementation == SDPA_BY_ROW:
            kwargs["row_lengths"] = kwargs["cu_seq_lens_q"].diff().tolist()
            # No attention looks at it. With four dimensions it is taken as it is; else one of length × length is made.
            attention_mask = torch.zeros(1, 1, 1, 1, device=self.device)
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids)
        if pixel_values is not None and image_features is not None:
            raise ValueError("Pass pixel_values or the image_features that were made of them, not both.")
        if pixel_values is not None or image_features is not None:
            if input_ids is None or image_sizes is None:
                given = "image_features" if pixel_values is None else "pixel_values"
                raise ValueError(f"{given} need input_ids, which say where the pictures go, and image_sizes.")
            if pixel_values is not None:
                image_features = self.get_image_features(pixel_values, image_sizes)
            inputs_embeds = self._place(input_ids, inputs_embeds, image_features, image_sizes)
        elif input_ids is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            # Only where a prompt is read: while decoding, a sampled <|image|> is the model's own doing.
            tokens = int((input_ids == self.config.image_token_id).sum())
            if tokens:
                raise ValueError(f"input_ids hold {tokens} image tokens, but no pixel_values were given (0 features).")
            if self.training and torch.is_grad_enabled() and self._trains_vision():
                inputs_embeds = inputs_embeds + self._zero_from_vision().to(inputs_embeds)
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class Phi3VForCausalLM(Phi3VPreTrainedModel, GenerationMixin):
    r"""
    Phi-3-Vision with its language modelling head.

    Args:
        config ([`Phi3VConfig`]): Sizes of the model.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._stop_at_turn_end()

    def _stop_at_turn_end(self) -> None:
        """The published files say eos 2, which the model never gives: it ends a turn with <|end|>."""
        if self.generation_config.eos_token_id == 2:
            self.generation_config.eos_token_id = [32007, 32000]
            self.generation_config.pad_token_id = 32000

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        super().adjust_generation_fn(*args, **kwargs)
        self._stop_at_turn_end()

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """See [`Phi3VModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_sizes)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args as [`Phi3VModel.forward`], and:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): Ids to learn; -100 where nothing is.
            logits_to_keep (`int` or `torch.Tensor`, *optional*): Positions for the head: the last n, or these.
            num_items_in_batch (`int`, *optional*): Supervised tokens of the whole (accumulated) batch, which then
                divides the summed loss; without it the loss is the mean of this batch.

        Returns:
            `CausalLMOutputWithPast`: `logits` of shape `(batch, kept length, vocab_size)`, and `loss` with labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            use_cache=use_cache,
            image_features=image_features,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeats each row for its beams; its pictures as a whole, where transformers would repeat crop by crop."""
        if expand_size > 1 and input_ids is not None and kwargs.get("pixel_values") is not None:
            pixel_values, image_sizes = kwargs.pop("pixel_values"), kwargs.pop("image_sizes")
            crops = ((image_sizes // CROP).prod(dim=1) + (pixel_values.dtype != torch.uint8)).tolist()
            pictures = pixel_values.split(crops) if pixel_values.ndim == 4 else list(pixel_values.split(1))
            is_image = input_ids == self.config.image_token_id
            starts = is_image & ~nn.functional.pad(is_image, (1, -1))
            rows = torch.arange(len(pictures), device=input_ids.device).split(starts.sum(dim=1).tolist())
            order = torch.cat([row.repeat(expand_size) for row in rows])
            pixel_values = torch.cat([pictures[picture] for picture in order.tolist()])
            input_ids, kwargs = super()._expand_inputs_for_generation(
                expand_size, is_encoder_decoder, input_ids, **kwargs
            )
            return input_ids, {**kwargs, "pixel_values": pixel_values, "image_sizes": image_sizes[order]}
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)

    # generate() looks for the literal name `kwargs` to decide which model inputs it may pass.
    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, past_key_values: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # Past the original context, longrope turns from its short to its long factors, and cached keys are rotated by
        # the wrong ones. As in transformers' Phi3: drop the cache once and read everything again, pictures included.
        # Unlike there, columns that are padding in every row do not count: positions choose the factors, and skip them.
        limit = self.config.original_max_position_embeddings
        if past_key_values is not None and input_ids.shape[1] > limit:
            mask = kwargs.get("attention_mask")
            padding = 0 if mask is None else int((mask == 0).sum(-1).min())
            cached = past_key_values.get_seq_length()
            if input_ids.shape[1] - padding > limit and 0 < cached <= limit + padding:
                past_key_values = None
                kwargs |= {"next_sequence_length": None, "is_first_iteration": True}
        return super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)


VISION = "model.vision_embed_tokens"
register_checkpoint_conversion_mapping(
    "phi3_v",
    [
        WeightRenaming(f"^{VISION}.img_processor.vision_model", "model.vision_tower"),
        WeightRenaming(f"^{VISION}.img_projection.0", "model.multi_modal_projector.linear_1"),
        WeightRenaming(f"^{VISION}.img_projection.2", "model.multi_modal_projector.linear_2"),
        WeightRenaming(f"^{VISION}.glb_GN", "model.multi_modal_projector.separator"),
        WeightRenaming(f"^{VISION}.sub_GN", "model.multi_modal_projector.newline"),
        WeightRenaming("^model.embed_tokens", "model.language_model.embed_tokens"),
        WeightRenaming("^model.layers", "model.language_model.layers"),
        WeightRenaming("^model.norm", "model.language_model.norm"),
    ],
)

__all__ = ["Phi3VForCausalLM", "Phi3VModel", "Phi3VPreTrainedModel"]
