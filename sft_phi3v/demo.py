"""The whole job at toy size, on a CPU and without network: `make demo`.

Draws a sample catalogue, launches the very command that a real run is launched with, on `recipes/tiny.yaml`, and says
what happened. Nothing here knows how training works.

With `--source` it writes data to rehearse `prepare` on instead: see `--help`.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from sft_phi3v.catalogue import write_catalogue
from sft_phi3v.recipe import Parser, load_recipe
from sft_phi3v.samples import FAULTS, FORMS, Planted, Server, source_path, write_source

RECIPE = "recipes/tiny.yaml"
PORT = 8765  # always the same: the URLs in a table that was served before still hold


def ensure_catalogue(folder: Path) -> None:
    """Draws the catalogue that the recipe names, unless it is there; an interrupted drawing leaves nothing behind."""
    if folder.is_dir():
        return
    aside = folder.with_name(f".{folder.name}.drawing")
    shutil.rmtree(aside, ignore_errors=True)
    write_catalogue(aside)
    aside.rename(folder)


def summary(
    metrics: dict[str, Any],
    completions: list[dict[str, Any]],
    report: dict[str, Any],
    output_dir: str,
    minutes: float,
) -> str:
    """
    What a reader should know when the demo has ended.

    Args:
        metrics (`dict`): `metrics.json` of the run.
        completions (`list[dict]`): Its `completions.jsonl`.
        report (`dict`): The merged model's `merge_report.json`.
        output_dir (`str`): Where both lie.
        minutes (`float`): How long the run took.

    Returns:
        `str`: Some lines of text.
    """

    parsed = {name: f"{scores['parsed']:.0%}" for name, scores in metrics.items()}
    category = {name: f"{scores['fields']['category3_code']['exact']:.0%}" for name, scores in metrics.items()}
    price = {name: f"{scores['fields']['full_price']['within_10pct']:.0%}" for name, scores in metrics.items()}
    example, proof = completions[0], report["against_live_adapter"]
    return f"""
What happened, in {minutes:.1f} minutes on this CPU:
  A tiny Phi-3-Vision that could only caption pictures learned, by 4-bit QLoRA, to answer in the recipe's own form.
  Of {len(completions)} held-out pictures, scored by free generation, before → after:
    answers in the right form   {parsed["before"]} → {parsed["after"]}
    category right              {category["before"]} → {category["after"]}   (the commonest: {category["baseline"]})
    price within 10 %           {price["before"]} → {price["after"]}   (the median: {price["baseline"]})
    category, pictures swapped  {category["after_shuffled"]}   (a model that looks falls to the commonest)
  Merged into one model and loaded again, it answers {proof["same_completions"]} of {proof["rows"]} as the trained one
  does (relative error of the logits {proof["relative_error"]:.2%}).

  For example, row {example["row"]}:
    reference  {example["reference"]}
    before     {example["before"]["text"]}
    after      {example["after"]["text"]}

Where the files are: {output_dir}/
  report.html                       all of this on one page, with the pictures
  metrics.json, completions.jsonl   the scores, and every answer behind them
  adapter_model.safetensors         what was learned; the processor lies beside it
  merged/                           the merged model, complete; merge_report.json says how it was checked
  recipe.yaml, environment.json     what exactly was run, and on what
  wandb/                            what W&B would show; `wandb sync` uploads it

What to type next:
  .venv/bin/python -m sft_phi3v.generate --model {output_dir}/merged PICTURE        # ask it about a picture
  .venv/bin/python -m sft_phi3v.hub {RECIPE} --hub_model_id me/tiny --dry_run true  # what would be published
And for the real model and a GPU:
  .venv/bin/python -m sft_phi3v.preview recipes/burberry.yaml            # what it needs, and what would be trained on
  .venv/bin/accelerate launch sft_phi3v/run.py recipes/burberry.yaml     # train it

