"""Processor, (4-bit) base model and LoRA targets; and what landed where. The only file that knows bitsandbytes.

What is quantised: the language model's linears. What never is: the vision tower, the projector, the embeddings and
`lm_head` (TRL reads its weight directly). What is adapted: the parts that the recipe's `adapt` names. Both are counted
on the model itself and printed before training, because the usual options miss without a word: LoRA on
`[q_proj, v_proj]` puts 48 adapters into CLIP and none into the language model, whose linears are fused.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import torch
import yaml
from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm
from transformers.utils import cached_file
from trl import ModelConfig, get_peft_config, get_quantization_config

from sft_phi3v.phi3_v import SDPA_BY_ROW, Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from sft_phi3v.recipe import Recipe

# Names as dotted paths from the root; a list replaces transformers' own default, so lm_head must be among them.
NEVER_QUANTISED = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
QUANTISATION = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")

PARTS = {
    "language_model": "model.language_model.",
    "projector": "model.multi_modal_projector.",
    "vision_tower": "model.vision_tower.",
    "lm_head": "lm_head",
}


def load_config(recipe: Recipe) -> Phi3VConfig:
    """
    Reads the base model's configuration, and nothing else of it.

    Args:
        recipe ([`Recipe`]): Names the model.

    Returns:
        [`Phi3VConfig`]: The configuration.

    Raises:
        ValueError: If there is no such model, or it is not a Phi-3-Vision.
    """
    name = recipe.model.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(name, revision=recipe.model.model_revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path: {name!r} cannot be read: {first_line(error)} Expected a folder with "
            "config.json, or a Hub id (and a network, or the model in the local cache)."
        ) from error
    if not isinstance(config, Phi3VConfig):
        raise ValueError(
            f"model_name_or_path: {name!r} is a {config.model_type!r} model, expected 'phi3_v' (Phi-3-vision or "
            "Phi-3.5-vision, or one fine-tuned from them)."
        )
    layers, given = config.num_hidden_layers, recipe.task.checkpointed_layers
    if isinstance(given, int) and given > layers:
        raise ValueError(f"`checkpointed_layers` is {given}, expected 0 to {layers}: the decoder has {layers} layers.")
    return config


def base_file(recipe: Recipe, name: str) -> Path | None:
    """A file of the base model, from its folder, the local cache or the Hub; `None` if there is none to be had."""
    found = cached_file(
        str(recipe.model.model_name_or_path),
        name,
        revision=recipe.model.model_revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def load_processor(recipe: Recipe) -> Phi3VProcessor:
    """The base model's processor, with the recipe's `num_crops`."""
    load_config(recipe)  # says clearly what is wrong with the name
    return Phi3VProcessor.from_pretrained(
        recipe.model.model_name_or_path, revision=recipe.model.model_revision, num_crops=recipe.task.num_crops
    )


def load_model(
    recipe: Recipe,
    folder: str | None = None,
    *,
    revision: str | None = None,
    quantised: bool = True,
    kernels: bool = False,
) -> Phi3VForCausalLM:
    """
    Loads the base model, quantised as the recipe says, and checks that the weights were all there.

    Args:
        recipe ([`Recipe`]): Names the model, its dtype, quantisation and attention.
        folder (`str`, *optional*): Loads these weights instead, as a full fine-tuning leaves them.
        revision (`str`, *optional*): Commit of the base model, where the recipe's `model_revision` has moved on.
        quantised (`bool`, *optional*, defaults to `True`): `False` loads the weights as they were published.
        kernels (`bool`, *optional*, defaults to `False`):
            Fused kernels from the Hub. Not read from the recipe: what scores, merges or publishes is to compute the
            same everywhere.

    Returns:
        [`Phi3VForCausalLM`]: The base model, without adapter.

    Raises:
        ValueError: If the folder lacks weights of the model.
    """
    load_config(recipe)
    # TRL and PEFT still ask under the name that transformers has moved on from.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    dtype = recipe.model.dtype
    model, loading = Phi3VForCausalLM.from_pretrained(
        folder or recipe.model.model_name_or_path,
        revision=None if folder else revision or recipe.model.model_revision,
        dtype=dtype if dtype in ("auto", None) else getattr(torch, dtype),
        attn_implementation=_attention(recipe),
        quantization_config=quantization_config(recipe) if quantised else None,
        # Left alone, transformers puts a quantised model on the GPU, whatever the trainer does.
        device_map={"": "cpu"} if recipe.training.use_cpu else None,
        output_loading_info=True,
        use_kernels=kernels,
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"model_name_or_path: {recipe.model.model_name_or_path!r} lacks {len(missing)} tensors, such as "
            f"{missing[0]!r}: they would start from random numbers. The download may be incomplete."
        )
    model.model.vision_batch_size = recipe.task.vision_batch_size
    return model


def _attention(recipe: Recipe) -> str | None:
    given: str | None = recipe.model.attn_implementation
    return SDPA_BY_ROW if recipe.padding_free and given in (None, "sdpa") else given


def load_trained(recipe: Recipe, folder: Path, *, quantised: bool = True) -> PeftModel | Phi3VForCausalLM:
    """
    Loads what a run trained: the adapter on the base model that it records, or the whole model of a full fine-tuning.

    Args:
        recipe ([`Recipe`]): The recipe of the run.
        folder (`Path`): Holds the adapter, or the weights.
        quantised (`bool`, *optional*, defaults to `True`):
            Whether the base model is quantised, as it was in training. If not, the adapter meets other weights.

    Returns:
        `PeftModel` or [`Phi3VForCausalLM`]: The model, on its device, for inference.
    """
    if not (folder / "adapter_config.json").is_file():
        return on_device(load_model(recipe, str(folder))).eval()
    record = PeftConfig.from_pretrained(folder)
    base = on_device(load_model(recipe, revision=record.revision, quantised=quantised))
    return PeftModel.from_pretrained(base, folder).eval()


def load_named(recipe: Recipe, name: str) -> tuple[PeftModel | Phi3VForCausalLM, Phi3VProcessor]:
    """
    Loads any model to score it: a base model, an adapter on the base model that it records, or a merged model.

    Args:
        recipe ([`Recipe`]): Says in which dtype, and how many crops. Its own base model is quantised as it says, an
            adapter's as the recipe beside the adapter says, and others are not.
        name (`str`): Folder or Hub id.

    Returns:
        `tuple[PeftModel | Phi3VForCausalLM, Phi3VProcessor]`: The model, on its device, for inference; its processor.

    Raises:
        ValueError: If there is no such model.
    """
    adapter = find_model(name, key="model")
    source = name if model_file(name, "tokenizer.json", key="model") else str(recipe.model.model_name_or_path)
    processor = Phi3VProcessor.from_pretrained(source, num_crops=recipe.task.num_crops)
    if same_model(name, str(recipe.model.model_name_or_path)):
        return on_device(load_model(recipe)).eval(), processor
    if adapter is None:
        other = replace(recipe.model, model_name_or_path=name, model_revision="main")
        return on_device(load_model(replace(recipe, model=other), quantised=False)).eval(), processor
    record = json.loads(adapter.read_text(encoding="utf-8"))
    beside = model_file(name, "recipe.yaml", key="model")
    if beside is None:
        raise ValueError(
            f"`model` is {name!r}, an adapter without recipe.yaml: nothing says how its base model was quantised. Put "
            "the recipe of its training there."
        )
    # Not by load_recipe: another SFTConfig would reset what Accelerate knows of the processes.
    keys, defaults = yaml.safe_load(beside.read_text(encoding="utf-8")), ModelConfig()
    quantisation = {key: keys.get(key, getattr(defaults, key)) for key in QUANTISATION}
    other = replace(recipe.model, model_name_or_path=record["base_model_name_or_path"], **quantisation)
    base = on_device(load_model(replace(recipe, model=other), revision=record.get("revision")))
    return PeftModel.from_pretrained(base, name).eval(), processor


def find_model(name: str, *, key: str) -> Path | None:
    """
    The `adapter_config.json` of an adapter, `None` for a whole model; a `ValueError` if there is neither. `key` is what
    the model was given as.
    """
    adapter = model_file(name, "adapter_config.json", key=key)
    if adapter is None and model_file(name, "config.json", key=key) is None:
        raise ValueError(
            f"{key}: {name!r} holds neither adapter_config.json nor config.json. Expected a folder that training or "
            "merging wrote, or a Hub id (and a network, or the model in the local cache)."
        )
    return adapter


def same_model(name: str, other: str) -> bool:
    """Whether two names, of folders or on the Hub, are of one model."""
    return name == other or (Path(name).is_dir() and Path(other).is_dir() and Path(name).samefile(other))


def run_file(folder: Path, name: str) -> Path:
    """A file of the run that a folder belongs to; a checkpoint's lies one folder up."""
    return folder.parent / name if folder.name.startswith("checkpoint-") else folder / name


