"""Adapter → merged model, proved: what `output_dir/merged` holds answers like the model that was trained and scored.

`python -m sft_phi3v.merge RECIPE`. The adapter has learned to correct the *quantised* base model. So it is merged into
exactly that: each weight is dequantised, the adapter's part is added in float32, and the sum is written as bfloat16.
Into the published weights, which it has never met (`--merge_base original`), it fits less well;
`--compare_bases true` scores both. The model is written shard by shard, aside; loaded from there again; held against
the live adapter on held-out rows; and only then gets its name.
"""

from sft_phi3v.usage import check_recipe

if __name__ == "__main__":
    check_recipe()  # before torch is imported

import copy
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from huggingface_hub import split_state_dict_into_shards_factory
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from sft_phi3v.checkpoints import file_hashes, write_whole
from sft_phi3v.collator import IGNORED, Collator
from sft_phi3v.evaluation import Evaluation, public_recipe, trained_folder, trained_hashes
from sft_phi3v.machine import check_machine
from sft_phi3v.model import base_file, load_model, load_trained, on_device
from sft_phi3v.phi3_v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from sft_phi3v.preview import prepare_held_out
from sft_phi3v.recipe import Recipe, load_recipe
from sft_phi3v.scoring import Completion
from sft_phi3v.tracking import log_merged

REPORT = "merge_report.json"
DTYPE = torch.bfloat16
SHARD_SIZE = 2_000_000_000  # bytes: what is in memory beside the live model while the merged one is written
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
# Most that one layer may differ from the live one for the same input: bfloat16 rounds a weight by up to 0.4 %.
LAYER_TOLERANCE = 0.01
# Most rows with another completion: near ties fall otherwise under rounding, now and then in a long one.
OTHER_COMPLETIONS = 0.2
# Logits are compared on so many rows, at so many tokens of each: 4 MB per row with Phi-3's 32,064 words.
LOGIT_ROWS, LOGIT_TOKENS = 64, 32


@dataclass(frozen=True)
class Observed:
    """
    How a model behaves on the held-out rows.

    Args:
        logits (`torch.Tensor` of shape `(positions, vocab_size)`): Where the first supervised tokens are predicted.
        completions (`list[Completion]`): Greedy, one per row.
        scores (`dict`): Their scores.
        settings (`dict`): How it generates, and when it stops: generation_config.json.
    """

    logits: torch.Tensor
    completions: list[Completion]
    scores: dict[str, Any]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """
    A merge that lies aside.

    Args:
        base (`str`): What was merged into, `quantised` or `original`.
        live ([`Observed`]): The live adapter on that base.
        merged ([`Observed`]): The merged model, loaded from disk.
        layers (`dict[str, float]`): Of each adapted layer the relative error ([`layer_errors`]).
        files (`dict[str, str]`): SHA-256 of each file, taken before the merged model was loaded from them.
    """

    base: str
    live: Observed
    merged: Observed
    layers: dict[str, float]
    files: dict[str, str]

    @cached_property
    def comparison(self) -> "Comparison":
        """Of the merged model with the live adapter."""
        return compare(self.live, self.merged)


@dataclass(frozen=True)
class Comparison:
    """
    How far a model is from the one that it should equal.

    Args:
        positions (`int`): Predicted tokens compared.
        max_difference (`float`): Largest difference of a logit.
        mean_difference (`float`): Mean absolute difference of a logit.
        relative_error (`float`):
            Norm of the difference over the norm of the logits; of both the mean over the vocabulary is taken off,
            which no probability depends on.
        same_next_token (`float`): Share of positions at which both prefer the same token.
        rows (`int`): Completions compared.
        same_completions (`int`): Those that are equal, token by token.
    """

    positions: int
    max_difference: float
    mean_difference: float
    relative_error: float
    same_next_token: float
    rows: int
    same_completions: int


