"""How fast a training step is, lever by lever, against the plain way in the same run; and against what the chip can do.

    python benchmarks/speed.py levers growth input generation compiled   # make bench: mid-size model, float32, CPU
    python benchmarks/speed.py train --size full                   # make bench-gpu: 4.15 billion random weights

A step is zero_grad, forward, backward and, in `train`, AdamW. The plain way: CLIP also reads the crops that pad a
picture to num_crops + 1, rows are padded to the longest, attention is eager, logits are made of all positions. Ways
take turns, so that what else the machine does hits all of them; one round warms up, medians are of the others.
"""

import argparse
import gc
import io
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from memory import Live
from models import SIZES, batch_of, examples, processor, random_model
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from sft_phi3v.collator import Collator, only_supervised
from sft_phi3v.estimate import Setting, Shape, weights_of
from sft_phi3v.fit import dequantised_bytes, flops_per_row
from sft_phi3v.phi3_v import SDPA_BY_ROW, Phi3VConfig
from sft_phi3v.phi3_v.modeling_phi3_v import Phi3VModel

STRIP, SQUARE, WIDE, TALL = (100, 1000), (1000, 1000), (1280, 720), (480, 640)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = Setting(dtype="float32", autocast=False, lora=False, checkpointing=False, cuda=False)


@dataclass(frozen=True)
class Way:
    """How a step is done; as it stands, the plain way."""

    name: str = "plain"
    padded_crops: bool = True
    padding_free: bool = False
    attention: str = "eager"
    supervised: bool = False  # whether only supervised positions go through the last layer and the head
    cached: bool = False  # whether image features are there already
    vision_batch: int | None = None


PLAIN = Way()
ALL = Way("all of them", padded_crops=False, padding_free=True, attention=SDPA_BY_ROW, supervised=True)
LEVERS: dict[str, dict[str, Any]] = {
    "only real crops": {"padded_crops": False},
    "sdpa": {"attention": "sdpa"},
    "no padding": {"padding_free": True, "attention": SDPA_BY_ROW},  # one of them makes no sense without the other
    "only supervised positions": {"supervised": True},
}


def without(lever: str) -> Way:
    """All levers but one."""
    undone = {key: getattr(PLAIN, key) for key in LEVERS[lever]}
    if lever == "sdpa":
        undone = {"attention": "eager", "padding_free": False}
    if lever == "no padding":
        undone = {"padding_free": False, "attention": "sdpa"}
    return replace(ALL, name=f"all but {lever}", **undone)


