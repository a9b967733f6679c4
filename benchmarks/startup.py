"""How long one waits: `python benchmarks/startup.py [--repeats 3]`.

Prints the seconds of each verb's `--help`, of importing each verb, and from the launch of `run.py` to the end of its
first step of training, on a small catalogue and `recipes/tiny_base`; what these went into is what the run itself says.
All run as processes of their own, in turns, and of each the fastest is shown. Importing is also shown in seconds of the
CPU, which a machine that does other things as well leaves as they are.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sft_phi3v.catalogue import write_catalogue

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "sft_phi3v"
VERBS = sorted(path.stem for path in PACKAGE.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
FEW_STEPS = ["--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none"]


def run(*words: str) -> tuple[float, float, str]:
    """Seconds of the clock and of the CPU that Python takes for these words, and what it prints."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended.stdout


def main() -> None:
    """`python benchmarks/startup.py`"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    repeats = parser.parse_args().repeats
    print("seconds     --help   import   (CPU)")
    for verb in VERBS:
        helped = [run("-m", f"sft_phi3v.{verb}", "--help") for _ in range(repeats)]
        imported = [run("-c", f"import sft_phi3v.{verb}") for _ in range(repeats)]
        clock, cpu = (min(one[which] for one in imported) for which in (0, 1))
        print(f"{verb:<11}{min(one[0] for one in helped):>7.2f}{clock:>9.2f}{cpu:>8.2f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = ["--dataset_name", str(write_catalogue(Path(folder, "catalogue"), rows=64, test_rows=16))]
        for number in range(repeats):
            output = ["--output_dir", str(Path(folder, f"run{number}"))]
            _, _, said = run("sft_phi3v/run.py", "recipes/tiny.yaml", *data, *output, *FEW_STEPS)
            print(re.search(r"started: .*", said)[0], flush=True)  # type: ignore[index]


if __name__ == "__main__":
    main()
