"""A recipe is one flat YAML file that fixes one run: the model, the data, the training and where the result goes.

Every key is a field of TRL's `ScriptArguments`, `ModelConfig` or `SFTConfig`, `datasets` (a mixture, as TRL's
`DatasetMixtureConfig` has it), or one of our own in [`TaskArguments`], [`PrepareArguments`], [`PreviewArguments`],
[`ScoringArguments`] and [`PublishArguments`]. The command line overrides the file, so this trains the Burberry recipe
with four crops per picture:

```python
>>> recipe = load_recipe(["recipes/burberry.yaml", "--num_crops", "4", "--learning_rate", "1e-4"])
>>> recipe.task.num_crops, recipe.training.learning_rate, recipe.model.dtype
(4, 0.0001, 'bfloat16')
```

TRL's own parser lets `lora_r: 16.5`, `dtype: bfloat32` and a key written twice through, and takes `--lora` for any key
that starts so. Here every value is held against the annotation of its field before anything is built.
"""

import argparse
import difflib
import json
import os
import re
import shlex
import sys
import types
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

if TYPE_CHECKING:  # torch and trl take seconds to import: not for `--help`
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig


@dataclass
class TaskArguments:
    """The keys that TRL does not have. A test freezes this list: a new key is a deliberate act."""

    prompt: str = field(
        default="What is shown in this image?",
        metadata={"help": "The question put with every picture: a format string over the row's columns."},
    )
    answer: str | None = field(
        default=None,
        metadata={
            "help": "The answer to learn, a format string over the row's columns, such as 'Product: {title}'. "
            "Completions are read back with it. Not for rows that hold `messages` already."
        },
    )
    image_column: str = field(default="image", metadata={"help": "The column that holds the picture (or a list)."})
    num_crops: int | None = field(
        default=None,
        metadata={"help": "Most 336x336 crops a picture is cut into. null: what the checkpoint's processor says."},
    )
    held_out: float = field(
        default=0.1,
        metadata={
            "help": "Share (below 1) or number (1 and up) of train rows held out for evaluation, where the data set "
            "has no `dataset_test_split`."
        },
    )
    overlong: Literal["error", "drop"] = field(
        default="error",
        metadata={"help": "Rows longer than `max_length`: 'error' stops and names them, 'drop' leaves them out."},
    )
    nonfinite: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "A loss or gradient that is no finite number: 'error' saves the weights of before and stops with "
            "the rows' names, 'skip' leaves these steps out and says which."
        },
    )
    adapt: list[Literal["language_model", "projector", "vision_tower"]] = field(
        default_factory=lambda: ["language_model"],
        metadata={"help": "The parts that get LoRA: language_model, projector, vision_tower."},
    )
    eval_rows: int | None = field(
        default=200,
        metadata={"help": "Held-out rows scored by generation before and after training. null: all of them."},
    )
    generation_rows: int = field(
        default=32,
        metadata={
            "help": "Held-out rows answered by generation at each evaluation during training, always the same ones. "
            "Their scores are logged, and can be `metric_for_best_model`: eval_parsed, eval_<field>_exact and the "
            "like. 0: none."
        },
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Most tokens generated for one completion."})
    generation_batch_size: int = field(default=8, metadata={"help": "Rows per device generated for at once."})
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a batch on one device, its padding among them: batches are planned from the rows' "
            "lengths, in place of `per_device_train_batch_size` rows each."
        },
    )
    checkpointed_layers: int | str | None = field(  # "auto"
        default=None,
        metadata={
            "help": "With `activation_checkpointing`: how many of the decoder's layers recompute in the backward pass "
            "what others keep. 'auto': as few as fit this device by the estimate of docs/fit.md. null: all of them.",
        },
    )
    use_kernels: bool = field(
        default=False,
        metadata={
            "help": "Fused kernels from the Hub (`kernels-community`, compiled code) for the decoder's norms while a "
            "run trains and scores: needs a CUDA device and `pip install kernels`. They round differently, so that "
            "numbers change a little. Other commands load the model without."
        },
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder that keeps the image features of all pictures, made once by the frozen vision tower and "
            "projector, so that steps neither compute these nor decode pictures (docs/speed.md). null: none."
        },
    )
    vision_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Crops that the vision tower reads at a time. Fewer save memory, and change nothing but rounding. "
            "null: all of a batch at once."
        },
    )

    def __post_init__(self) -> None:
        if self.held_out <= 0 or (self.held_out > 1 and self.held_out != int(self.held_out)):
            raise ValueError(
                f"`held_out` is {self.held_out}, expected a share above 0 and below 1 (0.1: a tenth of the train "
                "rows) or a whole number of rows."
            )
        if not self.adapt:
            raise ValueError("`adapt` is empty: name a part, or set `use_peft: false` to train every weight.")
        if self.generation_rows < 0:
            raise ValueError(f"`generation_rows` is {self.generation_rows}, expected 0 or more.")
        if isinstance(self.checkpointed_layers, int) and self.checkpointed_layers < 0:
            raise ValueError(f"`checkpointed_layers` is {self.checkpointed_layers}, expected 0 or more, or auto.")
        at_least_one = ("num_crops", "eval_rows", "max_new_tokens", "generation_batch_size", "max_tokens_per_batch")
        for key in (*at_least_one, "vision_batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"`{key}` is {value}, expected 1 or more.")


@dataclass
class PrepareArguments:
    """The keys of `python -m sft_phi3v.prepare`, which makes the data set `dataset_name` of what people have."""

    source: str | None = field(
        default=None,
        metadata={
            "help": "What `prepare` reads: a Hub id, a .csv, .jsonl, .parquet or .tar file, or a folder of these or of "
            "pictures. It writes the folder `dataset_name`, which training reads."
        },
    )
    source_image_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "The source's columns with URLs, paths, bytes or pictures. null: `image_column`. Several make a "
            "row with several pictures."
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Rows with the same value, such as one product's, stay on one side of the split."},
    )
    stratify_column: str | None = field(
        default=None,
        metadata={"help": "Each value of this column gets its own share of held-out rows."},
    )
    placeholders: list[str] = field(
        default_factory=lambda: ["n/a", "#n/a", "nan", "null", "-", "--", "?", "tbd", "todo", "xxx", "placeholder"],
        metadata={"help": "Values of the fields in `prompt` and `answer` that stand for nothing, in any letter case."},
    )
    duplicates: Literal["drop", "keep"] = field(
        default="drop",
        metadata={
            "help": "Rows with equal pictures and questions: 'drop' keeps the first of equal answers, and none where "
            "the answers contradict each other; 'keep' keeps all, on one side of the split."
        },
    )
    near_duplicates: int | None = field(
        default=4,
        metadata={
            "help": "Pictures whose 64-bit perceptual hashes differ in at most so many bits stay on one side of the "
            "split. null: only equal ones."
        },
    )
    min_side: int = field(default=32, metadata={"help": "Shortest side of a picture, in pixels."})
    max_pixels: int = field(default=89_478_485, metadata={"help": "Most pixels of a picture (Pillow's own limit)."})
    max_bytes: int = field(default=50_000_000, metadata={"help": "Largest picture file, in bytes."})
    downscale: bool = field(
        default=False,
        metadata={"help": "Store pictures no larger than `num_crops` can use, where that saves bytes."},
    )
    fetch_connections: int = field(default=128, metadata={"help": "Most pictures fetched at once."})
    fetch_per_host: int = field(default=64, metadata={"help": "Most pictures fetched at once from one host."})
    fetch_timeout: float = field(default=30.0, metadata={"help": "Seconds that one request may take."})
    fetch_attempts: int = field(default=4, metadata={"help": "Most requests for one picture."})
    workers: int | None = field(default=None, metadata={"help": "Processes that prepare. null: one per core."})
    engine: Literal["local", "ray"] = field(
        default="local",
        metadata={"help": "Where they run: on this machine, or on the Ray cluster that it belongs to."},
    )
    push: str | None = field(
        default=None,
        metadata={"help": "Hub id under which `prepare` uploads the data set, privately: user/name."},
    )
    prepare: bool = field(default=False, metadata={"help": "`run.py` prepares first if `dataset_name` is not there."})

    def __post_init__(self) -> None:
        least = {"fetch_timeout": 0.1, "near_duplicates": 0}
        for key, most in {"near_duplicates": 16, "fetch_attempts": 20}.items():
            value = getattr(self, key)
            if value is not None and value > most:
                raise ValueError(f"`{key}` is {value}, expected at most {most}.")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value < least.get(item.name, 1):
                raise ValueError(f"`{item.name}` is {value}, expected {least.get(item.name, 1)} or more.")
        if self.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise ValueError(f"`push` is {self.push!r}, expected a Hub id such as user/name.")


