"""How much faster held-out rows are scored in batches than one by one, on the same machine, with the same completions.

    python benchmarks/evaluation.py recipes/tiny.yaml --model outputs/tiny [--rows 200] [--batch_sizes 1 8 32]

Generates for rows of the recipe: held-out ones, and if there are too few, rows of the train split.
"""

import argparse
import statistics
import time

import torch
from datasets import concatenate_datasets

from sft_phi3v.data import load_splits, to_examples
from sft_phi3v.evaluation import generate
from sft_phi3v.model import load_named
from sft_phi3v.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--model", required=True, help="folder or Hub id of any model")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()

    recipe = load_recipe([options.recipe])
    train, held_out = load_splits(recipe)
    missing = max(0, options.rows - len(held_out))
    rows = concatenate_datasets([held_out, train.select(range(missing))]) if missing else held_out
    examples = to_examples(rows.select(range(options.rows)), recipe)
    model, processor = load_named(recipe, options.model)
    print(f"{options.rows} rows, {recipe.task.max_new_tokens} tokens at most, {torch.get_num_threads()} threads")
    first = None
    for size in options.batch_sizes:
        seconds = []
        for _ in range(options.repeat):
            start = time.perf_counter()
            # One by one: each row is read, answered and only then followed by the next.
            parts = [examples.select([index]) for index in range(len(examples))] if size == 1 else [examples]
            found = []
            for part in parts:
                found += generate(
                    model,
                    processor,
                    part,
                    max_new_tokens=recipe.task.max_new_tokens,
                    batch_size=size,
                    progress=False,
                )
            seconds.append(time.perf_counter() - start)
        first = first or (statistics.median(seconds), found)
        same = sum(one == other for one, other in zip(first[1], found, strict=True))
        middle = statistics.median(seconds)
        print(
            f"batches of {size:>3}: {middle:6.1f} s (of {', '.join(f'{one:.1f}' for one in seconds)}), "
            f"{options.rows / middle:5.1f} rows/s, {first[0] / middle:4.1f} times, {same} of {len(found)} completions "
            f"as with batches of {options.batch_sizes[0]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