def merge(recipe: Recipe) -> Path:
    """
    Merges what a run trained, proves it, and only then gives it its name.

    Args:
        recipe ([`Recipe`]): The recipe of the run. Its `merge_*` and `compare_bases` say how.

    Returns:
        `Path`: `output_dir/merged`; its `merge_report.json` says what was compared, and the hash of each file.

    Raises:
        ValueError: If there is nothing to merge, no room for it, or the merged model differs too much.
    """
    check_machine(recipe)
    if PartialState().num_processes > 1:
        raise ValueError(f"merge runs in one process, without a launcher: python -m sft_phi3v.merge {recipe.path}")
    folder = trained_folder(recipe)
    target = Path(str(recipe.training.output_dir)) / "merged"
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{str(target)!r} is not a folder. The merged model goes there: move it away.")
    with FileLock(target.with_name(".merge.lock"), blocking=False):
        collator, held_out_rows = prepare_held_out(recipe)
        rows = Evaluation(recipe, collator.processor, None, held_out_rows, most=recipe.publish.merge_rows)
        trained, attempt = attempt_merge(recipe, folder, target, rows, collator)
        _conclude(recipe, folder, target, trained, attempt)
    log_merged(recipe, target)
    print(f"\n{rows.table()}\n\n{summary(target)}")
    return target


def _conclude(recipe: Recipe, folder: Path, target: Path, trained: Observed, attempt: Attempt) -> None:
    """Writes the report, and calls the attempt merged, or refused."""
    aside, problems = _aside(target, attempt.base), differences(attempt, recipe.publish.merge_tolerance)
    report = {
        "verified": not problems,
        "problems": problems,
        "tolerance": recipe.publish.merge_tolerance,
        "merged_into": attempt.base,
        "layers": {"adapted": len(attempt.layers), "max_relative_error": max(attempt.layers.values(), default=0.0)},
        "against_live_adapter": asdict(attempt.comparison),
        "against_trained_model": asdict(compare(trained, attempt.merged)),
        "scores": {"trained": trained.scores, "merged": attempt.merged.scores},
        "adapter": trained_hashes(folder),
        "files": attempt.files,
    }
    write_whole(aside / REPORT, json.dumps(report, indent=2) + "\n")
    if problems:
        refused = target.with_name("merged.refused")
        _rename(aside, refused)
        raise ValueError(
            "The merged model does not equal the one that was trained, and is not called merged:\n- "
            + "\n- ".join(problems)
            + f"\nIt lies in {refused}, to be looked at. The limit is `merge_tolerance: {report['tolerance']}`."
        )
    _rename(aside, target)


def _aside(target: Path, base: str) -> Path:
    return target.with_name(f".{target.name}.{base}")


def attempt_merge(
    recipe: Recipe, folder: Path, target: Path, rows: Evaluation, collator: Collator
) -> tuple[Observed, Attempt]:
    """
    Merges aside, and observes the live models and the merged ones, one model in memory at a time.

    Args:
        recipe ([`Recipe`]): The recipe of the run.
        folder (`Path`): Holds the adapter.
        target (`Path`): What will be called merged; the attempt lies beside it.
        rows ([`Evaluation`]): The held-out rows.
        collator ([`Collator`]): Makes their batches.

    Returns:
        `tuple[Observed, Attempt]`: The model that was trained, and the merge into the base that the recipe chooses.
    """
    quantised = recipe.model.load_in_4bit or recipe.model.load_in_8bit
    bases = ["quantised", "original"] if quantised else ["original"]
    chosen = recipe.publish.merge_base if quantised else "original"
    wanted = bases if recipe.publish.compare_bases else [chosen]
    live: dict[str, Observed] = {}
    attempts: dict[str, Attempt] = {}
    for base in bases:  # first of all the one that was trained on
        aside = _aside(target, base)
        shutil.rmtree(aside, ignore_errors=True)  # of an attempt that was cut
        if live and base not in wanted:
            continue
        model = load_trained(recipe, folder, quantised=base == "quantised")
        live[base] = observe(f"adapter on the {base} base" if live else "trained", model, rows, collator)
        layers = {}
        if base in wanted:
            write_model(model, aside)
            complete(recipe, folder, collator, aside)
            layers = layer_errors(model, aside)
        del model
        gc.collect()  # a model is full of reference cycles, and the next one needs its room
        if base in wanted:
            name, files = f"merged into the {base} base" if quantised else "merged", file_hashes(aside, "**/*")
            processor = Phi3VProcessor.from_pretrained(aside)  # what others will read, not what is in memory
            merged = observe(
                name,
                on_device(load_model(recipe, str(aside), quantised=False)),
                rows,
                replace(collator, processor=processor),
            )
            attempts[base] = Attempt(base, live[base], merged, layers, files)
            gc.collect()
        if base != chosen:
            shutil.rmtree(aside, ignore_errors=True)
    return live[bases[0]], attempts[chosen]


