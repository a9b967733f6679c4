"""What `make bench` and `make bench-gpu` run, at a tiny size: figures mean nothing, but losses must be the same."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PARTS = {"levers": 27, "growth": 17, "input": 5, "generation": 4, "train": 8}
pytestmark = pytest.mark.slow


def table_rows(name, *options):
    command = [sys.executable, str(BENCHMARKS / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return len(lines) - 2 * sum(line.startswith("|---") for line in lines)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_speed_fills_its_table(part):
    """`levers` ends in an error where a lever changes the loss or a gradient."""
    options = ("--size", "tiny", "--rounds", "1", "--num_crops", "2", "--rows", "1")
    assert table_rows("speed.py", part, *options) == PARTS[part]


def test_dequantising_is_measured():
    assert table_rows("dequantise.py", "--repeats", "1", "--tokens", "8") == 4
