"""The whole job at toy size, on a CPU and without network: `make demo`.

Draws a sample catalogue, launches the very command that a real run is launched with, on `recipes/tiny.yaml`, and says
what happened. Nothing here knows how training works.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sft_phi3v.catalogue import write_catalogue
from sft_phi3v.recipe import load_recipe

RECIPE = "recipes/tiny.yaml"


def ensure_catalogue(folder: Path) -> None:
    """Draws the catalogue that the recipe names, unless it is there; an interrupted drawing leaves nothing behind."""
    if folder.is_dir():
        return
    aside = folder.with_name(f".{folder.name}.drawing")
    shutil.rmtree(aside, ignore_errors=True)
    write_catalogue(aside)
    aside.rename(folder)


def summary(metrics: dict[str, Any], completions: list[dict[str, Any]], output_dir: str, minutes: float) -> str:
    """
    What a reader should know when the demo has ended.

    Args:
        metrics (`dict`): `metrics.json` of the run.
        completions (`list[dict]`): Its `completions.jsonl`.
        output_dir (`str`): Where both lie.
        minutes (`float`): How long the run took.

    Returns:
        `str`: Some lines of text.
    """

    parsed = {name: f"{scores['parsed']:.0%}" for name, scores in metrics.items()}
    category = {name: f"{scores['fields']['category3_code']['exact']:.0%}" for name, scores in metrics.items()}
    price = {name: f"{scores['fields']['full_price']['within_10pct']:.0%}" for name, scores in metrics.items()}
    example = completions[0]
    return f"""
What happened, in {minutes:.1f} minutes on this CPU:
  A tiny Phi-3-Vision that could only caption pictures learned, by 4-bit QLoRA, to answer in the recipe's own form.
  Of {len(completions)} held-out pictures, scored by free generation, before → after:
    answers in the right form   {parsed["before"]} → {parsed["after"]}
    category right              {category["before"]} → {category["after"]}   (the commonest: {category["baseline"]})
    price within 10 %           {price["before"]} → {price["after"]}   (the median: {price["baseline"]})
    category, pictures swapped  {category["after_shuffled"]}   (a model that looks falls to the commonest)

  For example, row {example["row"]}:
    reference  {example["reference"]}
    before     {example["before"]["text"]}
    after      {example["after"]["text"]}

Where the files are: {output_dir}/
  metrics.json, completions.jsonl   the scores, and every answer behind them
  adapter_model.safetensors         what was learned; the processor lies beside it
  recipe.yaml, environment.json     what exactly was run, and on what

What to type next, for the real model and a GPU:
  .venv/bin/python -m sft_phi3v.preview recipes/burberry.yaml            # what it needs, and what would be trained on
  .venv/bin/accelerate launch sft_phi3v/run.py recipes/burberry.yaml     # train it
"""


def main() -> None:
    """`python -m sft_phi3v.demo`"""
    try:
        recipe = load_recipe([RECIPE])
    except ValueError as error:
        raise SystemExit(f"error: {error}\nThe demo runs in the folder that holds {RECIPE}.") from None
    ensure_catalogue(Path(str(recipe.script.dataset_name)))
    start = time.monotonic()
    output_dir = Path(str(recipe.training.output_dir))
    shutil.rmtree(output_dir, ignore_errors=True)  # the demo starts over; a real run never removes anything
    threads = min(4, os.cpu_count() or 1)  # the launcher's own default is one
    command = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    command += ["--config_file", "accelerate_configs/single.yaml", "--num_cpu_threads_per_process", str(threads)]
    if status := subprocess.run([*command, "sft_phi3v/run.py", RECIPE]).returncode:
        raise SystemExit(status)
    metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    lines = (output_dir / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    minutes = (time.monotonic() - start) / 60
    print(summary(metrics, [json.loads(line) for line in lines], str(output_dir), minutes))


if __name__ == "__main__":
    main()
