"""What memory a training step takes: arithmetic on sizes, before anything is loaded.

The largest batch that a recipe can draw decides about memory ([`Shape`]). A step has moments that can be its fullest,
and the one that is names the peak ([`Memory.moment`]):

    CLIP reads → … → loss, and backwards → last layers back → … → first layer back → CLIP back → … → optimiser step
    └ nothing kept    └ everything kept                         └ most gradients     └ if it is trained └ all gradients

`docs/fit.md` has every formula with its reason, and what was measured against it.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn

from sft_phi3v.activations import Layer, Numerics, decoder_layer, vision_forward, vision_layer
from sft_phi3v.batches import Plan
from sft_phi3v.collator import Lengths
from sft_phi3v.model import NEVER_QUANTISED, PARTS, freeze_unused
from sft_phi3v.phi3_v import Phi3VConfig, Phi3VForCausalLM
from sft_phi3v.phi3_v.image_processing_phi3_v import CROP, num_image_tokens, scaled_size
from sft_phi3v.recipe import Recipe

GB = 1e9
CONTEXT = 550_000_000  # CUDA's own: 0.4 to 0.6 GB by card and driver; not torch's, so max_memory_allocated lacks it
FRAGMENTATION = 0.05  # of what a step allocates and frees: assumed
SCORED_AT_ONCE, VOCABULARY_AT_ONCE = 4096, 32768  # tokens and vocabulary of one tile of TRL's fused LM head

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Numbers kept per trained number, bytes of each, and whether they may be moved to the CPU when memory is short.
OPTIMISERS: dict[str, tuple[int, int, bool]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_anyprecision", "stable_adamw"), (2, 4, False)),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"), (2, 1, False)),
    "paged_adamw_32bit": (2, 4, True),
    "paged_adamw_8bit": (2, 1, True),
    "sgd": (0, 4, False),
    **dict.fromkeys(("adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit", "lion_32bit"), (1, 4, False)),
    **dict.fromkeys(("lion_8bit", "rmsprop_bnb_8bit"), (1, 1, False)),
    "paged_lion_32bit": (1, 4, True),
    "paged_lion_8bit": (1, 1, True),
    "ademamix": (3, 4, False),
    "ademamix_8bit": (3, 1, False),
    "paged_ademamix_32bit": (3, 4, True),
    "paged_ademamix_8bit": (3, 1, True),
}


@dataclass(frozen=True)
class Shape:
    """
    The largest batch that rows can make: each number is the largest of any row.

    Args:
        rows (`int`): Rows per device and step.
        tokens (`int`): Tokens per row, padded. Without padding a row has at most so many.
        image_tokens (`int`): Of these, a row's pictures'.
        crops (`int`): Crops per row, each picture's global one among them.
        supervised (`int`): Supervised tokens per row.
        sizes (`tuple[tuple[int, int], ...]`): Width and height of the pictures of the row with the most image tokens.
        padded (`bool`): Whether a batch may hold rows of several lengths.
    """

    rows: int
    tokens: int
    image_tokens: int
    crops: int
    supervised: int
    sizes: tuple[tuple[int, int], ...] = ()
    padded: bool = False

    @classmethod
    def of(cls, lengths: Sequence[Lengths], recipe: Recipe, num_crops: int, plan: Plan | None = None) -> "Shape":
        """
        Args:
            lengths (sequence of [`Lengths`]): Of every row that may be trained on.
            recipe ([`Recipe`]): Its batch size, and `pad_to_multiple_of`.
            num_crops (`int`): Most local crops of a picture.
            plan ([`~sft_phi3v.batches.Plan`], *optional*): Of these rows, where batches are planned.

        Returns:
            [`Shape`]: The largest batch; of planned ones the most that any has of each, shared out over its rows.
        """
        if plan is not None:
            rows, tokens = plan.worst()
            fullest = max(lengths, key=lambda found: found.image_tokens)
            return cls(
                rows=rows,
                tokens=tokens,
                image_tokens=math.ceil(plan.most([found.image_tokens for found in lengths]) / rows),
                crops=math.ceil(plan.most([_crops(found, num_crops) for found in lengths]) / rows),
                supervised=math.ceil(plan.most([found.supervised for found in lengths]) / rows),
                sizes=fullest.sizes,
                padded=plan.padded and rows > 1 and _differ(lengths),
            )
        rows = recipe.training.per_device_train_batch_size
        multiple = (not recipe.padding_free and recipe.training.pad_to_multiple_of) or 1
        longest = max(found.tokens for found in lengths)
        fullest = max(lengths, key=lambda found: found.image_tokens)
        return cls(
            rows=rows,
            tokens=-(-longest // multiple) * multiple,
            image_tokens=fullest.image_tokens,
            crops=max(_crops(found, num_crops) for found in lengths),
            supervised=max(found.supervised for found in lengths),
            sizes=fullest.sizes,
            padded=rows > 1 and not recipe.padding_free and _differ(lengths),
        )

    @classmethod
    def mean(cls, lengths: Sequence[Lengths], recipe: Recipe, num_crops: int) -> "Shape":
        """A batch whose rows are all as the mean row; arguments as [`Shape.of`]."""
        crops = [_crops(found, num_crops) for found in lengths]
        columns = zip(*((found.tokens, found.image_tokens, found.supervised) for found in lengths), strict=True)
        tokens, image_tokens, supervised = (round(sum(column) / len(lengths)) for column in columns)
        rows = recipe.training.per_device_train_batch_size
        return cls(rows, tokens, image_tokens, round(sum(crops) / len(lengths)), supervised)

    @classmethod
    def worst(cls, recipe: Recipe, num_crops: int, *, text: int = 64, supervised: int = 32) -> "Shape":
        """Without any row: one square picture per row, and so many tokens of text, of which some are supervised."""
        size = (CROP * math.isqrt(num_crops),) * 2
        made = cls(recipe.training.per_device_train_batch_size, text, 0, 0, supervised, (size,))
        return made.with_crops(num_crops)

    def with_crops(self, num_crops: int) -> "Shape":
        """The same rows, with their pictures cut into at most so many crops."""
        grids = [grid(size, num_crops) for size in self.sizes]
        image_tokens = sum(num_image_tokens(*found) for found in grids)
        crops = sum(math.prod(found) + 1 for found in grids)
        tokens = self.tokens - self.image_tokens + image_tokens
        return replace(self, tokens=tokens, image_tokens=image_tokens, crops=crops)


def grid(size: tuple[int, int], num_crops: int) -> tuple[int, int]:
    """Rows and columns of local crops of a picture of this width and height."""
    (width, height), transposed = scaled_size(*size, num_crops)
    rows, columns = math.ceil(height / CROP), width // CROP
    return (columns, rows) if transposed else (rows, columns)


def _differ(lengths: Sequence[Lengths]) -> bool:
    return len({found.tokens for found in lengths}) > 1


def _crops(row: Lengths, num_crops: int) -> int:
    return sum(math.prod(grid(size, num_crops)) + 1 for size in row.sizes)


@dataclass(frozen=True)
class Setting:
    """
    What of a recipe decides about memory and time. What `estimate_memory` and the rest are asked about.

    Args:
        dtype (`str`): Of weights that are not quantised: bfloat16, float16, float32, or auto for the checkpoint's own.
        autocast (`bool`): `bf16` or `fp16`.
        bits (`int`, *optional*): 4 or 8 where the decoder's linears are quantised.
        nested (`bool`): Double quantisation.
        lora (`bool`): Adapters; else every weight that is computed is trained.
        adapt (`tuple[str, ...]`): Parts with adapters.
        targets (`str` or `tuple[str, ...]`, *optional*): The recipe's own `lora_target_modules`.
        rank (`int`), dropout (`float`): LoRA's.
        checkpointing (`bool`): Activation checkpointing.
        checkpointed (`int`, *optional*): How many of the decoder's layers recompute; `None`: all.
        attention (`str`): sdpa, flash_attention_2 or eager.
        optimiser (`str`): Its name in transformers.
        rows (`int`), accumulation (`int`): Rows per device and forward pass, and passes per step.
        processes (`int`): GPUs.
        sharded (`bool`): FSDP: weights, gradients and optimiser are shared out over them.
        budget (`int`, *optional*): Most tokens of a batch, where batches are planned.
        cuda (`bool`): `False` describes a step on a CPU, which keeps wider dropout masks.
        features (`bool`): Whether batches hold image features, of `feature_cache`, and no pixels.
        vision_batch_size (`int`, *optional*): Crops that the vision tower reads at a time; `None`: all of a batch.
    """

    dtype: str = "bfloat16"
    autocast: bool = True
    bits: int | None = None
    nested: bool = False
    lora: bool = True
    adapt: tuple[str, ...] = ("language_model",)
    targets: str | tuple[str, ...] | None = None
    rank: int = 16
    dropout: float = 0.05
    checkpointing: bool = True
    checkpointed: int | None = None
    attention: str = "sdpa"
    optimiser: str = "adamw_torch_fused"
    rows: int = 1
    accumulation: int = 1
    processes: int = 1
    sharded: bool = False
    cuda: bool = True
    budget: int | None = None
    features: bool = False
    vision_batch_size: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, *, processes: int = 1) -> "Setting":
        """The setting of a recipe, on so many GPUs; `checkpointed_layers: auto` is all, until a memory is known."""
        model, training, layers = recipe.model, recipe.training, recipe.task.checkpointed_layers
        targets = model.lora_target_modules
        return cls(
            dtype=str(model.dtype or "float32"),
            autocast=bool(training.bf16 or training.fp16),
            bits=4 if model.load_in_4bit else 8 if model.load_in_8bit else None,
            nested=model.use_bnb_nested_quant,
            lora=model.use_peft,
            adapt=tuple(recipe.task.adapt),
            targets=tuple(targets) if isinstance(targets, list) else targets,
            rank=model.lora_r,
            dropout=model.lora_dropout,
            checkpointing=bool(recipe.settings.get("activation_checkpointing")),
            checkpointed=layers if isinstance(layers, int) else None,
            attention=model.attn_implementation or "sdpa",
            optimiser=str(getattr(training.optim, "value", training.optim)),
            rows=training.per_device_train_batch_size,
            accumulation=training.gradient_accumulation_steps,
            processes=processes,
            sharded=bool(training.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP"),
            cuda=not recipe.settings.get("use_cpu"),  # load_recipe sets training's own where no GPU is seen
            budget=recipe.task.max_tokens_per_batch,
            features=recipe.task.feature_cache is not None,
            vision_batch_size=recipe.task.vision_batch_size,
        )


@dataclass(frozen=True)
class Weight:
    """One tensor of the base model: its part, its shape, whether it is a linear's, and whether it is ever computed."""

    name: str
    part: str
    shape: tuple[int, ...]
    linear: bool
    computed: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def weights_of(config: Phi3VConfig) -> tuple[Weight, ...]:
    """Every tensor of the model, from one that is built without memory."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    freeze_unused(model)
    return tuple(
        Weight(
            name=name,
            part=next(part for part, prefix in PARTS.items() if name.startswith(prefix)),
            shape=tuple(weight.shape),
            linear=name in linears,
            computed=weight.requires_grad,
        )
        for name, weight in model.named_parameters()
    )


def adapted_weights(setting: Setting, weights: Iterable[Weight]) -> list[Weight]:
    """The linears that get LoRA. As in PEFT, one text of targets is a pattern for whole names, a list has ends."""
    if not setting.lora:
        return []
    linears = [(weight, weight.name.removesuffix(".weight")) for weight in weights if weight.linear]
    if setting.targets is None:
        return [weight for weight, _ in linears if weight.computed and weight.part in setting.adapt]
    if isinstance(setting.targets, str):
        return [weight for weight, name in linears if re.fullmatch(setting.targets, name)]
    return [weight for weight, name in linears if any(f".{name}".endswith(f".{end}") for end in setting.targets)]


def quantised(weight: Weight) -> bool:
    """Whether this tensor is stored in 4 or 8 bits where the recipe quantises."""
    return weight.linear and not any(weight.name.startswith(f"{part}.") for part in NEVER_QUANTISED)


def stored_bytes(weight: Weight, setting: Setting, width: int) -> int:
    """
    Bytes of one weight on the device, with its quantisation constants.

    Args:
        weight ([`Weight`]): The tensor.
        setting ([`Setting`]): How it is stored.
        width (`int`): Bytes per number that is not quantised.

    Returns:
        `int`: Bytes.
    """
    if setting.bits is None or not quantised(weight):
        return weight.numel * width
    if setting.bits == 8:
        return weight.numel + weight.shape[0] * 4  # and one float32 scale per row
    blocks = -(-weight.numel // 64)
    code = 16 * 4
    if not setting.nested:
        return -(-weight.numel // 2) + blocks * 4 + code  # a float32 scale per 64 numbers
    # The scales in 8 bits, their own float32 scale per 256 of them, their code book, and their mean.
    return -(-weight.numel // 2) + blocks + -(-blocks // 256) * 4 + 256 * 4 + 4 + code


def optimiser_bytes(optimiser: str, shapes: Iterable[tuple[int, ...]]) -> int:
    """
    What an optimiser keeps on the GPU for tensors of these shapes.

    Args:
        optimiser (`str`): `optim`, as transformers names it.
        shapes (iterable of `tuple[int, ...]`): The trained tensors.

    Returns:
        `int`: Bytes. Paged states count where they cannot leave the GPU.

    Raises:
        ValueError: If nothing is known about that optimiser.
    """
    if optimiser == "adafactor":  # a row's and a column's mean of squares; all of a vector's
        return sum(4 * (sum(shape[-2:]) * math.prod(shape[:-2]) if len(shape) > 1 else shape[0]) for shape in shapes)
    if optimiser not in OPTIMISERS:
        known = ", ".join(sorted([*OPTIMISERS, "adafactor"]))
        raise ValueError(f"`optim` is {optimiser!r}, whose memory is not known. Known are {known}.")
    states, width, paged = OPTIMISERS[optimiser]
    total = 0
    for numel in map(math.prod, shapes):
        if paged and numel >= 100_000:
            continue
        small = width == 1 and numel < 4096  # bitsandbytes keeps these in float32
        total += states * (numel * (4 if small else width) + (-(-numel // 256) * 4 if width == 1 and not small else 0))
    return total


@dataclass(frozen=True)
class Memory:
    """
    The peak of a training step on one GPU.

    Args:
        parts (`Mapping[str, int]`): Bytes by what holds them; together they are the peak.
        moment (`str`): When in a step that is.
        shape ([`Shape`]): The batch.
    """

    parts: Mapping[str, int]
    moment: str
    shape: Shape

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """What torch allocates: `torch.cuda.max_memory_allocated`, which knows no context and no gaps."""
        return self.total - self.parts.get("CUDA context", 0) - self.parts.get("fragmentation", 0)


def estimate_memory(recipe: Recipe, config: Phi3VConfig, shape: Shape, *, processes: int = 1) -> Memory:
    """
    The most memory that a training step takes on one GPU.

    Args:
        recipe ([`Recipe`]): The recipe.
        config ([`Phi3VConfig`]): Of its base model.
        shape ([`Shape`]): Its largest batch.
        processes (`int`, *optional*, defaults to `1`): GPUs.

    Returns:
        [`Memory`]: Bytes, part by part.

    Raises:
        ValueError: If nothing is known about the recipe's optimiser.
    """
    return memory_of(Setting.of(recipe, processes=processes), config, weights_of(config), shape)


def memory_of(setting: Setting, config: Phi3VConfig, weights: Sequence[Weight], shape: Shape) -> Memory:
    """As [`estimate_memory`], for a setting that no recipe needs to hold; `weights` from [`weights_of`]."""
    step = Step(setting, config, weights, shape)
    fixed = step.weights_stored()
    if setting.lora:
        fixed["LoRA (float32)"] = 4 * step.trained // step.shares
    fixed[f"optimiser ({setting.optimiser})"] = step.optimiser()
    moments = step.moments()
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {**fixed, **moments[moment]}
    if setting.cuda:
        parts["fragmentation"] = round(FRAGMENTATION * sum(moments[moment].values()))
        parts["CUDA context"] = CONTEXT
    return Memory(parts, moment, shape)


class Step:
    """The moments of one training step, and what lives in each."""

    def __init__(self, setting: Setting, config: Phi3VConfig, weights: Sequence[Weight], shape: Shape):
        self.setting, self.config, self.weights, self.shape = setting, config, weights, shape
        own = str(config.dtype or "float32").removeprefix("torch.")
        self.dtype = own if setting.dtype == "auto" else setting.dtype
        self.stored = DTYPES[self.dtype]
        self.kind = Numerics(
            stored=self.stored,
            autocast=2 if setting.autocast else None,
            quantised=setting.bits is not None,
            full=not setting.lora,
            rank=setting.rank,
            dropout=setting.dropout if setting.lora else 0.0,
            attention=setting.attention,
            padded=shape.padded,
            cuda=setting.cuda,
        )
        self.adapted = adapted_weights(setting, weights)
        self.trained_shapes: list[tuple[int, ...]] = [
            shape for one in self.adapted for shape in ((setting.rank, one.shape[1]), (one.shape[0], setting.rank))
        ]
        if not setting.lora:
            self.trained_shapes = [weight.shape for weight in weights if weight.computed]
        self.trained = sum(map(math.prod, self.trained_shapes))
        self.parts = set(PARTS) if not setting.lora else {weight.part for weight in self.adapted}
        self.n, self.width = shape.rows * shape.tokens, config.hidden_size
        self.scored = shape.rows * shape.supervised  # positions that the last layer gives
        self.shares = setting.processes if setting.sharded else 1
        layers = config.num_hidden_layers
        given = layers if setting.checkpointed is None else setting.checkpointed
        self.recomputed = given if setting.checkpointing else 0  # the first ones, see `checkpoint_layers`
        self.keeping = layers - self.recomputed

    def weights_stored(self) -> dict[str, int]:
        """Bytes of the base model's weights, by part and storage."""
        stored: dict[str, int] = {}
        for weight in self.weights:
            few = self.setting.bits is not None and quantised(weight)
            key = f"weights: {weight.part} ({f'{self.setting.bits}-bit' if few else self.dtype})"
            stored[key] = stored.get(key, 0) + stored_bytes(weight, self.setting, self.stored)
        return {key: value // self.shares for key, value in stored.items()}

    def optimiser(self) -> int:
        """Bytes of the optimiser's states."""
        return optimiser_bytes(self.setting.optimiser, self.trained_shapes) // self.shares

    def decoder(self, given: int | None = None) -> Layer:
        """A layer of the decoder; the last one gives `scored` positions."""
        return decoder_layer(
            rows=self.shape.rows,
            tokens=self.shape.tokens,
            hidden=self.width,
            inner=self.config.intermediate_size,
            heads=self.config.num_attention_heads,
            kv_heads=self.config.num_key_value_heads or self.config.num_attention_heads,
            kind=self.kind,
            adapted="language_model" in self.parts and self.setting.lora,
            given=given,
        )

    @property
    def vision_layers(self) -> int:
        return range(self.config.vision_config.num_hidden_layers + 1)[
            (self.config.img_processor or {}).get("layer_idx", -2)
        ]

    @property
    def crops(self) -> int:
        """Crops that CLIP reads in a step: none where their features are cached."""
        return 0 if self.setting.features else self.shape.rows * self.shape.crops

    @property
    def at_once(self) -> int:
        return min(self.crops, self.setting.vision_batch_size or self.crops)

    def patches(self, crops: int) -> int:
        vision = self.config.vision_config
        return crops * ((vision.image_size // vision.patch_size) ** 2 + 1)

    def vision(self, crops: int) -> Layer:
        vision = self.config.vision_config
        return vision_layer(
            patches=self.patches(crops),
            width=vision.hidden_size,
            inner=vision.intermediate_size,
            heads=vision.num_attention_heads,
            kind=self.kind,
            adapted=self.setting.lora,
        )

    def projector_saved(self) -> int:
        """Inputs of both linears and of the GELU between, where the projector or CLIP before it is trained."""
        if not {"projector", "vision_tower"} & self.parts:
            return 0
        image, compute = self.shape.rows * self.shape.image_tokens, self.kind.compute
        merged = 4 * self.config.vision_config.hidden_size
        saved = image * self.width * compute  # GELU's input
        if "projector" in self.parts:
            saved += image * (merged + self.width) * (compute if self.kind.full else self.kind.adapter)
            if self.kind.dropout:
                given = 1 if self.setting.cuda else 4
                saved += image * (merged + self.width) * given
        return saved

    def cast(self, prefix: str = "", *, layers: int = 1, adapters: bool = True) -> int:
        """
        Copies that autocast makes of weights that are not stored as it computes: of one layer of `layers`, or of all
        that start with `prefix`; with `adapters` or without.
        """
        if not self.setting.autocast:
            return 0
        total = sum(
            weight.numel
            for weight in self.weights
            if weight.linear and weight.computed and weight.name.startswith(prefix) and weight.part != "lm_head"
            if self.stored != 2 and not (self.setting.bits and quantised(weight))
        )
        if adapters:
            adapted = [weight for weight in self.adapted if weight.name.startswith(prefix)]
            total += self.setting.rank * sum(sum(weight.shape) for weight in adapted)
        return 2 * total // layers

    def cast_of_keeping(self, *, adapters: bool = True) -> int:
        """Those copies that the graph holds of decoder layers that do not recompute."""
        layers = self.config.num_hidden_layers
        return self.keeping * self.cast("model.language_model.layers.", layers=layers, adapters=adapters)

    def dequantised(self) -> int:
        """The largest 4-bit weight, as it is computed with."""
        if not self.setting.bits:
            return 0
        return self.kind.compute * max(weight.numel for weight in self.weights if quantised(weight))

    def head(self, *, back: bool) -> int:
        """TRL's fused LM head: a tile of logits; in its backward pass also the gradient of hidden states, float32."""
        scored, vocabulary = self.scored, self.config.vocab_size
        rows, columns = min(scored, SCORED_AT_ONCE), min(vocabulary, VOCABULARY_AT_ONCE)
        logits = rows * VOCABULARY_AT_ONCE * self.kind.compute
        if not self.setting.cuda:
            # Without Triton, float32: three numbers for each logit; back, seven and a truth value. Then the gradient is
            # multiplied in float32, for which a CPU copies the head's weight.
            product = 4 * columns * (self.width + rows) if back and self.kind.compute != 4 else 0
            logits += max((29 if back else 12) * rows * columns, product)
        if self.stored != self.kind.compute:
            logits += columns * self.width * self.kind.compute
        if self.setting.cuda:
            logits += scored * self.width * self.stored  # the hidden states that are scored, put together
        return logits + (scored * self.width * 4 if back else 0)

    @property
    def input_grad(self) -> bool:
        """Whether the decoder's first layer gets a gradient for its input: under checkpointing PEFT asks for it."""
        return self.kind.full or self.setting.checkpointing or bool({"projector", "vision_tower"} & self.parts)

    def held(self) -> int:
        """Activations from the decoder's forward pass on: of its layers, the pictures themselves, and masks."""
        shape, layer = self.shape, self.decoder()
        held = self.recomputed * layer.stream + self.pixels()
        held += 2 * self.n * self.width // self.config.num_attention_heads * self.stored  # positions' cosines and sines
        if self.keeping:
            held += (self.keeping - 1) * layer.saved + self.decoder(self.scored).saved
        if not self.input_grad:
            held -= layer.less
        if self.setting.checkpointing and self.setting.lora:
            held += layer.stream  # the embeddings, which PEFT makes a leaf that gets a gradient
        if self.kind.attention == "sdpa" and shape.padded:
            held += shape.rows * shape.tokens**2
        if self.kind.attention == "eager":
            held += shape.rows * shape.tokens**2 * self.stored
        return held

    def pixels(self) -> int:
        """The batch's local crops, a byte a number; or its image features."""
        shape = self.shape
        if self.setting.features:
            return shape.rows * shape.image_tokens * self.width * min(self.kind.compute, self.stored)
        return shape.rows * max(shape.crops - len(shape.sizes), 0) * 3 * CROP * CROP

    def normalised(self) -> int:
        """All crops as CLIP reads them: float32."""
        return self.crops * 3 * CROP * CROP * 4

    def seen(self) -> int:
        """Activations of CLIP and projector, where these are trained."""
        if "vision_tower" not in self.parts:
            return self.projector_saved()
        vision, checkpointing = self.vision(self.crops), self.setting.checkpointing
        seen = self.vision_layers * (vision.stream if checkpointing else vision.saved) + self.projector_saved()
        if self.kind.full or checkpointing:  # a gradient for what the first layer reads: the norm before it keeps that
            if self.kind.full:  # and crops as they are computed with, for the patch embedding's weight
                return seen + vision.stream + self.normalised() * self.kind.compute // 4
            return seen + 2 * vision.stream
        return seen - vision.less

    def last_norm(self) -> int:
        """What the norm after the last layer keeps, and its output."""
        stream = self.scored * self.width * self.stored
        return self.scored * self.width * 4 + (2 if self.kind.full else 1) * stream

    def kept(self) -> int:
        """Everything but weights that lives from the forward to the backward pass."""
        # Of what is cast, checkpointing leaves the projector's, which is in none of its layers.
        casts = self.cast("model.multi_modal_projector.") if "projector" in self.parts else 0
        casts = casts + self.cast_of_keeping() if self.setting.checkpointing else self.cast()
        return self.held() + self.seen() + self.last_norm() + casts

    def moments(self) -> dict[str, dict[str, int]]:
        """What there is beside weights, adapters and optimiser, at each moment that can be the fullest."""
        setting, last = self.setting, self.decoder(self.scored)
        layer = self.decoder() if self.config.num_hidden_layers > 1 else last
        # The last layer is computed again only where all are; that before it, which is larger, where but one is not.
        # Further back, a layer that recomputes takes the place of the one after it, which is gone: no moment in between
        # is fuller than both these and the first layer's.
        again = 0 if self.keeping else last.saved
        before_it = (layer.saved if self.keeping < 2 else 0) - (last.saved if self.keeping else last.stream)
        held, seen, stream = self.held(), self.seen(), self.n * self.width * self.stored
        given = self.scored * self.width * self.stored
        decoder = self.cast("model.language_model.layers.", layers=self.config.num_hidden_layers)
        gradients = 4 * self.trained // self.shares
        buckets = gradients if setting.processes > 1 and not setting.sharded else 0  # DDP sends copies
        before = buckets + (gradients if setting.accumulation > 1 else 0)
        # The passes before have made all of them; else those of embeddings come last, and CLIP's before these.
        late = 0 if setting.accumulation > 1 else self.gradients_of("model.language_model.embed_tokens.")
        later = 0 if setting.accumulation > 1 else self.gradients_of("model.vision_tower.")
        after = buckets + gradients
        product = self.largest_product()
        extra = {"gathered layers": self.gathered()} if setting.sharded else {}
        weight = {"dequantised weight": self.dequantised()} if setting.bits else {}

        def moment(activations: int, casts: int, grads: int) -> dict[str, int]:
            return {"activations": activations, "casts by autocast": casts, "gradients": grads, **extra}

        every = self.cast()
        projector = self.cast("model.multi_modal_projector.") if "projector" in self.parts else 0
        # Until the forward pass is over, autocast keeps its copies of what is trained, checkpointing or not.
        adapters = projector + 2 * self.trained + self.cast_of_keeping(adapters=False)
        cached = every if self.kind.full or not setting.checkpointing else adapters
        graph = projector + self.cast_of_keeping() if setting.checkpointing else every
        # A loss over an lm_head that is trained makes that gradient first, beside the one of the passes before.
        head = 4 * self.config.vocab_size * self.width // self.shares if self.kind.full else 0
        reads = {} if setting.features else {"CLIP reads": moment(self.reading(), 0, before)}
        found = {
            **reads,
            "loss": moment(held + seen + self.last_norm() + given, cached, before) | {"logits": self.head(back=False)},
            "loss backwards": moment(held + seen + self.last_norm() + 2 * given, graph, before + head)
            | {"logits": self.head(back=True)},
            "last layer back": moment(
                held + seen + again + last.working + stream + product,
                graph if self.keeping else decoder,
                before + head,
            )
            | weight,
            "last but one layer back": moment(
                held + seen + before_it + layer.working + stream + product,
                max(graph, decoder),
                before + head,
            )
            | weight,
            "first layer back": moment(
                self.pixels() + seen + layer.saved + layer.working + stream + product,
                decoder,
                after - late - later,
            )
            | weight,
            "embeddings back": moment(self.pixels(), 0, after),
            "optimiser step": moment(0, 0, after + (gradients if setting.optimiser == "adamw_torch" else 0)),
        }
        if "vision_tower" in self.parts:
            vision, few = self.vision(self.crops), self.vision(self.at_once)
            again = few.saved if setting.checkpointing else 0
            one = self.cast("model.vision_tower.", layers=self.vision_layers)
            found["CLIP's last layer back"] = moment(
                self.pixels() + seen + again + few.working + product,
                one if setting.checkpointing else self.cast("model.vision_tower."),
                after - late - later,
            )
            found["CLIP's first layer back"] = moment(
                self.pixels() + vision.stream + few.saved + few.working + product, one, after - late
            )
        return found

    def reading(self) -> int:
        """While CLIP and projector read, and of the decoder only the embeddings are there."""
        vision, kind = self.config.vision_config, self.kind.without_quantisation()
        width, image = vision.hidden_size, self.shape.rows * self.shape.image_tokens
        clip = vision_forward(
            crops=self.at_once,
            patches=self.patches(1),
            width=width,
            inner=vision.intermediate_size,
            heads=vision.num_attention_heads,
            kind=kind,
        )
        read = self.patches(self.crops - self.at_once) * width * self.stored  # what CLIP gave for other crops
        merged = self.patches(self.crops) * width * self.stored
        # Arranged merged patches, and what the first linear and its GELU make of them.
        projector = merged + image * (4 * width * self.stored + 2 * self.width * kind.compute)
        embeddings = self.n * self.width * self.stored
        return embeddings + self.pixels() + self.normalised() + max(read + clip, projector)

    def largest_product(self) -> int:
        """The gradient of the largest linear as it is computed, before it is added to the others."""
        if not self.kind.full:
            return 0
        linears = [weight.numel for weight in self.weights if weight.linear and weight.part != "lm_head"]
        return self.kind.compute * max(linears)

    def gradients_of(self, prefix: str) -> int:
        """Bytes of the gradients of what starts with `prefix`, on one GPU."""
        if self.setting.lora:
            found = [weight for weight in self.adapted if weight.name.startswith(prefix)]
            return 4 * self.setting.rank * sum(sum(weight.shape) for weight in found) // self.shares
        found = [weight for weight in self.weights if weight.computed and weight.name.startswith(prefix)]
        return 4 * sum(weight.numel for weight in found) // self.shares

    def gathered(self) -> int:
        """Two decoder layers put together from their shards: the one at work and the next."""
        decoder = [weight for weight in self.weights if weight.name.startswith("model.language_model.layers.")]
        total = sum(stored_bytes(weight, self.setting, self.kind.compute) for weight in decoder)
        return 2 * total // self.config.num_hidden_layers