def observe(name: str, model: Phi3VForCausalLM | PeftModel, rows: Evaluation, collator: Collator) -> Observed:
    """
    Args:
        name (`str`): What the scores are called in the table.
        model ([`Phi3VForCausalLM`] or `PeftModel`): The model.
        rows ([`Evaluation`]): The held-out rows.
        collator ([`Collator`]): Makes their batches, one row each: no padding plays a part.

    Returns:
        [`Observed`]: How it behaves.
    """
    rows.processor = collator.processor
    scores = rows.run(name, model.eval())
    logits = []
    with torch.no_grad(), rows.precision(model):
        for index in range(min(LOGIT_ROWS, len(rows.examples))):
            batch = {key: value.to(model.device) for key, value in collator([rows.examples[index]]).items()}
            labels = batch.pop("labels")[0]
            predicting = torch.nonzero(labels[1:] != IGNORED).flatten()[:LOGIT_TOKENS]
            logits.append(model(**batch, logits_to_keep=predicting).logits[0].float().cpu())
    settings = model.generation_config.to_diff_dict()
    settings = {
        key: value for key, value in settings.items() if key not in ("_from_model_config", "transformers_version")
    }
    return Observed(torch.cat(logits), rows.completions[name], scores, settings)


def compare(expected: Observed, found: Observed) -> Comparison:
    """Numbers for what two models have in common."""
    wanted, got = _centred(expected.logits), _centred(found.logits)
    difference = (expected.logits - found.logits).abs()
    same = expected.logits.argmax(dim=-1) == found.logits.argmax(dim=-1)
    return Comparison(
        positions=len(wanted),
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        relative_error=((wanted - got).norm() / wanted.norm()).item(),
        same_next_token=same.double().mean().item(),
        rows=len(expected.completions),
        same_completions=sum(a == b for a, b in zip(expected.completions, found.completions, strict=True)),
    )