def model_file(name: str, file: str, *, key: str) -> Path | None:
    """
    A file of a model, from its folder (of a checkpoint, from its run's), the local cache or the Hub; `None` if it has
    none. `key` is what the model was given as, for errors.
    """
    if Path(name).is_dir():
        found = [path for path in (Path(name, file), run_file(Path(name), file)) if path.is_file()]
        return found[0] if found else None
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"{key}: there is no folder {name!r}.")
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    try:
        cached = cached_file(name, file, **{f"_raise_exceptions_for_{what}": False for what in quiet})
    except OSError as error:
        raise ValueError(f"{key}: {name!r} cannot be read: {first_line(error)}") from error
    return None if cached is None else Path(cached)


def on_device(model: Phi3VForCausalLM) -> Phi3VForCausalLM:
    """Quantised models are loaded where they belong; others the trainer would have moved."""
    return model if model.config.to_dict().get("quantization_config") else model.to(PartialState().device)


def quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """TRL's quantisation settings, kept away from the modules that must stay as they are."""
    config = get_quantization_config(recipe.model)
    if config is not None:
        config.llm_int8_skip_modules = NEVER_QUANTISED
        if recipe.training.use_cpu:
            _keep_4bit_trainable_on_cpu()
    return config


def _keep_4bit_trainable_on_cpu() -> None:
    # With AVX512-BF16, the first evaluation repacks every 4-bit weight in place for an inference kernel that has no
    # gradient: training goes on afterwards without one, silently. Read by bitsandbytes when a layer is made.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