@dataclass
class PreviewArguments:
    """The keys of `python -m sft_phi3v.preview`, which shows what a recipe would train on, need and cost."""

    sizes: str | None = field(
        default=None,
        metadata={
            "help": "A .csv, .jsonl or .parquet file with the pictures' `width` and `height` in pixels, beside the "
            "columns of `prompt` and `answer`: `preview` counts from it, and needs neither pictures nor `dataset_name`."
        },
    )
    gpu: str | None = field(
        default=None,
        metadata={
            "help": "The GPU to estimate for, such as RTX 4090, A100-80 or H100 (docs/fit.md has all). null: this "
            "machine's, or if it has none, every one."
        },
    )
    gpus: int | None = field(default=None, metadata={"help": "How many of them. null: as many as there are processes."})
    gpu_price: float | None = field(
        default=None, metadata={"help": "Dollars per hour and GPU. null: the example price of docs/fit.md."}
    )
    efficiency: float = field(
        default=0.3, metadata={"help": "Share of the GPU's peak speed that training reaches, for the time estimate."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"`efficiency` is {self.efficiency}, expected a share above 0 and up to 1.")
        if self.gpu_price is not None and self.gpu_price < 0:
            raise ValueError(f"`gpu_price` is {self.gpu_price}, expected 0 or more.")
        if self.gpus is not None and self.gpus < 1:
            raise ValueError(f"`gpus` is {self.gpus}, expected 1 or more.")


@dataclass
class ScoringArguments:
    """The keys of `python -m sft_phi3v.evaluation`, which scores what the recipe trained, or any other model."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "What is scored: folder or Hub id of a base model, an adapter or a merged model. null: what the "
            "recipe trained."
        },
    )
    split: str | None = field(
        default=None, metadata={"help": "The split whose rows are scored. null: the held-out rows."}
    )
    limit: int | None = field(
        default=None, metadata={"help": "Score so many of them, drawn by `seed`. null: `eval_rows`."}
    )

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` is {self.limit}, expected 1 or more.")


@dataclass
class PublishArguments:
    """The keys of `python -m sft_phi3v.merge` and `python -m sft_phi3v.hub`. `hub_*` are TRL's."""

    adapter: str | None = field(
        default=None, metadata={"help": "Folder of the adapter to merge or publish. null: `output_dir`."}
    )
    merge_base: Literal["quantised", "original"] = field(
        default="quantised",
        metadata={
            "help": "What the adapter is merged into: the quantised weights that it was trained on, or the published "
            "ones, which it has never met."
        },
    )
    compare_bases: bool = field(
        default=False, metadata={"help": "Merge into the other base as well, score both, and show what it costs."}
    )
    merge_rows: int | None = field(
        default=32,
        metadata={
            "help": "Held-out rows on which the merged model is compared with the trained one. null: all `eval_rows`."
        },
    )
    merge_tolerance: float = field(
        default=0.05,
        metadata={
            "help": "Most that the merged model may differ: relative error of its logits, share of other next tokens, "
            "and change of any score (one row is always allowed). bfloat16 alone makes some 1 to 4 %."
        },
    )
    what: Literal["merged", "adapter", "both"] = field(
        default="merged",
        metadata={"help": "What is published: the merged model, the adapter, or both (the adapter in `adapter/`)."},
    )
    license: str | None = field(
        default=None, metadata={"help": "The Hub's id of the licence to publish under. null: the base model's."}
    )
    language: list[str] = field(
        default_factory=lambda: ["en"], metadata={"help": "Languages of the answers, for the model card."}
    )
    card_examples: int = field(
        default=4, metadata={"help": "Held-out pictures that the model card shows, with reference and completion."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Show what would be published, and publish nothing."})
    replace: bool = field(
        default=False, metadata={"help": "Publish over a repository that holds something else than this model."}
    )

    def __post_init__(self) -> None:
        if self.merge_rows is not None and self.merge_rows < 1:
            raise ValueError(f"`merge_rows` is {self.merge_rows}, expected 1 or more.")
        if not 0 < self.merge_tolerance < 1:
            raise ValueError(f"`merge_tolerance` is {self.merge_tolerance}, expected a share above 0 and below 1.")
        if self.card_examples < 0:
            raise ValueError(f"`card_examples` is {self.card_examples}, expected 0 or more.")


# The only defaults that differ from TRL's. Everything else a run depends on is written in its recipe.
DEFAULTS: dict[str, Any] = {
    "activation_checkpointing": True,  # TRL's default too, but under the name that transformers 5 warns about
    "hub_private_repo": True,  # TRL leaves it to the Hub, which publishes
    "logging_nan_inf_filter": False,  # it would log another loss than a broken one; see `nonfinite`
    "max_length": None,  # TRL's 1024 is shorter than one picture (2,509 tokens at 16 crops)
    "remove_unused_columns": False,  # a row becomes an example only when it is read: its columns must still be there
}

# Keys that recipes found on the web still hold, and what to write today.
RENAMED: dict[str, str] = {
    "adafactor": "write `optim: adafactor`",
    "bnb_4bit_compute_dtype": "write `dtype`, which is the compute dtype too",
    "bnb_4bit_use_double_quant": "write `use_bnb_nested_quant`",
    "device_map": "remove it: `accelerate launch` gives each process its GPU, and accelerate_configs/fsdp2.yaml shards "
    "a model that is too large for one",
    "dataset_test_name": "write `dataset_test_split`",
    "dataset_train_name": "write `dataset_train_split`",
    "evaluation_strategy": "write `eval_strategy`",
    "fp16_backend": "remove it: there is one backend",
    "fsdp_min_num_params": "put `min_num_params` into `fsdp_config`, or better: `accelerate launch --config_file`",
    "fsdp_transformer_layer_cls_to_wrap": "put `transformer_layer_cls_to_wrap` into `fsdp_config`, or better: "
    "`accelerate launch --config_file`",
    "gradient_checkpointing": "write `activation_checkpointing`",
    "gradient_checkpointing_kwargs": "write `activation_checkpointing_kwargs`",
    "group_by_length": "write `max_tokens_per_batch`, which plans batches by length",
    "half_precision_backend": "remove it: there is one backend",
    "include_inputs_for_metrics": "write `include_for_metrics`",
    "logging_dir": "remove it: trackers choose their own folder",
    "lora_target": "write `adapt` (or `lora_target_modules` for exact module names)",
    "max_seq_length": "write `max_length`",
    "no_cuda": "write `use_cpu`",
    "overwrite_output_dir": "remove it: give a fresh `output_dir`, or `resume_from_checkpoint`",
    "per_gpu_eval_batch_size": "write `per_device_eval_batch_size`",
    "per_gpu_train_batch_size": "write `per_device_train_batch_size`",
    "push_to_hub_model_id": "write `hub_model_id`",
    "push_to_hub_token": "write `hub_token` (or log in with `hf auth login`)",
    "save_safetensors": "remove it: safetensors is the only format",
    "tokenizer_name_or_path": "remove it: the processor comes with `model_name_or_path`",
    "torch_dtype": "write `dtype`",
    "use_flash_attention_2": "write `attn_implementation: flash_attention_2`",
    "use_mps_device": "remove it: an Apple GPU is found by itself",
    "use_nested_quant": "write `use_bnb_nested_quant`",
    "warmup_ratio": "write `warmup_steps`, which takes a fraction below 1 as well",
}

_MASK = "the collator supervises the assistant's turns and nothing else, whatever this key says"
_PACK = "a picture's tokens cannot be packed: TRL refuses it for rows with pictures"
_TEXT = "what the model reads is said by `prompt` and `answer`, or by rows with `messages`"
_LIGER = "Liger knows no phi3_v, so that it would change nothing, without a word: write `use_kernels`"
_OWN = "the processor of `model_name_or_path` decides it"
# Keys TRL has that this project would ignore, or that would go wrong silently: only their default is accepted.
REFUSED: dict[str, str] = {
    "assistant_only_loss": _MASK,
    "average_tokens_across_devices": "the loss would depend on how many processes share a step",
    "completion_only_loss": _MASK,
    "packing": _PACK,
    "eval_packing": _PACK,
    "dataset_text_field": _TEXT,
    "dataset_kwargs": _TEXT,
    "chat_template_path": _OWN,
    "eos_token": _OWN,
    "pad_token": _OWN,
    "model_init_kwargs": "write `dtype`, `attn_implementation`, `model_revision` and `use_kernels` instead",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "streaming": "write `dataset_streaming`, which goes for `datasets` too",
    "test_split_size": "write `held_out`",
    "save_only_model": "a checkpoint without the optimiser cannot be gone on from",
    "accelerator_config": "how rows are shared out over processes is what the loss and the epochs count on",
    "save_on_each_node": "checkpoints lie on a disk that all machines share",
    "remove_unused_columns": "a row becomes an example only when it is read, so its columns must stay",
    "truncation_mode": "a row is never cut: see `max_length` and `overlong`",
    "trust_remote_code": "the model is native here and runs no code from the Hub",
}

# Either says what makes a batch. The command line's stands in for the file's; both in one place are refused.
_BATCH = ("max_tokens_per_batch", "per_device_train_batch_size")

_PATHS = ("model_name_or_path", "dataset_name", "path", "source", "resume_from_checkpoint")
_REQUIRED = ("model_name_or_path", "dataset_name", "output_dir")

# What a resumed run may change: how long it runs, what it shows and keeps, how rows are spread over devices, what is
# kept or computed again, and where image features are kept and how many crops make them at a time: they are the same up
# to the rounding of another batch.
RESUMABLE = re.compile(
    r"nonfinite|feature_cache|max_steps|num_train_epochs|(logging|hub)_.*|save_(steps|strategy|total_limit)|dataloader_(?!drop_last).*|push_to_hub|report_to|run_name|disable_tqdm|"
    r"eval_strategy|eval_steps|per_device_(train|eval)_batch_size|gradient_accumulation_steps|generation_batch_size|"
    r"checkpointed_layers|vision_batch_size|"
    r"env|output_dir|source|source_image_column|fetch_.*|workers|engine|push|prepare|sizes|gpus?|gpu_price|efficiency|"
    r"model|split|limit|"
    r"adapter|merge_.*|compare_bases|what|license|language|card_examples|dry_run|replace"
)

MARKUP = re.compile(r"<\|\w+\|>")  # <|image_1|>, <|end|>: what Phi-3's chat template puts around turns and pictures


@dataclass(frozen=True)
class Recipe:
    """
    One run, fixed.

    Args:
        script ([`~trl.ScriptArguments`]): Which data set and which of its splits.
        model ([`~trl.ModelConfig`]): Base model, quantisation, LoRA.
        training ([`~trl.SFTConfig`]): Training, evaluation, tracking, output.
        task ([`TaskArguments`]): Our own keys.
        prepare ([`PrepareArguments`]): Our own keys about making the data set.
        preview ([`PreviewArguments`]): Our own keys about what is shown before training.
        scoring ([`ScoringArguments`]): Our own keys about what is scored.
        publish ([`PublishArguments`]): Our own keys about merging and publishing.
        mixture ([`~trl.DatasetMixtureConfig`]): Its `datasets`, where the rows come from several; else it is empty.
        settings (`dict[str, Any]`):
            The keys as the file and the command line gave them, checked and converted, [`DEFAULTS`], and in any case
            our own keys, the seed and LoRA's size. What is not here has TRL's default.
        path (`str`): The file it came from.
        typed (`str`): The file and the overrides, as they were typed.
    """

    script: "ScriptArguments"
    model: "ModelConfig"
    training: "SFTConfig" = field(repr=False)  # its repr shows hub_token
    task: TaskArguments
    prepare: PrepareArguments
    preview: PreviewArguments
    scoring: ScoringArguments
    publish: PublishArguments
    mixture: "DatasetMixtureConfig"
    settings: dict[str, Any] = field(repr=False)
    path: str = field(compare=False)
    typed: str = field(default="", compare=False)

    @property
    def resume(self) -> bool | str | None:
        """`resume_from_checkpoint`: whether to, where that was said; `"auto"`; or the path of a checkpoint."""
        given = self.training.resume_from_checkpoint
        if given is None or given.lower() not in ("true", "false", "auto"):
            return given
        return "auto" if given.lower() == "auto" else given.lower() == "true"

    @property
    def padding_free(self) -> bool:
        """Whether rows lie behind each other in a batch, without padding. TRL must not see it, who refuses pictures."""
        return bool(self.settings.get("padding_free"))

    @property
    def data(self) -> str:
        """What the rows come from, in words: `dataset_name`, or the paths of `datasets`."""
        return ", ".join(entry.path for entry in self.mixture.datasets) or str(self.script.dataset_name)

    def dump(self) -> dict[str, Any]:
        """
        The resolved recipe, as [`load_recipe`] reads it back.

        Returns:
            `dict[str, Any]`:
                [`Recipe.settings`]; no secret, and no `resume_from_checkpoint`, which says how a run was started and
                not what it is.
        """
        left_out = {"hub_token", "resume_from_checkpoint"}
        dumped = {key: value for key, value in self.settings.items() if key not in left_out}
        if "env" in dumped:
            dumped["env"] = {name: value for name, value in dumped["env"].items() if not _is_secret(name)}
        return dumped

    def public(self) -> dict[str, Any]:
        """[`public_keys`] of this recipe."""
        return public_keys(self.dump())

    def save(self, output_dir: str | os.PathLike[str]) -> Path:
        """
        Write the resolved recipe ([`Recipe.dump`]), which [`load_recipe`] reads back as an equal [`Recipe`].

        Args:
            output_dir (`str` or `os.PathLike`): Folder of the run, made if need be.

        Returns:
            `Path`: `output_dir/recipe.yaml`.
        """
        path = Path(output_dir, "recipe.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")  # a run that dies here leaves no half recipe
        aside.write_text(as_text(self.dump(), self.path), encoding="utf-8")
        os.replace(aside, path)
        return path


def local_paths(keys: Mapping[str, Any]) -> list[str]:
    """Those values of a recipe that are files or folders here, and not Hub ids: a relative path tells nobody."""
    named = [part.get(key) for part in (keys, *keys.get("datasets", [])) for key in _PATHS]
    return sorted({value for value in named if isinstance(value, str) and Path(value).expanduser().exists()})


def public_keys(keys: Mapping[str, Any], paths: Collection[str] = ()) -> dict[str, Any]:
    """
    A resolved recipe for others to read: of a local path only its last name, and nothing of this machine.

    Args:
        keys (`Mapping[str, Any]`): As [`Recipe.dump`] gives them.
        paths (collection of `str`, *optional*): What was a local path where the run was made.

    Returns:
        `dict[str, Any]`: The keys that make the run.
    """
    local = {*paths, *local_paths(keys)}

    def cleaned(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: cleaned(inner, one) for inner, one in value.items()}
        if isinstance(value, list):
            return [cleaned(key, one) for one in value]
        if not isinstance(value, str) or key in ("prompt", "answer"):
            return value
        path = Path(value).expanduser()
        return path.name if path.is_absolute() or key == "output_dir" or value in local else value

    left_out = {"env", "run_name", "push", "feature_cache"}
    left_out |= {item.name for part in (PreviewArguments, ScoringArguments, PublishArguments) for item in fields(part)}
    return {key: cleaned(key, value) for key, value in keys.items() if key not in left_out}


def as_text(keys: dict[str, Any], origin: str) -> str:
    """Resolved keys as the text of a recipe file."""
    return f"# {origin}, resolved\n{yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=119)}"


def load_recipe(argv: list[str], *, set_environment: bool = True) -> Recipe:
    """
    Read a recipe file and the overrides that follow it, `RECIPE [--key value ...]`.

    Works on any machine, with the GPU the recipe asks for or without: what runs the model calls
    [`~sft_phi3v.machine.check_machine`].
    Sets the environment variables of the recipe's `env:` block, as TRL does.

    Args:
        argv (`list[str]`): `sys.argv[1:]`. The path comes first, or after `--config`.
        set_environment (`bool`, *optional*, defaults to `True`): `False` for a recipe that a stranger may have written.

    Returns:
        [`Recipe`]: The recipe, every value checked.

    Raises:
        ValueError: Names every key that is unknown, renamed, mistyped or written twice, and what to write instead.
        SystemExit: After `--help`.
    """
    path, overrides, written = read_given(argv)

    from transformers.utils import is_torch_bf16_gpu_available
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    ours = (TaskArguments, PrepareArguments, PreviewArguments, ScoringArguments, PublishArguments)
    parts: Any = (ScriptArguments, ModelConfig, SFTConfig, *ours, DatasetMixtureConfig)
    kinds = {name: kind for part in parts for name, kind in get_type_hints(part).items()}
    kinds["lora_target_modules"] = str | list[str] | None  # a pattern too, as TRL documents and its annotation forgets
    kinds["checkpointed_layers"] = int | Literal["auto"] | None  # which transformers' parser refuses to look at
    kinds["datasets"] = list[dict[str, Any]]  # as a file has them
    known = {item.name: (kinds[item.name], item) for part in parts for item in fields(part) if item.init}

    problems: list[str] = []
    env = written.pop("env", {})
    if not isinstance(env, dict) or any(isinstance(value, dict | list) for value in env.values()):
        problems.append(f"{path}: `env` is {env!r}, expected a mapping of variable names to values.")
    settings: dict[str, Any] = {"env": env} if env else {}
    settings |= DEFAULTS
    for source, given in ((path, written), ("command line", overrides)):
        for key, value in given.items():
            try:
                settings[key] = _checked(key, value, known, typed=source is not path)
            except ValueError as error:
                problems.append(f"{source}: {error}")
    for key, other in (_BATCH, _BATCH[::-1]):
        if key in overrides and settings.get(key) is not None and other not in overrides:
            settings.pop(other, None)
    if not problems:
        missing = [
            key for key in _REQUIRED if not settings.get(key) and not (key == "dataset_name" and "datasets" in settings)
        ]
        problems += [f"{path}: `{key}` is missing: a recipe names it." for key in missing]
        problems += [f"{path}: {problem}" for problem in _conflicts(settings, known)]
    if problems:
        raise ValueError("\n".join(problems))

    if set_environment:
        os.environ.update({name: str(value) for name, value in env.items()})
    values = {key: value for key, value in settings.items() if key not in ("env", "padding_free")}
    values["datasets"] = list(settings.get("datasets", []))  # TRL makes objects of its mappings, in place
    if wants_bf16(values) and not is_torch_bf16_gpu_available():
        values["use_cpu"] = True  # SFTConfig would raise here, on every machine that only looks at the recipe
    try:
        script, model, training, task, *others, mixture = TrlParser(parts).parse_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # ModelConfig makes text of a list of one name, which PEFT then takes for a pattern that must match the whole path.
    model.lora_target_modules = settings.get("lora_target_modules")
    settings |= vars(task) | {"seed": training.seed}  # what defines a run is saved, whatever a later default says
    if model.use_peft:
        settings |= {key: getattr(model, key) for key in ("lora_r", "lora_alpha", "lora_dropout")}
    else:
        del settings["adapt"]  # without adapters it says nothing, and is refused
    prepare, preview, scoring, publish = others
    own = (task, prepare, preview, scoring, publish)
    return Recipe(script, model, training, *own, mixture, settings, path, shlex.join(argv))


def read_given(argv: list[str] | None = None) -> tuple[str, dict[str, list[str]], dict[str, Any]]:
    """
    What a command line names, as it is written; neither keys nor values are checked.

    Args:
        argv (`list[str]`, *optional*): As for [`load_recipe`]; `sys.argv[1:]` by default.

    Returns:
        `tuple[str, dict[str, list[str]], dict[str, Any]]`: Path of the recipe, the words of each override, the file.

    Raises:
        ValueError: If there is no such file, or it cannot be read.
        SystemExit: After `--help`.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0 if argv else 2)
    path, overrides = _split_argv(argv)
    return path, overrides, read_yaml(path)


def differences(saved: Path, recipe: Recipe) -> list[str]:
    """
    The keys in which a saved recipe differs from this one.

    Args:
        saved (`Path`): A `recipe.yaml` that [`Recipe.save`] wrote; nothing differs if it is not there.
        recipe ([`Recipe`]): The recipe.

    Returns:
        `list[str]`: Keys, sorted.
    """
    if not saved.is_file():
        return []
    now = recipe.dump()
    # A key that is newer than the run: the run went by what is now its default.
    before = {key: value for key, value in vars(TaskArguments()).items() if key in now} | read_yaml(str(saved))
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage, which hides it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def help_text() -> str:
    """What `--help` prints: usage, our own keys, and where the rest is described."""
    lines = [
        "usage: python -m sft_phi3v.<verb> RECIPE [--key value ...]",
        "       accelerate launch sft_phi3v/run.py RECIPE [--key value ...]",
        "",
        "RECIPE is a YAML file of flat keys (recipes/*.yaml); --key value overrides one of them. Our own keys:",
        "",
    ]
    for part, opening in (
        (TaskArguments, []),
        (PrepareArguments, ["", "Of `prepare`, which makes the data set:", ""]),
        (PreviewArguments, ["", "Of `preview`, which shows what a run would train on, need and cost:", ""]),
        (ScoringArguments, ["", "Of `evaluation`, which scores:", ""]),
        (PublishArguments, ["", "Of `merge` and `hub`, which publish what was trained:", ""]),
    ):
        lines += opening
        for item, default in zip(fields(part), vars(part()).values(), strict=True):
            lines.append(f"  --{item.name} ({json.dumps(default)})\n      {item.metadata['help']}")
    lines += [
        "",
        "All other keys are TRL's: ScriptArguments (dataset_*), DatasetMixtureConfig (datasets), ModelConfig (model,",
        "quantisation, LoRA) and SFTConfig (training): https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig",
    ]
    return "\n".join(lines)


def _split_argv(argv: list[str]) -> tuple[str, dict[str, list[str]]]:
    """`["a.yaml", "--lora-r", "8", "--adapt=projector"]` -> `"a.yaml", {"lora_r": ["8"], "adapt": ["projector"]}`."""
    path, given, key = None, dict[str, list[str]](), None
    for token in argv:
        if token.startswith("--"):  # -1 is a value
            name, equals, value = token[2:].partition("=")
            key = name.replace("-", "_")
            if key in given:
                raise ValueError(f"command line: `--{key}` is given twice. Keep one of them.")
            given[key] = [value] if equals else []
        elif key is None and path is None:
            path = token
        elif key is None:
            raise ValueError(f"command line: {token!r} follows the recipe {path}, expected --key value.")
        else:
            given[key].append(token)
    if "config" in given:
        if path is not None or len(given["config"]) != 1:
            raise ValueError("command line: give one recipe, as the first word or after --config.")
        path = given.pop("config")[0]
    if path is None:
        raise ValueError(f"command line: no recipe: the first word must be a YAML file, such as {_some_recipes()}.")
    return path, given


def _some_recipes() -> str:
    return ", ".join(str(found) for found in sorted(Path("recipes").glob("*.yaml"))) or "recipes/burberry.yaml"


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses a key written twice, where YAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            first = lines.setdefault(str(key.value), line)
            if first != line:
                raise ValueError(f"`{key.value}` is written twice, in lines {first} and {line}. Keep one.")
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict[str, Any]:
    """The keys of a recipe file, as they are written; a `ValueError` if it is none."""
    if not Path(path).is_file():
        raise ValueError(f"no recipe at {path!r} (paths count from {os.getcwd()}). There are: {_some_recipes()}.")
    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds {type(loaded).__name__}, expected lines of `key: value`.")
    return loaded


def _checked(key: Any, value: Any, known: Mapping[str, Any], *, typed: bool) -> Any:
    """The value of one key, converted to what its field wants; `typed`: a list of words from the command line."""
    shown = " ".join(value) if typed else value
    if key in RENAMED:
        raise ValueError(f"`{key}: {shown}` is a key of older releases: {RENAMED[key]}.")
    if key not in known:
        close = difflib.get_close_matches(str(key).removeprefix("no_").replace("-", "_"), known, n=1)
        hint = f"Did you mean `{close[0]}`?" if close else "`--help` lists our own and says where TRL's are described."
        raise ValueError(f"`{key}` is not a recipe key. {hint}")
    if key == "resume_from_checkpoint" and (isinstance(value, bool) or value == []):
        value = "false" if value is False else ["true"] if typed else "true"  # a path to TRL, so it is text
    kind, item = known[key]
    choices = [str(choice) for choice in item.metadata.get("choices", ())] or _choices(kind)
    if typed and not value and bool not in (kind, *get_args(kind)):
        raise ValueError(f"`--{key}` stands alone, expected a value after it: {_in_words(kind, choices)}.")
    if typed:  # `--use_cpu` alone means true; several words make a list
        value = value if len(value) > 1 else value[0] if value else True
    try:
        try:
            fitted = _fit(value, kind, typed=typed)
        except _Misfit:  # YAML 1.1 reads 1e-4 as text: TRL converts it as it would from the command line, and so do we
            fitted = _fit(value, kind, typed=True)
        if choices and isinstance(fitted, str) and fitted not in choices:
            raise _Misfit
    except _Misfit:
        hint = ""
        if close := difflib.get_close_matches(str(value), choices, n=1):
            hint = f" Did you mean {close[0]!r}?"
        elif value is False and "no" in choices:
            hint = " YAML reads a bare no as false: write 'no' in quotes."
        elif isinstance(value, int | float) and str in (kind, *get_args(kind)) and not choices:
            hint = f" Put it in quotes: '{str(value).lower()}'."
        raise ValueError(f"`{key}` is {shown!r}, expected {_in_words(kind, choices)}.{hint}") from None
    return _checked_datasets(fitted) if key == "datasets" else fitted


def _checked_datasets(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The data sets of a mixture, the keys of each held against TRL's `DatasetConfig`."""
    from trl.scripts.utils import DatasetConfig

    if not entries:
        raise ValueError("`datasets` is empty: list data sets, such as {path: data/coats}, or write `dataset_name`.")
    kinds = get_type_hints(DatasetConfig)
    known = {item.name: (kinds[item.name], item) for item in fields(DatasetConfig)}
    checked = []
    for number, entry in enumerate(entries, start=1):
        try:
            for key in entry:
                if key not in known:
                    raise ValueError(f"`{key}` is not one of its keys, which are {', '.join(known)}.")
            checked.append({key: _checked(key, found, known, typed=False) for key, found in entry.items()})
            if not entry.get("path"):
                raise ValueError("`path` is missing: a Hub id, a file or a folder.")
            if (entry.get("fraction") or 0) < 0 or entry.get("fraction") == 0:
                raise ValueError(f"`fraction` is {entry['fraction']}, expected a number above 0.")
        except ValueError as error:
            raise ValueError(f"`datasets`, number {number}: {error}") from None
    if len({entry.get("fraction") is None for entry in checked}) > 1:
        raise ValueError("`datasets`: some have a `fraction` and some have not. Give it to all of them or to none.")
    return checked


class _Misfit(Exception):
    """A value that the annotation of its field does not allow."""


def _fit(value: Any, kind: Any, *, typed: bool) -> Any:
    """`value` as the annotation `kind` allows it; text that was `typed` is converted first, as argparse would."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        return _fit_first(value, inner, typed=typed)
    if typed and isinstance(value, str) and origin is not str:
        value = _from_text(value, origin)
    if origin is list and isinstance(value, list):
        return [_fit(one, inner[0], typed=typed) for one in value]
    if origin is Literal:
        fits = any(one == value and type(one) is type(value) for one in inner)
    elif isinstance(origin, type) and issubclass(origin, Enum):
        fits = value in [one.value for one in origin]
    elif origin in (int, float):
        fits = isinstance(value, (int, origin)) and not isinstance(value, bool)
    else:
        fits = origin is Any or isinstance(value, origin)
    if not fits:
        raise _Misfit
    return value


def _fit_first(value: Any, kinds: tuple[Any, ...], *, typed: bool) -> Any:
    """The first of several annotations that fits; text comes late, since everything typed is text."""
    named = any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds)  # then `str` only means its names
    for kind in sorted(kinds, key=lambda kind: 2 if get_origin(kind) is list else kind is str):
        try:
            if not (named and kind is str):
                return _fit(value, kind, typed=typed)
        except _Misfit:
            continue
    raise _Misfit


def _from_text(text: str, kind: Any) -> Any:
    """`"1e-4"` -> 0.0001, `"yes"` -> True, `"[a, b]"` or `"a"` -> a list, `"null"` -> None, where `kind` wants that."""
    try:
        if kind in (int, float):
            return kind(text)
        if kind is list and not text.startswith("["):
            return [text]
        return yaml.safe_load(text) if kind in (bool, list, dict, types.NoneType) else text
    except (ValueError, yaml.YAMLError):
        raise _Misfit from None


def _choices(kind: Any) -> list[str]:
    """The words that an annotation made of Literals or an Enum allows; none if it allows any text."""
    if isinstance(kind, type):
        return [str(one.value) for one in kind] if issubclass(kind, Enum) else []
    if get_origin(kind) is Literal:
        return [str(one) for one in get_args(kind)]
    return [word for inner in get_args(kind) for word in _choices(inner)]


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
_WORDS |= {types.NoneType: "null"}


def _in_words(kind: Any, choices: list[str]) -> str:
    """An annotation in the reader's words: `int | None` -> "a whole number or null"."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(one, choices) for one in inner))
    if origin is list:
        return f"a list of {_in_words(inner[0], choices)}"
    if choices and (origin is str or origin not in _WORDS):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    return _WORDS.get(origin, f"a {getattr(origin, '__name__', origin)}")


def _conflicts(settings: dict[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """Settings that are each valid and together, or in this project, would go wrong without a word."""
    for key, reason in REFUSED.items():
        allowed = DEFAULTS.get(key, known[key][1].default)
        if settings.get(key, allowed) != allowed:
            yield f"`{key}: {settings[key]}` is refused: {reason}. Remove it."
    bits = [key for key in ("load_in_4bit", "load_in_8bit") if settings.get(key)]
    if len(bits) == 2:
        yield "`load_in_4bit` and `load_in_8bit` are both true. Keep one."
    if bits and not settings.get("use_peft"):
        yield f"`{bits[0]}: true` without `use_peft: true`: quantised weights cannot be trained, adapters on them can."
    dtype = settings.get("dtype", "missing")
    if bits and dtype in ("missing", "auto", None):
        computes = f"computes in `dtype`, which is {dtype or 'null'}"
        yield f"`{bits[0]}: true` {computes}. Write `dtype: bfloat16` (float32 on a CPU)."
    if not bits and not settings.get("use_peft") and dtype not in ("missing", "float32"):
        yield (
            f"`dtype: {dtype or 'null'}` without `use_peft: true`: most updates are too small for 16-bit weights and "
            "vanish. Write `dtype: float32`; `bf16: true` still computes in bfloat16."
        )
    if settings.get("checkpointed_layers") is not None:
        if not settings.get("activation_checkpointing"):
            yield "`checkpointed_layers` with `activation_checkpointing: false`, which is for none. Keep one of them."
        if "every_n_layers" in (settings.get("activation_checkpointing_kwargs") or {}):
            yield "`checkpointed_layers` and `every_n_layers` both say how many layers recompute. Keep one of them."
    if settings.get("padding_free") and settings.get("attn_implementation") == "eager":
        yield (
            "`padding_free: true` with `attn_implementation: eager`, which would hold all tokens of a batch against "
            "all others. Write `attn_implementation: sdpa`."
        )
    if "adapt" in settings and not settings.get("use_peft"):
        yield "`adapt` without `use_peft: true`: nothing would be adapted, every weight would be trained."
    if settings.get("feature_cache") is not None:
        trained = [part for part in settings.get("adapt", ()) if part in ("projector", "vision_tower")]
        if not settings.get("use_peft"):
            yield "`feature_cache` without `use_peft: true`: image features change with every weight. Remove it."
        elif trained:
            yield f"`feature_cache` with `adapt: {trained}`: image features change while these learn. Keep one of both."
        if settings.get("dataset_streaming"):
            yield "`feature_cache` with `dataset_streaming: true`: which pictures come is not known before. Keep one."
    if settings.get("train_sampling_strategy") == "group_by_length":
        reason = "it would read every row for its length. `max_tokens_per_batch` plans batches by length"
        yield f"`train_sampling_strategy: group_by_length` is refused: {reason}. Remove it."
    for key in ("prompt", "answer"):
        if markup := MARKUP.search(settings.get(key) or ""):
            yield f"`{key}` holds {markup[0]}: the picture and the turns are added for you. Remove {markup[0]}."
    if "datasets" in settings:
        for key, instead in {
            "dataset_name": "keep one of them",
            "dataset_config": "write `name` into each of `datasets`",
            "dataset_train_split": "write `split` into each of `datasets`",
            "source": "prepare each data set with a recipe of its own, and list the folders",
        }.items():
            if settings.get(key) is not None:
                yield f"`datasets` and `{key}` are both given: {instead}."
    if settings.get("dataset_streaming"):
        if settings.get("train_sampling_strategy") == "batch_rebalance":
            yield "`train_sampling_strategy: batch_rebalance` needs every row's length: remove `dataset_streaming`."
        if settings.get("auto_find_batch_size"):
            yield "`auto_find_batch_size` with `dataset_streaming: true`: rows are shared out by the batch. Remove it."
    if settings.get("max_tokens_per_batch") is not None:
        if settings.get("per_device_train_batch_size") is not None:
            yield f"`{_BATCH[0]}` and `{_BATCH[1]}` are both given: either decides how many rows a batch has. Keep one."
        for key, reason in {
            "dataset_streaming": "batches are planned from the lengths of all rows, which a stream does not know",
            "auto_find_batch_size": "it would look for a number of rows",
            "dataloader_drop_last": "no planned batch is left unfinished, each is as full as rows allow",
        }.items():
            if settings.get(key):
                yield f"`{key}: true` with `max_tokens_per_batch`: {reason}. Remove one of them."
        if settings.get("train_sampling_strategy", "random") != "random":
            yield (
                f"`train_sampling_strategy: {settings['train_sampling_strategy']}` with `max_tokens_per_batch`: the "
                "plan decides which rows are together, and chance in which order they come. Remove one of them."
            )
    if settings.get("hub_strategy") in ("checkpoint", "all_checkpoints"):
        yield (
            f"`hub_strategy: {settings['hub_strategy']}` is refused: it would publish pickled optimiser states, with "
            "paths of this machine in them. Write every_save, which publishes each checkpoint's adapter, or end."
        )
    if "report_to" in settings and settings["report_to"] is None:
        yield "`report_to` is null. Write none (in words) for no tracker."


def wants_bf16(settings: Mapping[str, Any]) -> bool:
    """Whether SFTConfig will ask for a GPU with bfloat16: TRL's `bf16` is true unless `fp16` is."""
    bf16 = settings.get("bf16")
    wanted = not settings.get("fp16") if bf16 is None else bf16
    return bool(wanted or settings.get("bf16_full_eval")) and not settings.get("use_cpu")


def _is_secret(variable: str) -> bool:
    return re.search("TOKEN|SECRET|PASSW|KEY", variable, re.IGNORECASE) is not None
