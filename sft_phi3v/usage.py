"""What is answered before torch and TRL are imported, which takes seconds: `--help`, and words that cannot be right.

Every verb asks here first when it is run, and only then imports what it needs. An imported module asks nothing.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from sft_phi3v.recipe import Parser, read_given


def check_recipe() -> None:
    """Ends the process, if the command line asks for help or names no recipe that can be read."""
    try:
        read_given()
    except ValueError as error:
        raise SystemExit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1) from None


def generate_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """
    The options of `python -m sft_phi3v.generate`.

    Args:
        argv (sequence of `str`, *optional*): `sys.argv[1:]` by default.

    Returns:
        `argparse.Namespace`: What was typed.

    Raises:
        SystemExit: After `--help`, and if what was typed cannot be right.
    """
    parser = Parser(
        prog="python -m sft_phi3v.generate",
        description="Asks a trained model about pictures.",
        allow_abbrev=False,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="pictures, folders of pictures, .jsonl files")
    parser.add_argument("--model", required=True, help="an adapter's or merged folder, or a Hub id")
    parser.add_argument("--base_model", help="where an adapter's base model lies, if it has moved")
    parser.add_argument("--prompt", help="what to ask (default: the recipe's `prompt`)")
    parser.add_argument("--output", metavar="FILE", help="write there; .jsonl: with fields (default: the terminal)")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="longest answer (default: the recipe's)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="prompts at once (default: the recipe's)")
    parser.add_argument("--num_crops", type=int, metavar="N", help="most crops per picture (default: as trained)")
    options = parser.parse_args(argv)
    for name in ("max_new_tokens", "batch_size", "num_crops"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, expected 1 or more.")
    if missing := [given for given in options.inputs if not Path(given).expanduser().exists()]:
        parser.error(
            f"{missing[0]}: there is no such file. Expected a picture, a folder of pictures, or a .jsonl file."
        )
    return options
