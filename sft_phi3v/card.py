"""The model card: what was trained, on what, how well it does, shown on pictures, and how to use it.

Everything in it is read from the files that a run leaves behind, so that training, merging and publishing give the same
card. It names no path of this machine.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sft_phi3v.evaluation import read_json, read_lines, score_rows, trained_keys, verdict
from sft_phi3v.model import base_file, run_file
from sft_phi3v.recipe import Recipe

TEMPLATE = Path(__file__).with_name("model_card.jinja")
HUB_ID = re.compile(r"[a-zA-Z0-9][\w.-]{0,95}/[a-zA-Z0-9][\w.-]{0,95}", re.ASCII)


def render_card(
    recipe: Recipe, folder: Path, *, repo: str, adapter_only: bool = False, merge: dict[str, Any] | None = None
) -> str:
    """
    Args:
        recipe ([`Recipe`]): The recipe of the run.
        folder (`Path`): What the run left: metrics, completions, examples, environment. What is missing is left out.
        repo (`str`): Hub id under which it is published.
        adapter_only (`bool`, *optional*, defaults to `False`): Whether the files are an adapter's.
        merge (`dict`, *optional*): The merged model's `merge_report.json`.

    Returns:
        `str`: The text of README.md.
    """
    environment, keys = _read(folder, "environment.json"), trained_keys(recipe, folder)
    base = str(keys["model_name_or_path"])
    data = [entry["path"] for entry in keys.get("datasets", [])] or [keys.get("source") or keys["dataset_name"]]
    data = [name if HUB_ID.fullmatch(name) else Path(name).name for name in data]
    metrics, scored = _read(folder, "metrics.json"), True
    # A checkpoint, or weights that the adapter never met, is another model than the one that the run scored at its end.
    if folder.name.startswith("checkpoint-") or (
        merge and merge["against_live_adapter"] != merge["against_trained_model"]
    ):
        scored = False
        metrics = {name: scores for name, scores in metrics.items() if not name.startswith("after")}
        metrics |= {"after": merge["scores"]["merged"]} if merge and metrics else {}
    card_data = ModelCardData(
        model_name=repo.split("/")[-1],
        base_model=base if HUB_ID.fullmatch(base) else None,
        base_model_relation=("adapter" if adapter_only else "finetune") if HUB_ID.fullmatch(base) else None,
        datasets=[name for name in data if HUB_ID.fullmatch(name)] or None,
        language=recipe.publish.language or None,
        library_name="peft" if adapter_only else "transformers",
        license=licence(recipe),
        pipeline_tag="image-text-to-text",
        tags=["phi3_v", "sft", "trl", "sft_phi3v", *(["lora"] if recipe.model.use_peft else [])],
        eval_results=_results(metrics.get("after"), data) or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=repo.split("/")[-1],
        repo=repo,
        base=_link(base, ""),
        data=", ".join(_link(name, "datasets/") for name in data),
        rows=f"{environment['rows']['train']:,} " if "rows" in environment else "",
        prompt=_unescaped(recipe.task.prompt),
        answer=_unescaped(recipe.task.answer or ""),
        max_new_tokens=recipe.task.max_new_tokens,
        adapter_only=adapter_only,
        with_adapter=recipe.model.use_peft,
        quantisation=_quantisation(recipe),
        scored_rows=metrics["after"]["rows"] if "after" in metrics else 0,
        scores=_markdown(score_rows(metrics)) if "after" in metrics else "",
        verdict=verdict(metrics) if "better_than_before" in metrics.get("after", {}) else "",
        examples=_examples(folder) if scored and recipe.publish.card_examples else [],
        merge=merge,
        merge_scores=_markdown(score_rows(merge["scores"])) if merge else "",
        facts=training_facts(recipe, folder, base),
    )
    return str(card)


def _link(name: str, kind: str) -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if HUB_ID.fullmatch(name) else name


def _unescaped(template: str) -> str:
    """A format string as a person reads it: `{{` is a brace."""
    return template.replace("{{", "{").replace("}}", "}")


def licence(recipe: Recipe) -> str | None:
    """The licence to publish under: the recipe's `license`, or the one that the base model's card names."""
    if recipe.publish.license:
        return recipe.publish.license
    found = base_file(recipe, "README.md")
    try:
        return ModelCard.load(found, ignore_metadata_errors=True).data.license if found is not None else None
    except (ValueError, yaml.YAMLError):  # somebody else's card
        return None


def _results(scores: dict[str, Any] | None, data: list[str]) -> list[EvalResult]:
    """A model's scores as the Hub's metadata want them."""
    if scores is None:
        return []
    found = [("parsed", scores["parsed"]), ("stopped", scores["stopped"])]
    found += [(f"{field} {kind}", value) for field, kinds in scores["fields"].items() for kind, value in kinds.items()]
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=data[0] if HUB_ID.fullmatch(data[0]) else "local",
            dataset_name=f"{', '.join(data)} (held-out rows)",
            metric_type=re.sub(r"\W+", "_", name),
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, value in found
        if value is not None
    ]


def _examples(folder: Path) -> list[dict[str, str]]:
    """Rows whose pictures were kept, with reference and completion, as cells of a table."""
    completions = run_file(folder, "completions.jsonl")
    found = []
    for number, line in enumerate(read_lines(completions) if completions.is_file() else [], start=1):
        name = f"examples/{number}.jpg"
        if (run_file(folder, "examples") / f"{number}.jpg").is_file() and "after" in line:
            found.append(
                {"picture": name, "reference": _cell(line["reference"]), "completion": _cell(line["after"]["text"])}
            )
    return found


def _cell(text: str) -> str:
    """Any text as one cell of a Markdown table."""
    return " ".join(re.sub(r"([\\`*_{}\[\]<>|~#])", r"\\\1", text).split())


def _markdown(lines: list[list[str]]) -> str:
    header, *rows = [f"| {' | '.join(map(_cell, line))} |" for line in lines]
    return "\n".join([header, "|---" + "|---:" * (len(lines[0]) - 1) + "|", *rows])


def _quantisation(recipe: Recipe) -> str:
    if recipe.model.load_in_4bit:
        nested = ", double quantisation" if recipe.model.use_bnb_nested_quant else ""
        return f"4-bit {recipe.model.bnb_4bit_quant_type}{nested}"
    return "8-bit" if recipe.model.load_in_8bit else f"{recipe.model.dtype}"


def training_facts(recipe: Recipe, folder: Path, base: str) -> list[tuple[str, str]]:
    """
    Args:
        recipe ([`Recipe`]): The recipe of the run.
        folder (`Path`): What the run left.
        base (`str`): What the base model is called.

    Returns:
        `list[tuple[str, str]]`: What was run, how long, and on what, each with its name; what is not known is left out.
    """
    facts = [("base model", base)]
    environment, state = _read(folder, "environment.json"), _read(folder, "trainer_state.json")
    if revision := environment.get("base_revision"):
        facts.append(("its commit", revision))
    method = (
        f"LoRA of rank {recipe.model.lora_r} on {', '.join(recipe.task.adapt)}"
        if recipe.model.use_peft
        else "all weights"
    )
    facts.append(("method", f"{method}; base weights {_quantisation(recipe)}"))
    history: dict[str, Any] = {}
    for entry in state.get("log_history", []):
        history |= entry
    if steps := state.get("global_step"):
        facts.append(("steps", f"{steps:,} ({history.get('epoch', 0):.3g} epochs)"))
    if tokens := history.get("num_tokens"):
        facts.append(("tokens", f"{tokens:,.0f}, those of pictures among them"))
    if seconds := history.get("train_runtime"):
        facts.append(("time", f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"))
    if device := environment.get("device"):
        facts.append(("hardware", f"{environment['processes']} × {device}"))
    if packages := environment.get("packages"):
        facts.append(("versions", ", ".join(f"{name} {number}" for name, number in packages.items())))
    if commit := environment.get("commit"):
        facts.append(("commit of sft_phi3v", commit))
    return facts


def _read(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder or its run; empty if there is none."""
    return read_json(folder / name if (folder / name).is_file() else run_file(folder, name))