def lora_config(recipe: Recipe, model: Phi3VForCausalLM) -> LoraConfig | None:
    """
    LoRA as the recipe says, aimed at the parts named by `adapt` and checked to hit them.

    Args:
        recipe ([`Recipe`]): `use_peft`, `adapt`, `lora_*`.
        model ([`Phi3VForCausalLM`]): The base model; one on the meta device will do.

    Returns:
        `LoraConfig` or `None`: `None` without `use_peft`.

    Raises:
        ValueError: If a target hits nothing, hits a part that `adapt` does not name, or misses one that it names.
    """
    config = get_peft_config(recipe.model)
    if config is None:
        return None
    config.revision = base_commit(model.config)
    if recipe.model.lora_target_modules is None:
        config.target_modules = target_pattern(recipe.task.adapt, model)
    else:
        _check_targets(recipe, model)
    return config


def freeze_unused(model: Phi3VForCausalLM) -> None:
    """
    Takes what is never computed out of a full fine-tuning: CLIP's layers after the one whose output is used, and its
    last norm. They would get no gradient, for which several processes wait.
    """
    tower = model.model.vision_tower
    for module in (*tower.encoder.layers[model.model.vision_layers :], tower.post_layernorm):
        module.requires_grad_(False)


def checkpoint_layers(model: nn.Module, count: int) -> None:
    """
    Leaves so many of the decoder's layers to recompute their activations. It is the first ones: the backward pass
    starts at the last layer, so that what the others keep is gone before anything is computed again. Were it the last
    ones, one layer's activations would come on top of all that is kept.

    Args:
        model (`nn.Module`): The model, wrapped or not, after activation checkpointing was enabled for all layers.
        count (`int`): How many.
    """
    layers = [module for module in model.modules() if isinstance(module, Phi3DecoderLayer)]
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < count


def kernels_line(model: nn.Module) -> str:
    """
    How many of the decoder's norms are fused, in words. transformers keeps a layer as it is, without a word, where no
    kernel fits the GPU or none can be fetched.

    Args:
        model (`nn.Module`): Loaded with `kernels`, on its device. It chooses its kernels when it begins to train, or to
            score, so that it is told to do both.

    Returns:
        `str`: A line for people.

    Raises:
        ValueError: If none is.
    """
    model.train()
    norms = [module for module in model.modules() if isinstance(module, Phi3RMSNorm)]
    fused = sum(getattr(norm.forward, "__func__", None) is not type(norm).forward for norm in norms)
    model.eval()
    if not fused:
        raise ValueError(
            f"`use_kernels: true` changed none of the {len(norms)} norms: no kernel fits this GPU, or none could be "
            "fetched from the Hub (kernels-community). Remove it."
        )
    return f"kernels: {fused} of {len(norms)} norms are fused, in training and for this run's own scores."


def base_commit(config: Phi3VConfig) -> str | None:
    """The commit that a base model from the Hub was loaded at ("main" moves on); `None` for a folder."""
    return getattr(config, "_commit_hash", None)  # transformers sets it on what comes from the Hub only