Now open this page in a browser: {Path(output_dir, "report.html").resolve().as_uri()}
"""


def run_demo() -> None:
    """Draws, trains, scores and says what happened."""
    try:
        recipe = load_recipe([RECIPE])
    except ValueError as error:
        raise SystemExit(f"error: {error}\nThe demo runs in the folder that holds {RECIPE}.") from None
    ensure_catalogue(Path(str(recipe.script.dataset_name)))
    start = time.monotonic()
    output_dir = Path(str(recipe.training.output_dir))
    shutil.rmtree(output_dir, ignore_errors=True)  # the demo starts over; a real run never removes anything
    threads = min(4, os.cpu_count() or 1)  # the launcher's own default is one
    train = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    train += ["--config_file", "accelerate_configs/single.yaml", "--num_cpu_threads_per_process", str(threads)]
    verbs = [[sys.executable, "-m", f"sft_phi3v.{verb}", RECIPE] for verb in ("merge", "report")]
    for command in ([*train, "sft_phi3v/run.py", RECIPE], *verbs):
        if status := subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode:
            raise SystemExit(status)
    report = json.loads((output_dir / "merged" / "merge_report.json").read_text(encoding="utf-8"))
    metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    lines = (output_dir / "completions.jsonl").read_text(encoding="utf-8").strip().split("\n")
    minutes = (time.monotonic() - start) / 60
    print(summary(metrics, [json.loads(line) for line in lines], report, str(output_dir), minutes))


def rehearse(form: str, output_dir: str, *, serve: bool = False, **options: Any) -> None:
    """
    Writes a source to rehearse `prepare` on, says what to type next, and serves its pictures until Ctrl-C.

    Args:
        form (`str`): One of [`~sft_phi3v.samples.FORMS`].
        output_dir (`str`): Where to write.
        serve (`bool`, *optional*, defaults to `False`): Whether the table holds URLs, which are served.
        **options: `port` and `latency` of [`~sft_phi3v.samples.Server`], and what
            [`~sft_phi3v.samples.write_source`] takes.

    Raises:
        ValueError: If an option is not right.
    """
    serving = {name: options.pop(name) for name in ("port", "latency") if name in options}
    if serving and not serve:
        raise ValueError(f"--{next(iter(serving))} needs --serve.")
    options.setdefault("rows", 1000)
    with ExitStack() as stack:
        server = stack.enter_context(Server(output_dir, **{"port": PORT, **serving})) if serve else None
        planted = write_source(output_dir, form, base_url=server.url if server else None, **options)
        print(what_next(form, output_dir, planted, options, server.url if server else None), flush=True)
        if server:
            try:
                _wait()
            except KeyboardInterrupt:
                print(f"\n{server.requests:,} requests, at most {server.peak:,} at once; {server.bytes / 1e6:,.1f} MB")


def _wait() -> None:
    threading.Event().wait()


def what_next(form: str, output_dir: str, planted: list[Planted], options: dict[str, Any], url: str | None) -> str:
    """
    What was written, and what to type next.

    Args:
        form (`str`): The form.
        output_dir (`str`): Where it lies.
        planted (`list[Planted]`): Its faults.
        options (`dict`): The other options that it was written with.
        url (`str`, *optional*): Where it is served.

    Returns:
        `str`: Some lines of text, the recipe's among them.
    """
    keys: dict[str, Any] = {"source": str(source_path(output_dir, form)), "dataset_name": "data/sample"}
    if form == "burberry":
        keys["source_image_column"] = ["imageurl"]
    elif options.get("pictures", 1) > 1:
        keys["source_image_column"] = ["image", *(f"image_{place}" for place in range(2, options["pictures"] + 1))]
    if form == "conversations":
        keys["answer"] = None
    if form == "classes":
        keys["answer"] = "Category: {label}"
    words = []
    for key, value in keys.items():
        words += [f"--{key}", *(value if isinstance(value, list) else ["null" if value is None else value])]
    lines = "".join(f"  {line}\n" for line in yaml.safe_dump(keys, sort_keys=False).splitlines())
    served = f"Its pictures are served at {url} until Ctrl-C.\n" if url else ""
    return f"""\
{output_dir}: {options["rows"]:,} rows ({form}: {FORMS[form].what})
{output_dir}/faults.json: {len(planted):,} rows with planted faults, and what manifest.parquet should say of them
{served}
What to type next{", in another terminal" if url else ""}:
  .venv/bin/python -m sft_phi3v.prepare {RECIPE} {shlex.join(words)}
The same as lines of a recipe:
{lines}"""


def _parser() -> Parser:
    forms = "\n".join(f"  {name:<14} {form.what}" for name, form in FORMS.items())
    faults = textwrap.fill(", ".join(FAULTS), 78, initial_indent="  ", subsequent_indent="  ")
    parser = Parser(
        prog="python -m sft_phi3v.demo",
        description="Without arguments: the whole job at toy size. With --source: data to rehearse `prepare` on.",
        epilog=f"forms:\n{forms}\n\nfaults, as far as a form has a place for them:\n{faults}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--source", dest="form", metavar="FORM", choices=FORMS, help="write a sample source (see below)"
    )
    parser.add_argument("--output_dir", metavar="FOLDER", help="where: a new folder")
    parser.add_argument("--rows", type=int, metavar="N", help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, metavar="N", help="another seed gives other pictures (default: 0)")
    parser.add_argument("--faults", type=float, metavar="SHARE", help="of rows with a planted fault (default: 0)")
    parser.add_argument("--kinds", nargs="+", metavar="FAULT", help="which faults to plant (default: all)")
    parser.add_argument("--distinct", type=int, metavar="N", help="draw so many, and vary them (default: draw all)")
    parser.add_argument("--pictures", type=int, metavar="N", help="picture columns (default: 1)")
    parser.add_argument("--serve", action="store_true", help="write URLs instead of paths, and serve them until Ctrl-C")
    parser.add_argument("--port", type=int, metavar="PORT", help=f"of the server (default: {PORT})")
    parser.add_argument("--latency", type=float, metavar="SECONDS", help="before every answer (default: 0)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m sft_phi3v.demo`"""
    parser = _parser()
    options = vars(parser.parse_args(argv))
    if not options:
        run_demo()
        return
    for name, option in (("form", "--source"), ("output_dir", "--output_dir")):
        if name not in options:
            parser.error(f"a sample source needs {option}: see --help.")
    try:
        rehearse(**options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