def _centred(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.double()
    return logits - logits.mean(dim=-1, keepdim=True)


def differences(attempt: Attempt, tolerance: float) -> list[str]:
    """
    What is beyond the tolerance, in words.

    Args:
        attempt ([`Attempt`]): The live model and the merged one.
        tolerance (`float`): Relative error of the logits, share of other next tokens, change of any score.

    Returns:
        `list[str]`: One line per difference; none if the models are the same within the tolerance.
    """
    numbers = attempt.comparison
    problems = []
    wrong = [name for name, error in attempt.layers.items() if not error <= LAYER_TOLERANCE]  # nan too
    if wrong:
        problems.append(
            f"layers: {len(wrong)} of {len(attempt.layers)} give something else than the live ones, such as {wrong[0]} "
            f"(relative error {attempt.layers[wrong[0]]:.2%}, limit {LAYER_TOLERANCE:.0%})"
        )
    if not numbers.relative_error <= tolerance:
        problems.append(
            f"logits: relative error {numbers.relative_error:.2%} (largest difference {numbers.max_difference:.3g}, "
            f"mean {numbers.mean_difference:.3g}, {numbers.positions} positions)"
        )
    if 1 - numbers.same_next_token > max(tolerance, 1 / numbers.positions):
        other = 1 - numbers.same_next_token
        problems.append(f"next token: another one at {other:.2%} of {numbers.positions} positions")
    if (others := numbers.rows - numbers.same_completions) > max(1, OTHER_COMPLETIONS * numbers.rows):
        problems.append(f"completions: others in {others} of {numbers.rows} rows")
    if attempt.live.settings != attempt.merged.settings:
        problems.append(f"generation_config: {attempt.merged.settings}, expected {attempt.live.settings}")
    allowed = max(1, tolerance * numbers.rows)
    before, after = _flat_scores(attempt.live.scores), _flat_scores(attempt.merged.scores)
    for name, share in before.items():
        if abs(share - after[name]) * numbers.rows > allowed + 1e-6:
            problems.append(f"{name}: {share:.1%} → {after[name]:.1%} of {numbers.rows} rows")
    return problems


def layer_errors(model: Phi3VForCausalLM | PeftModel, folder: Path) -> dict[str, float]:
    """
    Sends the same numbers through each adapted layer, live, and through its weight as it was written.

    Layer by layer there is no depth that errors could grow through, as they do in logits: what is forgotten or scaled
    wrongly shows, even where the adapter has changed little.

    Args:
        model ([`Phi3VForCausalLM`] or `PeftModel`): The live model.
        folder (`Path`): Where [`write_model`] wrote it.

    Returns:
        `dict[str, float]`: Norm of the difference over the norm of the live layer's output, by the layer's name.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    on_disk = {inner: name for name, (inner, _) in disk_weights(base.config).items()}
    files: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        file = safe_open(path, "pt")
        files |= dict.fromkeys(file.keys(), file)
    random = torch.Generator().manual_seed(0)
    errors = {}
    with torch.no_grad():
        for name, layer in base.named_modules():
            if isinstance(layer, LoraLayer):
                numbers = torch.randn(64, layer.in_features, generator=random).to(model.device, base.dtype)
                expected = layer(numbers).float()
                disk_name = on_disk[f"{name}.weight"]
                weight = files[disk_name].get_tensor(disk_name).to(expected)
                bias = layer.get_base_layer().bias
                found = nn.functional.linear(numbers.float(), weight, None if bias is None else bias.float())
                errors[name] = ((found - expected).norm() / expected.norm()).item()
    return errors


def _flat_scores(scores: dict[str, Any]) -> dict[str, float]:
    """Every score that is a share of the rows."""
    flat = {name: scores[name] for name in ("parsed", "stopped")}
    for field, found in scores["fields"].items():
        flat |= {f"{field}: {kind}": share for kind, share in found.items() if kind in ("exact", "within_10pct")}
    return flat


def write_model(model: Phi3VForCausalLM | PeftModel, folder: Path) -> None:
    """
    Writes a model with its adapter merged: bfloat16, in shards, under Microsoft's names.

    Beside the model, one shard is in memory at a time.

    Args:
        model ([`Phi3VForCausalLM`] or `PeftModel`): The live model, quantised or not, with adapter or without.
        folder (`Path`): Made; gets weights, config.json and generation_config.json.

    Raises:
        ValueError: If the disk has no room, or a weight of the model has no source.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype, config.architectures = DTYPE, ["Phi3VForCausalLM"]
    sources, weights = dict(_sources(base)), disk_weights(config)
    if missing := sorted(sources.keys() ^ {inner for inner, _ in weights.values()}):
        raise ValueError(f"{len(missing)} weights cannot be merged, such as {missing[0]!r}: this is a defect here.")
    split = split_state_dict_into_shards_factory(
        {name: weight for name, (_, weight) in sorted(weights.items())},
        get_storage_size=lambda weight: weight.numel() * DTYPE.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )
    size = split.metadata["total_size"]
    folder.mkdir(parents=True)
    if (free := shutil.disk_usage(folder).free) < 1.01 * size:
        folder.rmdir()
        raise ValueError(
            f"output_dir: the merged model takes {size / 1e9:.1f} GB, and the disk of {str(folder.parent)!r} has "
            f"{free / 1e9:.1f} GB free. Make room, or give another `output_dir`."
        )
    with torch.no_grad():
        for file, names in split.filename_to_tensors.items():
            shard = {name: sources[weights[name][0]]().to("cpu", DTYPE).contiguous() for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            del shard  # before the next one is made
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)


def disk_weights(config: Phi3VConfig) -> dict[str, tuple[str, torch.Tensor]]:
    """
    Args:
        config ([`Phi3VConfig`]): Of the model.

    Returns:
        `dict[str, tuple[str, torch.Tensor]]`: For each weight's name on disk, which is Microsoft's, its name in memory,
        and an empty tensor of its shape.
    """
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    inner = {id(weight): name for name, weight in model.state_dict(keep_vars=True).items()}
    on_disk = revert_weight_conversion(model, model.state_dict(keep_vars=True))
    return {name: (inner[id(weight)], weight) for name, weight in on_disk.items()}


def _sources(base: Phi3VForCausalLM) -> list[tuple[str, Callable[[], torch.Tensor]]]:
    """Each weight's name in memory, and what computes it."""
    found: list[tuple[str, Callable[[], torch.Tensor]]] = []
    wrapped: list[str] = []  # modules whose inside is PEFT's
    for name, module in base.named_modules():
        if any(name.startswith(f"{outer}.") for outer in wrapped):
            continue
        if isinstance(module, LoraLayer):
            wrapped.append(name)
            found.append((f"{name}.weight", partial(_merged_weight, module)))
            inner = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            wrapped.append(name)
            inner = module.modules_to_save[module.active_adapters[0]]
            found += [(f"{name}.{key}", partial(_kept, weight)) for key, weight in inner.state_dict().items()]
            continue
        else:
            inner = module
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                found.append((f"{name}.weight", partial(dequantize_module_weight, module)))
        for key, weight in inner.named_parameters(recurse=False):
            if key != "weight":
                found.append((f"{name}.{key}", partial(_kept, weight)))
    return found


def _kept(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _merged_weight(layer: LoraLayer) -> torch.Tensor:
    """`(out, in)`, float32: what the layer multiplies by, its adapter included."""
    (adapter,) = layer.active_adapters
    weight = dequantize_module_weight(layer.get_base_layer()).float()
    if adapter in layer.lora_variant:  # DoRA: rescales the sum
        return layer.lora_variant[adapter].merge_safe(layer, adapter, weight)
    return weight + layer.get_delta_weight(adapter).float()


def complete(recipe: Recipe, trained: Path, collator: Collator, folder: Path) -> None:
    """
    Adds what a folder needs beside the weights to be used by others.

    Args:
        recipe ([`Recipe`]): The recipe of the run.
        trained (`Path`): Folder of the adapter; its run's recipe.yaml comes along, without local paths.
        collator ([`Collator`]): Has the processor.
        folder (`Path`): The merged folder.
    """
    collator.processor.save_pretrained(str(folder))
    (folder / "recipe.yaml").write_text(public_recipe(recipe, trained), encoding="utf-8")
    for name in LICENCES:
        found = base_file(recipe, name)
        if found is not None:
            shutil.copyfile(found, folder / name)


def _rename(aside: Path, target: Path) -> None:
    """Puts a folder in another's place; a reader finds the one or the other, or for a moment none, never a mixture."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(aside, target)
    shutil.rmtree(old, ignore_errors=True)


def summary(folder: Path) -> str:
    """What the report of a merged folder says, for people."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    found = report["against_live_adapter"]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    lines = [
        f"merged and verified: {folder} ({size / 1e6:,.1f} MB)",
        f"  each of {report['layers']['adapted']} adapted layers equal to the live one within "
        f"{report['layers']['max_relative_error']:.2%} (limit {LAYER_TOLERANCE:.0%})",
        f"  logits against the live adapter: relative error {found['relative_error']:.2%} (limit "
        f"{report['tolerance']:.0%}), largest difference {found['max_difference']:.3g}, mean "
        f"{found['mean_difference']:.3g}",
        f"  next token equal at {found['same_next_token']:.2%} of {found['positions']} positions",
        f"  completions equal in {found['same_completions']} of {found['rows']} rows",
    ]
    if report["merged_into"] == "original" and report["against_trained_model"] != found:
        against = report["against_trained_model"]
        lines.append(
            f"  but against the model that was trained, on its quantised base: relative error "
            f"{against['relative_error']:.2%}, completions equal in {against['same_completions']} of {against['rows']}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """`python -m sft_phi3v.merge RECIPE [--key value …]`"""
    try:
        merge(load_recipe(sys.argv[1:] if argv is None else argv))
    except Timeout:
        raise SystemExit("error: this run is being merged already, by another process.") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted: what was merged before, if anything, is as it was.") from None


if __name__ == "__main__":
    main()