def target_pattern(parts: Sequence[str], model: Phi3VForCausalLM) -> str:
    """A pattern, for PEFT to match whole module names with, that hits every linear of the parts that is computed."""
    used = "|".join(str(layer) for layer in range(model.model.vision_layers))
    patterns = {
        "language_model": r"language_model\.layers\.\d+\.(self_attn|mlp)\.(qkv_proj|o_proj|gate_up_proj|down_proj)",
        "projector": r"multi_modal_projector\.linear_[12]",
        "vision_tower": rf"vision_tower\.encoder\.layers\.({used})\.(self_attn|mlp)\.([qkv]_proj|out_proj|fc[12])",
    }
    return rf"model\.({'|'.join(patterns[part] for part in parts)})"


def _check_targets(recipe: Recipe, model: Phi3VForCausalLM) -> None:
    """Holds the recipe's own `lora_target_modules` against the model."""
    given = recipe.model.lora_target_modules
    names = [given] if isinstance(given, str) else list(given or [])
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    advice = (
        "Remove lora_target_modules and name parts with `adapt` (language_model, projector, vision_tower) instead; "
        "the language model's own linears are called qkv_proj, o_proj, gate_up_proj and down_proj."
    )
    if "all-linear" in names:
        raise ValueError(f"lora_target_modules: 'all-linear' also adapts layers that are never computed. {advice}")
    hits: list[str] = []
    for name in names:
        # As PEFT does: one string is a pattern for the whole name, a list holds the names' ends.
        if isinstance(given, str):
            found = [linear for linear in linears if re.fullmatch(name, linear)]
        else:
            found = [linear for linear in linears if f".{linear}".endswith(f".{name}")]
        if not found:
            raise ValueError(f"lora_target_modules: {name!r} hits no module of this model. {advice}")
        hits += found
    counts = {part: sum(hit.startswith(prefix) for hit in hits) for part, prefix in PARTS.items()}
    landed = {part for part, count in counts.items() if count}
    if landed != set(recipe.task.adapt):
        shown = ", ".join(f"{count} in {part}" for part, count in counts.items())
        raise ValueError(
            f"lora_target_modules: {given!r} lands elsewhere than `adapt: {recipe.task.adapt}` says: {shown}. {advice}"
        )
    unused = rf"model\.vision_tower\.encoder\.layers\.{model.model.vision_layers}\."
    if any(re.match(unused, hit) for hit in hits):
        raise ValueError(f"lora_target_modules: {given!r} adapts CLIP's last layer, which is never computed. {advice}")


def landing_table(model: nn.Module) -> str:
    """
    What is quantised, adapted and trained, counted on the model itself, part by part.

    Args:
        model (`nn.Module`): The model that will be trained, with its adapter.

    Returns:
        `str`: A table for people.

    Raises:
        ValueError: If nothing at all would be trained.
    """
    counts = {part: Counter[str]() for part in PARTS}
    stored: dict[str, set[str]] = {part: set() for part in PARTS}
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.")  # PEFT's wrapper
        part = next((part for part, prefix in PARTS.items() if name.startswith(prefix)), None)
        if part is None:
            continue
        counts[part]["quantised"] += isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)
        counts[part]["adapted"] += isinstance(module, LoraLayer)
        for parameter in module.parameters(recurse=False):
            counts[part]["trainable"] += parameter.numel() if parameter.requires_grad else 0
            if ".lora_" not in name and ".modules_to_save." not in name:
                counts[part]["parameters"] += _numel(parameter)
                stored[part].add(_storage(parameter))
    if not sum(count["trainable"] for count in counts.values()):
        raise ValueError("Nothing would be trained: no parameter of the model requires a gradient.")
    columns = ["parameters", "quantised", "adapted", "trainable"]
    rows = [["part", *columns, "stored as"]]
    for part, count in counts.items():
        rows.append([part, *(f"{count[column]:,}" for column in columns), " + ".join(sorted(stored[part]))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for part, *numbers, storage in rows:
        padded = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=False)]
        lines.append("  ".join([f"{part:<{widths[0]}}", *padded, storage]))
    return "\n".join(lines)


def _numel(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for; 4-bit storage packs several into one element."""
    if isinstance(parameter, bitsandbytes.nn.Params4bit) and parameter.quant_state is not None:
        return math.prod(parameter.quant_state.shape)
    return parameter.numel()


def _storage(parameter: nn.Parameter) -> str:
    if isinstance(parameter, bitsandbytes.nn.Params4bit):
        return f"4-bit {parameter.quant_type}"
    return str(parameter.dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name, if it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
