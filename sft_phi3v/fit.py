"""Does it fit this GPU, how long does an epoch take, what does it cost, and what would make it fit.

What a step takes is `estimate`'s; here it is held against a small table of GPUs, and against the same recipe with other
keys. `docs/fit.md` has the figures and where they are from.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from sft_phi3v.estimate import (
    GB,
    Memory,
    Setting,
    Shape,
    Step,
    Weight,
    estimate_memory,
    memory_of,
    optimiser_bytes,
    quantised,
    stored_bytes,
    weights_of,
)
from sft_phi3v.model import PARTS
from sft_phi3v.phi3_v import Phi3VConfig
from sft_phi3v.recipe import Recipe

# Memory that is to be left over where the estimate alone decides: it was not compared with a GPU's allocator and
# kernels yet, its fragmentation is assumed, and evaluation by generation needs some beside what training keeps.
MARGIN = 0.1


@dataclass(frozen=True)
class GPU:
    """
    What is public about a GPU.

    Args:
        memory (`float`): GiB, as CUDA reports them, rounded down.
        tflops (`float`): Peak of dense matrix products in bfloat16 (float16, where `bf16` is false), in TFLOP/s.
        bandwidth (`float`): GB/s that its memory is read and written with, at most.
        price (`float`): Dollars per hour: an example of what it is rented out for on demand, to be overridden.
        bf16 (`bool`): Whether it has bfloat16.
    """

    memory: float
    tflops: float
    bandwidth: float
    price: float
    bf16: bool = True

    @property
    def bytes(self) -> int:
        return round(self.memory * 2**30)


GPUS = {
    "T4": GPU(14.5, 65, 300, 0.35, bf16=False),
    "V100": GPU(15.7, 125, 900, 0.60, bf16=False),
    "L4": GPU(22.0, 121, 300, 0.70),
    "A10G": GPU(22.0, 70, 600, 1.00),
    "RTX 3090": GPU(23.5, 71, 936, 0.25),
    "RTX 4090": GPU(23.5, 165, 1008, 0.40),
    "A100-40": GPU(39.3, 312, 1555, 1.30),
    "L40S": GPU(44.3, 362, 864, 1.10),
    "A100-80": GPU(79.1, 312, 2039, 1.80),
    "H100": GPU(79.1, 989, 3350, 3.00),
    "H200": GPU(139.7, 989, 4800, 3.80),
}


def find_gpu(name: str) -> tuple[str, GPU]:
    """The GPU of the table that is meant, in any letter case; a `ValueError` if there is none."""
    plain = {re.sub(r"[^a-z0-9]", "", known.lower()): known for known in GPUS}
    given = re.sub(r"[^a-z0-9]|nvidia|geforce|gb$", "", name.lower())
    given = {"a100": "a10040"}.get(given, given)
    if given not in plain:
        raise ValueError(f"`gpu` is {name!r}, expected one of {', '.join(GPUS)}.")
    return plain[given], GPUS[plain[given]]


def flops_per_row(setting: Setting, config: Phi3VConfig, weights: Sequence[Weight], shape: Shape) -> float:
    """
    Floating-point operations of training on one row.

    Args:
        setting ([`Setting`]): Adapters or all weights; activation checkpointing, of which layers.
        config ([`Phi3VConfig`]): Sizes.
        weights (sequence of [`Weight`]): From [`weights_of`].
        shape ([`Shape`]): Its `tokens`, `image_tokens`, `crops` and `supervised` are those of the row.

    Returns:
        `float`: A product of matrices and its sum count as two.
    """
    step, vision = Step(setting, config, weights, shape), config.vision_config
    numbers = dict.fromkeys(PARTS, 0)
    for weight in weights:
        if weight.linear and weight.computed:
            numbers[weight.part] += weight.numel
    each, crops = step.patches(1), 0 if setting.features else shape.crops
    layers = config.num_hidden_layers
    clip = 2 * numbers["vision_tower"] + 4 * each * vision.hidden_size * step.vision_layers  # per patch
    # Scores and sums of values: half of tokens × tokens, since nobody looks ahead.
    layer = 2 * numbers["language_model"] // layers * shape.tokens + 2 * shape.tokens**2 * config.hidden_size
    mlp = 2 * 3 * config.hidden_size * config.intermediate_size
    last = layer - mlp * (shape.tokens - shape.supervised)  # of which the last layer runs on supervised tokens only
    forward = {
        "language_model": (layers - 1) * layer + last,
        "projector": 0 if setting.features else 2 * numbers["projector"] * shape.image_tokens,
        "vision_tower": crops * each * clip,
        "lm_head": 2 * numbers["lm_head"] * shape.supervised,
    }
    again = 1 if setting.checkpointing else 0
    recomputed = min(step.recomputed, layers - 1) * layer + (0 if step.keeping else last)
    back = 2 if step.kind.full else 1  # gradients of inputs, and of weights
    times = {"language_model": 1 + recomputed / forward["language_model"] + back}
    times["lm_head"] = 2.0 + back  # TRL computes logits twice
    trained = "vision_tower" in step.parts
    times["vision_tower"] = 1 + again + back if trained else 1
    times["projector"] = 1 + back if trained or "projector" in step.parts else 1
    return float(sum(forward[part] * times[part] for part in PARTS))


def dequantised_bytes(setting: Setting, config: Phi3VConfig, weights: Sequence[Weight]) -> float:
    """
    Bytes that one batch moves to make numbers of 4-bit weights again: each time that a linear is computed its weight is
    read, with its scales, and written as it is computed with. Forward, backward, and where a layer recomputes.

    Args:
        setting ([`Setting`]): Quantisation; activation checkpointing, of which layers.
        config ([`Phi3VConfig`]): Sizes.
        weights (sequence of [`Weight`]): From [`weights_of`].

    Returns:
        `float`: Bytes; 0 where nothing is quantised in 4 bits. The matrix product reads what is written in any case.
    """
    if setting.bits != 4:
        return 0.0
    step = Step(setting, config, weights, Shape(1, 1, 0, 0, 1))
    few = [weight for weight in weights if quantised(weight)]
    once = sum(stored_bytes(weight, setting, step.stored) + step.kind.compute * weight.numel for weight in few)
    return once * (2 + step.recomputed / config.num_hidden_layers)


@dataclass(frozen=True)
class Epoch:
    """Optimiser steps, seconds and dollars of one epoch."""

    steps: int
    seconds: float
    dollars: float


def epoch_of(
    setting: Setting,
    flops: float,
    rows: int,
    gpu: GPU,
    *,
    efficiency: float,
    price: float | None = None,
    batches: int | None = None,
    moved: float = 0.0,
) -> Epoch:
    """
    How long an epoch takes, and what it costs.

    Args:
        setting ([`Setting`]): Rows per step, and how many GPUs.
        flops (`float`): Per row, from [`flops_per_row`].
        rows (`int`): Rows of an epoch.
        gpu ([`GPU`]): What it runs on.
        efficiency (`float`): Share of the GPU's peak that is reached.
        price (`float`, *optional*): Dollars per hour and GPU; else the table's.
        batches (`int`, *optional*): Of an epoch on all GPUs, where these are planned.
        moved (`float`, *optional*, defaults to `0.0`): Bytes per batch, from [`dequantised_bytes`].

    Returns:
        [`Epoch`]: Of training alone: no evaluation, no start.
    """
    each = -(-(-(-rows // setting.rows) if batches is None else batches) // setting.processes)
    steps = -(-each // setting.accumulation)
    seconds = rows * flops / (gpu.tflops * 1e12 * efficiency * setting.processes)
    seconds += each * moved / (gpu.bandwidth * GB)
    return Epoch(steps, seconds, seconds / 3600 * (gpu.price if price is None else price) * setting.processes)


def fits_well(memory: int, available: int) -> bool:
    """Whether an estimate leaves the margin of what there is."""
    return memory <= (1 - MARGIN) * available


def by_layers(setting: Setting, config: Phi3VConfig, weights: Sequence[Weight], shape: Shape) -> list[Memory]:
    """What a step takes with no layer checkpointed, with one, …, with all."""
    counts = range(config.num_hidden_layers + 1)
    return [memory_of(replace(setting, checkpointed=count), config, weights, shape) for count in counts]


def fewest(memories: Sequence[Memory], available: int) -> int:
    """The fewest checkpointed layers with which a step fits well; all, if it never does. Of [`by_layers`]."""
    return next((count for count, found in enumerate(memories) if fits_well(found.total, available)), len(memories) - 1)


def settle_layers(
    recipe: Recipe, config: Phi3VConfig, shape: Shape, available: int, *, processes: int = 1
) -> tuple[Recipe, str]:
    """
    Makes a number of `checkpointed_layers: auto`.

    Args:
        recipe ([`Recipe`]): The recipe.
        config ([`Phi3VConfig`]): Of its base model.
        shape ([`Shape`]): Its largest batch.
        available (`int`): Bytes to fit into.
        processes (`int`, *optional*, defaults to `1`): GPUs.

    Returns:
        `tuple[Recipe, str]`: The recipe, whose `settings` still say auto: another device may take another number; and
        a line that says what was chosen.

    Raises:
        ValueError: If nothing is known about the recipe's optimiser.
    """
    try:
        memories = by_layers(Setting.of(recipe, processes=processes), config, weights_of(config), shape)
    except ValueError as error:
        raise ValueError(f"`checkpointed_layers: auto` is by estimate: {error} Or write a number of layers.") from None
    count = fewest(memories, available)
    settled = replace(recipe, task=replace(recipe.task, checkpointed_layers=count))
    return settled, _layers_line(count, memories, available)


def _layers_line(count: int, memories: Sequence[Memory], available: int) -> str:
    memory, layers = memories[count].total, len(memories) - 1
    short = "" if fits_well(memory, available) else f", which leaves less than {MARGIN:.0%} over"
    return (
        f"checkpointing: {count} of {layers} decoder layers recompute; estimated {memory / GB:.1f} of "
        f"{available / GB:.1f} GB{short}"
    )


@dataclass(frozen=True)
class Remedy:
    """A change of recipe keys, the peak that it leads to, and how many bytes less that is."""

    change: str
    memory: Memory
    saved: int


def remedies(
    recipe: Recipe, config: Phi3VConfig, shape: Shape, *, processes: int = 1, available: int | None = None
) -> list[Remedy]:
    """
    What would make a recipe take less memory, what helps most first.

    Args:
        recipe ([`Recipe`]): The recipe.
        config ([`Phi3VConfig`]): Of its base model.
        shape ([`Shape`]): Its largest batch.
        processes (`int`, *optional*, defaults to `1`): GPUs.
        available (`int`, *optional*): Bytes to fit into. Then the last remedy is a combination that does, if any is.

    Returns:
        `list[Remedy]`: Each change alone, by what it saves; then, where `available` is given and no change alone is
        enough, the first combination of them, taken in this order, that fits.
    """
    setting, weights = Setting.of(recipe, processes=processes), weights_of(config)
    now = memory_of(setting, config, weights, shape).total
    found = []
    changes = _changes(setting, config, shape)
    for change, other, batch in changes:
        memory = memory_of(other(setting), config, weights, batch(shape))
        if memory.total < now:
            found.append((Remedy(change, memory, now - memory.total), other, batch))
    found.sort(key=lambda one: -one[0].saved)
    alone = [one for one, *_ in found]
    if available is None or now <= available or any(one.memory.total <= available for one in alone):
        return alone
    names: list[str] = []
    for one, other, batch in found:
        setting, shape = other(setting), batch(shape)
        names.append(one.change)
        memory = memory_of(setting, config, weights, shape)
        if memory.total <= available:
            return [*alone, Remedy(" and ".join(names), memory, now - memory.total)]
    return alone


Change = tuple[str, Callable[[Setting], Setting], Callable[[Shape], Shape]]


def _changes(setting: Setting, config: Phi3VConfig, shape: Shape) -> list[Change]:
    """Every change that a recipe can make and this one has not made."""

    def same(batch: Shape) -> Shape:
        return batch

    made: list[Change] = []
    if not setting.checkpointing:
        made.append(("activation_checkpointing: true", lambda one: replace(one, checkpointing=True), same))
    elif setting.checkpointed is not None and setting.checkpointed < config.num_hidden_layers:
        every = config.num_hidden_layers
        made.append((f"checkpointed_layers: {every}", lambda one: replace(one, checkpointed=every), same))
    if setting.budget is not None:
        if shape.rows > 1:
            rows, most = -(-shape.rows // 2), max(-(-setting.budget // 2), shape.tokens)
            made.append(
                (
                    f"max_tokens_per_batch: {most} with gradient_accumulation_steps: {setting.accumulation * 2}",
                    lambda one: replace(one, budget=most, accumulation=2 * one.accumulation),
                    lambda batch: replace(batch, rows=rows, padded=rows > 1 and batch.padded),
                )
            )
    elif setting.rows > 1:
        rows, passes = setting.rows // 2, setting.accumulation * 2
        made.append(
            (
                f"per_device_train_batch_size: {rows} with gradient_accumulation_steps: {passes}",
                lambda one: replace(one, rows=rows, accumulation=passes),
                lambda batch: replace(batch, rows=rows, padded=rows > 1 and batch.padded),
            )
        )
    for crops in (4, 1):
        # With a budget of tokens, shorter rows only make batches of more rows.
        if setting.budget is None and shape.sizes and shape.with_crops(crops).tokens < shape.tokens:
            made.append((f"num_crops: {crops}", lambda one: one, partial(Shape.with_crops, num_crops=crops)))
            break
    if setting.lora and setting.bits is None:
        made.append(("load_in_4bit: true", lambda one: replace(one, bits=4, nested=True), same))
    elif setting.lora and setting.bits == 4 and not setting.nested:
        made.append(("use_bnb_nested_quant: true", lambda one: replace(one, nested=True), same))
    elif not setting.lora:
        made.append(
            (
                "use_peft: true with load_in_4bit: true and dtype: bfloat16",
                lambda one: replace(one, lora=True, bits=4, nested=True, dtype="bfloat16"),
                same,
            )
        )
    if optimiser_bytes(setting.optimiser, [(1 << 20,)]) > optimiser_bytes("paged_adamw_8bit", [(1 << 20,)]):
        made.append(("optim: paged_adamw_8bit", lambda one: replace(one, optimiser="paged_adamw_8bit"), same))
    if setting.lora and setting.rank > 8:
        rank = max(8, setting.rank // 2)
        made.append((f"lora_r: {rank}", lambda one: replace(one, rank=rank), same))
    crops = shape.rows * shape.crops
    if not setting.features and min(crops, setting.vision_batch_size or crops) > 8:
        made.append(("vision_batch_size: 8", lambda one: replace(one, vision_batch_size=8), same))
    if setting.attention == "eager":
        made.append(("attn_implementation: sdpa", lambda one: replace(one, attention="sdpa"), same))
    if setting.processes > 1 and not setting.sharded:
        made.append(("FSDP (accelerate_configs)", lambda one: replace(one, sharded=True), same))
    return made


def oom_message(
    recipe: Recipe, config: Phi3VConfig, shape: Shape, available: int | None = None, *, processes: int = 1
) -> str:
    """
    What to say where a GPU's memory was not enough: the three settings that help most, and by how much.

    Args:
        recipe ([`Recipe`]): The recipe that ran.
        config ([`Phi3VConfig`]): Of its base model.
        shape ([`Shape`]): Its largest batch.
        available (`int`, *optional*): Bytes of the GPU.
        processes (`int`, *optional*, defaults to `1`): GPUs.

    Returns:
        `str`: The message.
    """
    memory = estimate_memory(recipe, config, shape, processes=processes)
    found = remedies(recipe, config, shape, processes=processes, available=available)
    holds = "" if available is None else f" of {available / GB:.1f} GB"
    lines = [
        f"The GPU's memory{holds} was not enough: a step of this recipe takes some {memory.total / GB:.1f} GB "
        f"(estimated for {_counted(shape.rows, 'row')} of {shape.tokens:,} tokens). What helps most:"
    ]
    return "\n".join([*lines, *_remedy_lines(found, available)])


def _remedy_lines(found: Sequence[Remedy], available: int | None) -> list[str]:
    found = [one for one in found if one.saved >= (one.memory.total + one.saved) / 100]
    combined = found[3:] and " and " in found[-1].change
    shown = [*found[:3], *(found[-1:] if combined else [])]
    lines = []
    for one in shown:
        enough = " (fits)" if available is not None and one.memory.total <= available else ""
        lines.append(f"  {one.change}: {one.saved / GB:.1f} GB less, {one.memory.total / GB:.1f} GB{enough}")
    return lines or ["  nothing that a recipe can say: take a larger GPU, or shorter rows."]


def fit_report(
    recipe: Recipe,
    config: Phi3VConfig,
    shape: Shape,
    typical: Shape,
    rows: int,
    *,
    gpu: str | None = None,
    price: float | None = None,
    processes: int = 1,
    batches: int | None = None,
) -> str:
    """
    The estimate for people: part by part, against a GPU's memory, and what an epoch takes.

    Args:
        recipe ([`Recipe`]): The recipe.
        config ([`Phi3VConfig`]): Of its base model.
        shape ([`Shape`]): Its largest batch, which decides about memory.
        typical ([`Shape`]): Its mean batch, which decides about time.
        rows (`int`): Rows to train on.
        gpu (`str`, *optional*): A GPU of [`GPUS`]; else the one of this machine, or if there is none, all of them.
        price (`float`, *optional*): Dollars per hour and GPU; else the table's.
        processes (`int`, *optional*, defaults to `1`): GPUs.
        batches (`int`, *optional*): Of an epoch on all GPUs, where these are planned.

    Returns:
        `str`: A table.

    Raises:
        ValueError: If no such GPU is known.
    """
    name, found, size = _named_or_visible(gpu)
    setting = Setting.of(recipe, processes=processes)
    fit = _Fit(recipe, config, weights_of(config), setting, shape, typical, rows, price, batches)
    setting, memory, line = fit.on(size)
    batch = f"{_counted(shape.rows, 'row')} of {shape.tokens:,} tokens and {_counted(shape.crops, 'crop')}"
    lines = [f"memory{' per GPU' * setting.cuda}, estimated for {batch}:"]
    for part, count in memory.parts.items():
        if count >= 0.005 * GB:
            lines.append(f"  {part:<44} {count / GB:>7.2f} GB")
    lines.append(f"  {'peak (' + memory.moment + ')':<44} {memory.total / GB:>7.2f} GB")
    everywhere = gpu is None and size is None and setting.cuda
    if size is not None:
        fits = memory.total <= size
        lines.append(f"{'✓ fits' if fits else '✗ does not fit'} {name}, by this estimate: {size / GB:.1f} GB")
        lines += [line] if line else []
        if not fits:
            lines += ["What helps most:"]
            lines += _remedy_lines(remedies(recipe, config, shape, processes=processes, available=size), size)
    names = [name] if found is not None else list(GPUS) if everywhere else []
    for one in names:
        lines.append(f"  {fit.line(one, everywhere=everywhere)}")
    if size is not None and found is not None and (unquantised := fit.unquantised(found, size)):
        lines.append(unquantised)
    if names:
        lines.append(
            f"Times are for rows of {typical.tokens:,} tokens, the mean, at {recipe.preview.efficiency:.0%} of the "
            "GPU's peak; see docs/fit.md."
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class _Fit:
    """A recipe with its rows, to be held against several GPUs."""

    recipe: Recipe
    config: Phi3VConfig
    weights: Sequence[Weight]
    setting: Setting
    shape: Shape
    typical: Shape
    rows: int
    price: float | None
    batches: int | None

    @cached_property
    def memories(self) -> list[Memory]:
        return by_layers(self.setting, self.config, self.weights, self.shape)

    def on(self, size: int | None) -> tuple[Setting, Memory, str]:
        """The setting where there is so much memory, what it takes, and what `checkpointed_layers: auto` chooses."""
        if size is None or self.recipe.task.checkpointed_layers != "auto":
            return self.setting, memory_of(self.setting, self.config, self.weights, self.shape), ""
        memories = self.memories
        count = fewest(memories, size)
        return replace(self.setting, checkpointed=count), memories[count], _layers_line(count, memories, size)

    def epoch(self, setting: Setting, gpu: GPU) -> Epoch:
        return epoch_of(
            setting,
            flops_per_row(setting, self.config, self.weights, self.typical),
            self.rows,
            gpu,
            efficiency=self.recipe.preview.efficiency,
            price=self.price,
            batches=self.batches,
            moved=dequantised_bytes(setting, self.config, self.weights),
        )

    def line(self, name: str, *, everywhere: bool) -> str:
        """An epoch on a GPU of the table: and where all of them are shown, its memory."""
        gpu = GPUS[name]
        setting, memory, chosen = self.on(gpu.bytes)
        epoch = self.epoch(setting, gpu)
        hourly = gpu.price if self.price is None else self.price
        note = "" if gpu.bf16 or not self.recipe.training.bf16 else "; no bfloat16: --bf16 false --fp16 true"
        mark = ""
        if everywhere:
            mark = f"{'✓' if memory.total <= gpu.bytes else '✗'} {name:<9} {gpu.bytes / GB:>6.1f} GB; "
            note += f"; {setting.checkpointed} layers recompute" if chosen else ""
        return (
            f"{mark}an epoch of {epoch.steps:,} steps: {_time(epoch.seconds)}, "
            f"${epoch.dollars:,.2f} at ${hourly:.2f} an hour and GPU{note}"
        )

    def unquantised(self, gpu: GPU, size: int) -> str:
        """What to say where 4-bit weights save memory that nothing needs, and cost time; else nothing."""
        if self.setting.bits != 4 or not self.setting.cuda:
            return ""
        other = replace(self, setting=replace(self.setting, bits=None, nested=False))
        setting, memory, _ = other.on(size)
        saved = self.epoch(self.on(size)[0], gpu).seconds - self.epoch(setting, gpu).seconds
        if not fits_well(memory.total, size) or saved <= 0:
            return ""
        return (
            f"4 bits are not needed here: with `load_in_4bit: false` estimated {memory.total / GB:.1f} of "
            f"{size / GB:.1f} GB, and an epoch at least {_time(saved)} shorter, since nothing is dequantised."
        )


def _named_or_visible(gpu: str | None) -> tuple[str, GPU | None, int | None]:
    """Name, entry of the table and bytes of the GPU that is asked about, as far as there are any."""
    if gpu is not None:
        name, found = find_gpu(gpu)
        return name, found, found.bytes
    if not torch.cuda.is_available():
        return "", None, None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        name, found = find_gpu(properties.name)
    except ValueError:
        return properties.name, None, properties.total_memory
    return name, found, properties.total_memory


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