class Steps:
    """One model, in every way of taking a step on the same rows."""

    def __init__(self, config: Phi3VConfig, sizes: Sequence[tuple[int, int]], num_crops: int):
        self.model: Any = random_model(config, STEP, DEVICE, attention="sdpa")
        self.batches = {flat: batch_of(sizes, num_crops, padding_free=flat, device=DEVICE) for flat in (False, True)}
        self.num_crops = num_crops
        with torch.no_grad():
            whole = self.batches[False]
            self.features = self.model.get_image_features(whole["pixel_values"], whole["image_sizes"])

    def __call__(self, way: Way) -> float:
        """Takes a step; returns the loss."""
        model, batch = self.model, dict(self.batches[way.padding_free])
        for module in (model, model.model, model.model.language_model, model.model.vision_tower):
            module.config._attn_implementation = way.attention
        model.model.vision_batch_size = way.vision_batch
        model.zero_grad()
        with self._crops_padded() if way.padded_crops else nullcontext():
            if way.cached:
                with mock.patch.object(Phi3VModel, "get_image_features", lambda *_: self.features):
                    loss = self._loss(model, batch, way)
            else:
                loss = self._loss(model, batch, way)
        loss.backward()
        return float(loss.detach())

    @staticmethod
    def _loss(model: Any, batch: dict[str, Any], way: Way) -> torch.Tensor:
        if way.supervised:
            loss: torch.Tensor = model(**only_supervised(batch), fused_lm_head=True).loss
        else:
            loss = model(**batch).loss
        return loss

    @contextmanager
    def _crops_padded(self) -> Iterator[None]:
        """CLIP reads num_crops + 1 crops of each picture, as the original does."""
        original = Phi3VModel._vision_features
        counts = ((self.batches[False]["image_sizes"] // 336).prod(dim=1) + 1).tolist()

        def features(model: Phi3VModel, crops: torch.Tensor) -> torch.Tensor:
            filled = [
                torch.cat([one, one.new_zeros(self.num_crops + 1 - len(one), *one.shape[1:])])
                for one in crops.split(counts)
            ]
            found = original(model, torch.cat(filled)).unflatten(0, (len(counts), -1))
            return torch.cat([one[:count] for one, count in zip(found, counts, strict=True)])

        with mock.patch.object(Phi3VModel, "_vision_features", features):
            yield


def timed(step: Callable[[Any], Any], ways: Sequence[Any], rounds: int) -> list[list[float]]:
    """Seconds of each way, in rounds; the first round is not among them."""
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, found in zip(ways, seconds, strict=True):
            gc.collect()
            start = time.perf_counter()
            step(way)
            _synchronise()
            if number:
                found.append(time.perf_counter() - start)
    return seconds


def _synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def spread(seconds: Sequence[float]) -> str:
    """Median, and what it lies between."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} – {max(seconds):.2f})"


def compare(steps: Steps, ways: Sequence[Way], rounds: int) -> None:
    """A table of ways against the first of them: seconds, memory, and the loss, which must be the same."""
    losses, gradients, peaks = [], [], []
    for way in ways:
        # The gradients of the last way are gone when memory is counted: each way makes its own.
        steps.model.zero_grad(set_to_none=True)
        live = Live(iter([*steps.model.parameters(), *steps.model.buffers(), steps.features]))
        with live:
            losses.append(steps(way))
        peaks.append(live.peak)
        gradients.append([one.grad.clone() for one in steps.model.parameters() if one.grad is not None])
    stored = sum(one.numel() * one.element_size() for one in steps.model.parameters())
    seconds = timed(steps, ways, rounds)
    first = statistics.median(seconds[0])
    print("| way | seconds | times as fast | GB | loss | gradients differ by |\n|---|---|---|---|---|---|")
    for way, found, loss, own, peak in zip(ways, seconds, losses, gradients, peaks, strict=True):
        worst = max(
            float((one - other).norm() / other.norm())
            for one, other in zip(own, gradients[0], strict=True)
            if other.any()
        )
        print(
            f"| {way.name} | {spread(found)} | {first / statistics.median(found):.2f} | {(stored + peak) / 1e9:.2f} | "
            f"{loss:.6f} | {worst:.0e} |",
            flush=True,
        )
        if abs(loss - losses[0]) > 1e-5 * abs(losses[0]) or worst > 1e-3:
            raise SystemExit(f"error: {way.name!r} does not compute the same: loss {loss} and {losses[0]}, {worst:.0e}")


def levers(options: argparse.Namespace) -> None:
    """Levers alone and together, on a strip of 10 crops and on four pictures of mixed shapes; then plain and all."""
    alone = [replace(PLAIN, name=name, **changes) for name, changes in LEVERS.items()]
    every = [PLAIN, *alone, *(without(name) for name in LEVERS), ALL]
    few = [replace(ALL, name=f"all, CLIP {size} crops at a time", vision_batch=size) for size in (1, 4)]
    cached = replace(ALL, name="all, and cached features", cached=True)
    four = [STRIP, SQUARE, WIDE, TALL]
    for title, sizes, num_crops, ways in (
        ("one picture of 100×1000 pixels, 16 crops at most", [STRIP], 16, [*every, *few, cached]),
        ("four pictures of mixed shapes, 4 crops at most", four, 4, [*every, cached]),
        ("four pictures of mixed shapes, 16 crops at most", four, 16, [PLAIN, ALL, cached]),
    ):
        steps = Steps(SIZES[options.size](), sizes, num_crops)
        tokens = [int(one) for one in steps.batches[True]["cu_seq_lens_q"].diff()]
        crops = int(((steps.batches[False]["image_sizes"] // 336).prod(dim=1) + 1).sum())
        print(f"\n{title}: {crops} real crops, rows of {', '.join(map(str, tokens))} tokens\n")
        compare(steps, ways, options.rounds)


def compiled(options: argparse.Namespace) -> None:
    """The same step with torch.compile for each decoder layer, and how long the first one then takes."""
    steps = Steps(SIZES[options.size](), [STRIP], options.num_crops)
    [plain] = timed(steps, [ALL], options.rounds)
    for layer in steps.model.model.language_model.layers:
        layer.compile()
    start = time.perf_counter()
    steps(ALL)
    first = time.perf_counter() - start
    [found] = timed(steps, [ALL], options.rounds)
    times = statistics.median(plain) / statistics.median(found)
    print("\n| | seconds | times as fast |\n|---|---|---|")
    print(f"| all levers | {spread(plain)} | 1.00 |\n| compiled | {spread(found)} | {times:.2f} |")
    print(f"\nthe first compiled step took {first:.0f} s", flush=True)


def growth(options: argparse.Namespace) -> None:
    """How a step grows: crops of a picture, rows of a batch, tokens of a row."""
    config = SIZES[options.size]()
    print("\n| crops | tokens | seconds | seconds per 1,000 tokens |\n|---|---|---|---|")
    for num_crops in (1, 2, 4, 9, 16):
        _grown(Steps(config, [SQUARE], num_crops), f"{num_crops}", options)
    print("\n| rows | tokens | seconds | seconds per 1,000 tokens |\n|---|---|---|---|")
    for rows in (1, 2, 4, 8, 16, 32):
        _grown(Steps(config, [SQUARE] * rows, 1), f"{rows}", options)
    print("\n| words of text in a row | tokens | seconds | seconds per 1,000 tokens |\n|---|---|---|---|")
    for words in (1_000, 2_000, 4_000, 8_000, 16_000, 32_000):
        steps = Steps(config, [SQUARE], 1)
        steps.batches[True] = longer(steps.batches[True], words)
        _grown(steps, f"{words:,}", options)


def longer(batch: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A flattened batch of one row, with so many tokens more behind its <s>."""
    ids = batch["input_ids"]
    filler = torch.arange(tokens, device=DEVICE).remainder(500).add(300).unsqueeze(0)
    made = {
        "input_ids": torch.cat([ids[:, :1], filler, ids[:, 1:]], dim=1),
        "labels": torch.cat([torch.full_like(filler, -100), batch["labels"]], dim=1),
    }
    length = ids.shape[1] + tokens
    bounds = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
    made |= {
        "position_ids": torch.arange(length, device=DEVICE).unsqueeze(0),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
    }
    return {**batch, **made, "max_length_q": length, "max_length_k": length}


def _grown(steps: Steps, label: str, options: argparse.Namespace) -> None:
    [seconds] = timed(steps, [ALL], options.rounds)
    tokens = steps.batches[True]["input_ids"].shape[1]
    print(
        f"| {label} | {tokens:,} | {spread(seconds)} | {1000 * statistics.median(seconds) / tokens:.2f} |", flush=True
    )


def input_(options: argparse.Namespace) -> None:
    """How long steps wait for their batches, which workers make meanwhile of pictures in JPEG files."""
    model: Any = random_model(SIZES[options.size](), STEP, DEVICE, attention=SDPA_BY_ROW)
    rows = examples([STRIP, SQUARE, WIDE, TALL])
    for row in rows:
        file = io.BytesIO()
        row["images"][0].save(file, "jpeg")
        row["images"] = [file]
    collator = Collator(processor(options.num_crops), padding_free=True)
    theirs = DataCollatorForVisionLanguageModeling(processor(options.num_crops), max_length=None)
    print("\n| collator, four rows | seconds | labels of | MB of pixels |\n|---|---|---|---|")
    for name, collate in (("TRL's own", theirs), ("ours", collator)):
        [seconds] = timed(lambda collate: opened(collate, rows), [collate], options.rounds)
        batch = opened(collate, rows)
        labels, pixels = batch["labels"], batch["pixel_values"]
        share = f"{int((labels != -100).sum()):,} of {labels.numel():,} positions"
        size = pixels.numel() * pixels.element_size() / 1e6
        print(f"| {name} | {spread(seconds)} | {share} | {size:.0f} |", flush=True)
    columns = "workers", "pictures/s that they make", "a step, seconds", "of these, waited for the batch"
    print(f"\n| {' | '.join(columns)} |\n|---|---|---|---|")
    for workers in (0, 1, 2):
        loader = DataLoader(rows * 8, batch_size=2, collate_fn=partial(opened, collator), num_workers=workers)
        arrived = [time.perf_counter() for _ in loader][4:]  # until then workers start, and there are batches in stock
        made = 2 * (len(arrived) - 1) / (arrived[-1] - arrived[0])
        waited, computed, start = list[float](), list[float](), time.perf_counter()
        for number, batch in zip(range(2 + options.rounds), loader, strict=False):
            got = time.perf_counter()
            model.zero_grad()
            moved = {key: one.to(DEVICE) if torch.is_tensor(one) else one for key, one in batch.items()}
            model(**only_supervised(moved), fused_lm_head=True).loss.backward()
            _synchronise()
            end = time.perf_counter()
            if number >= 2:
                waited.append(got - start)
                computed.append(end - got)
            start = end
        whole = sum(waited) + sum(computed)
        share = sum(waited) / whole
        print(f"| {workers} | {made:.0f} | {whole / len(waited):.2f} | {share:.1%} |", flush=True)


def opened(collator: Callable[[Any], Any], rows: Sequence[dict[str, Any]]) -> Any:
    """A batch of rows whose pictures are still files."""
    return collator([row | {"images": [Image.open(file) for file in row["images"]]} for row in rows])


def generation(options: argparse.Namespace) -> None:
    """Answers of 32 tokens to 8 rows of four shapes at 4 crops, half of them with a long question, in several ways."""
    model: Any = random_model(SIZES[options.size](), STEP, DEVICE, attention="sdpa").eval()
    made = processor(4)
    rows = examples([STRIP, SQUARE, WIDE, TALL] * 2)
    for number, row in enumerate(rows):
        row["messages"][0]["content"] = "What is shown in this image? " * (40 if number % 2 else 1)
    inputs = [
        {"text": row["messages"][0]["content"], "images": row["images"], "tokens": Collator(made).lengths(row).tokens}
        for row in rows
    ]

    def answer(way: tuple[int, bool, dict[str, Any]]) -> None:
        size, by_length, settings = way
        order = sorted(inputs, key=lambda row: row["tokens"]) if by_length else inputs
        for start in range(0, len(order), size):
            some = order[start : start + size]
            batch = made(
                text=[f"<|user|>\n<|image_1|>\n{row['text']}<|end|>\n<|assistant|>\n" for row in some],
                images=[row["images"] for row in some],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(DEVICE)
            with torch.no_grad():
                model.generate(
                    **batch, do_sample=False, max_new_tokens=32, min_new_tokens=32, use_cache=True, **settings
                )

    ways: dict[str, tuple[int, bool, dict[str, Any]]] = {
        "one row at a time": (1, False, {}),
        "4 rows, as they come": (4, False, {}),
        "4 rows of like length (what scoring does)": (4, True, {}),
        "and a static cache": (4, True, {"cache_implementation": "static"}),
    }
    seconds = timed(answer, list(ways.values()), options.rounds)
    first = statistics.median(seconds[0])
    print("\n| answers | seconds | times as fast |\n|---|---|---|")
    for name, found in zip(ways, seconds, strict=True):
        print(f"| {name} | {spread(found)} | {first / statistics.median(found):.2f} |", flush=True)


def bandwidth() -> float:
    """Bytes per second that are read and written here."""
    first, second = (torch.ones(1 << 28, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * first.numel() / min(timed(lambda _: second.copy_(first), [None], 5)[0])


def matrix_peak(dtype: torch.dtype, size: int) -> float:
    """Most operations per second that products of square matrices reach here."""
    first, second = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    seconds = timed(lambda _: first @ second, [None], 5)[0]
    return 2 * size**3 / min(seconds)


def train(options: argparse.Namespace) -> None:
    """QLoRA and LoRA, at 4 and 16 crops, by batch size: pictures, tokens and operations per second."""
    if options.size == "full" and DEVICE == "cpu":
        raise SystemExit("error: --size full needs a GPU: on a CPU, a step of 4.15 billion weights takes minutes.")
    config = SIZES[options.size]()
    autocast = DEVICE == "cuda"
    dtype = torch.bfloat16 if autocast else torch.float32
    peak, speed = matrix_peak(dtype, 8192 if autocast else 2048), bandwidth()
    print(
        f"\nproducts of matrices reach {peak / 1e12:.2f} TFLOP/s in {str(dtype).removeprefix('torch.')}, copies "
        f"{speed / 1e9:.0f} GB/s\n"
    )
    columns = ["crops", "rows", "seconds", "pictures/s", "tokens/s", "TFLOP/s", "of the peak", "without recomputation"]
    columns += ["floor, seconds", "GB"]
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    weights = weights_of(config)
    for name, bits in (("QLoRA", 4), ("LoRA", None)):
        for checkpointing in (True, False):
            setting = Setting(
                dtype=str(dtype).removeprefix("torch."), autocast=autocast, bits=bits, nested=bool(bits), rank=64,
                checkpointing=checkpointing, cuda=autocast,
            )  # fmt: skip
            model = random_model(config, setting, DEVICE, attention=options.attention)
            optimiser = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5, fused=True)
            for crops in (4, 16):
                for rows in options.rows:
                    label = name if checkpointing else f"{name}, no checkpointing"
                    _trained(label, model, optimiser, setting, weights, crops, rows, (peak, speed), options)
            del model, optimiser
            gc.collect()


def _trained(
    name: str,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    setting: Setting,
    weights: Any,
    crops: int,
    rows: int,
    limits: tuple[float, float],
    options: argparse.Namespace,
) -> None:
    peak, speed = limits
    batch = only_supervised(batch_of([SQUARE] * rows, crops, padding_free=True, device=DEVICE))
    config = model.get_base_model().config
    tokens, supervised = batch["input_ids"].shape[1], batch["shift_labels"].shape[1]
    images = int((batch["input_ids"] == config.image_token_id).sum())
    shape = Shape(rows, tokens // rows, images // rows, crops + 1, supervised // rows, (SQUARE,))
    flops = rows * flops_per_row(setting, config, weights, shape)
    once = rows * flops_per_row(replace(setting, checkpointing=False), config, weights, shape)
    floor = flops / peak + (dequantised_bytes(setting, config, weights) / speed if setting.bits else 0)

    def step(_: None) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=setting.autocast):
            loss = model(**batch, fused_lm_head=True).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        [seconds] = timed(step, [None], options.rounds)
    except torch.OutOfMemoryError:
        optimiser.zero_grad()
        print(f"| {name} | {crops} | {rows} | out of memory | | | | | | | |", flush=True)
        return
    middle = statistics.median(seconds)
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if DEVICE == "cuda" else "–"
    cells = [name, crops, rows, spread(seconds), f"{rows / middle:.2f}", f"{tokens / middle:,.0f}"]
    cells += [f"{flops / middle / 1e12:.2f}", f"{flops / middle / peak:.0%}", f"{once / middle / peak:.0%}"]
    print(f"| {' | '.join(map(str, cells))} | {floor:.2f} | {memory} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"levers": levers, "growth": growth, "input": input_, "generation": generation, "train": train}
    parts["compiled"] = compiled
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--size", choices=SIZES, default="mid", help="of the model; full is Phi-3-vision itself")
    parser.add_argument("--num_crops", type=int, default=16, help="of the pictures in `input` and `compiled`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2], help="batch sizes in `train`")
    parser.add_argument("--attention", default=SDPA_BY_ROW, help="`train`: or flash_attention_2")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    for part in options.parts:
        parts[part](options)


if __name__ == "__main__":
    main()
