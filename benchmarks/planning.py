"""How long `max_tokens_per_batch` plans, and how well: `python benchmarks/planning.py [--rows 1000 1000000]`.

Rows as of a catalogue at up to 16 crops: pictures of many sizes, whose tokens the image processor's own rule counts,
and 30 to 150 tokens of text; with `--data equal`, all pictures of one size; with `--data text`, conversations without
pictures, log-normal. The first lines are for rows that are padded to the longest of their batch, the others for rows
that are not. `fixed` is how full the same budget is with as many rows in each batch as the longest allows, drawn at
random, as `per_device_train_batch_size` has it.
"""

import argparse
import time

import numpy as np

from sft_phi3v.batches import plan_batches
from sft_phi3v.estimate import grid
from sft_phi3v.phi3_v.image_processing_phi3_v import num_image_tokens

CROPS = 16


def lengths_of(data: str, rows: int) -> np.ndarray:
    """Tokens of made-up rows."""
    draw = np.random.default_rng(rows)
    if data == "text":
        return np.clip(draw.lognormal(5.5, 0.8, rows).astype(np.int64), 20, 4096)
    text = draw.integers(30, 150, rows)
    if data == "equal":
        return text + num_image_tokens(*grid((800, 1000), CROPS))
    sizes = [(int(width), int(height)) for width, height in draw.integers(200, 1600, (1000, 2))]
    tokens = np.array([num_image_tokens(*grid(size, CROPS)) for size in sizes])
    return text + draw.choice(tokens, rows)


def fixed(lengths: np.ndarray, budget: int) -> float:
    """How full batches of a fixed number of rows are."""
    rows = max(1, budget // int(lengths.max()))
    return float(lengths.sum() / (np.ceil(len(lengths) / rows) * budget))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--budget", type=int, default=16_384)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--data", nargs="+", choices=["catalogue", "equal", "text"], default=["catalogue", "text"])
    arguments = parser.parse_args()
    print(f"at most {arguments.budget:,} tokens, {arguments.processes} processes")
    print(f"{'':<22}{'rows':>10}{'batches':>9}{'plan':>9}{'epoch':>9}{'full':>8}{'fixed':>8}{'apart':>8}")
    for data in arguments.data:
        for padded in (True, False):
            for rows in arguments.rows:
                lengths = lengths_of(data, rows)
                start = time.perf_counter()
                plan = plan_batches(lengths, arguments.budget, padded=padded, processes=arguments.processes)
                planned = time.perf_counter()
                next(plan.batches(0, 0, 0))
                ordered = time.perf_counter()
                print(
                    f"{data + (', padded' if padded else ', not padded'):<22}{rows:>10,}{len(plan.starts):>9,}"
                    f"{planned - start:>7.2f} s{ordered - planned:>7.2f} s{plan.full:>8.1%}"
                    f"{fixed(lengths, arguments.budget):>8.1%}{plan.imbalance:>8.2%}"
                )


if __name__ == "__main__":
    main()
