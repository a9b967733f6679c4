"""Reads the golden figures: the full set beside the repository where it is there, else the subset in tests/data."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
SUBSET = REPOSITORY / "tests" / "data" / "goldens"
FULL_SET = REPOSITORY.parent / "shared" / "reference" / "goldens"
GOLDENS = FULL_SET if FULL_SET.is_dir() else SUBSET
CHECKPOINTS = GOLDENS / "model" / "checkpoints"

IMAGE_TOKEN = 32044
PAD_TOKEN = 32000


def picture(file: str) -> Image.Image:
    return Image.open(GOLDENS / "image" / "inputs" / file)


def image_goldens() -> dict[str, dict]:
    """file name → its entry in expected.json, for the pictures that are there."""
    entries = json.loads((GOLDENS / "image" / "expected.json").read_text())["images"]
    return {entry["file"]: entry for entry in entries if (GOLDENS / "image" / "inputs" / entry["file"]).is_file()}


@functools.cache
def image_arrays() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "image" / "expected.safetensors")


def token_counts() -> list[list[int]]:
    """Rows [width, height, num_crops, padded height, padded width, image tokens]."""
    return json.loads((GOLDENS / "image" / "token_counts.json").read_text())["rows"]


def prompts() -> dict[str, dict]:
    return {case["id"]: case for case in json.loads((GOLDENS / "processor" / "prompts.json").read_text())["cases"]}


def expand_runs(row: list) -> list[int]:
    """[1, [-2, 3], 13] → [1, -2, -2, -2, 13]"""
    ids = []
    for item in row:
        ids += [item[0]] * item[1] if isinstance(item, list) else [item]
    return ids


def picture_order(row: list[int]) -> list[int]:
    """1-based picture numbers of a row in order of appearance, one for each run of the same negative id.

    [1, -2, -2, 13, -1, 13, -2] → [2, 1, 2]
    """
    return [-id for previous, id in zip([0, *row], row, strict=False) if id < 0 and id != previous]


def model_cases(*, generation: bool) -> list[str]:
    names = sorted(path.stem for path in (GOLDENS / "model" / "cases").glob("*.json"))
    return [name for name in names if name.startswith("gen_") == generation]


@functools.cache
def load_case(name: str) -> SimpleNamespace:
    """A model case: `.inputs` in the port's convention, `.expected` arrays and `.meta` scalars in the golden's.

    The reference marks pictures with negative ids and takes one entry per picture; the port takes `<|image|>` and one
    entry per appearance. Where the two released versions differ (`longrope_padswitch_1`), the expectation is that of
    Phi-3-Vision, which is also transformers' own rule: the highest position drives the longrope switch, not padding.
    A generation that crosses the switch differs too; there the expectation is Phi-3.5's, which recomputes its cache.
    """
    folder = GOLDENS / "model" / "cases"
    meta = json.loads((folder / f"{name}.json").read_text())
    arrays = load_file(folder / f"{name}.safetensors")
    expected = {key: value for key, value in arrays.items() if not key.startswith("phi3/")}
    if not meta["same_for_both"] and not name.startswith("gen_"):
        meta |= meta["phi3"]
        expected |= {key.removeprefix("phi3/"): value for key, value in arrays.items() if key.startswith("phi3/")}

    ids = arrays["input_ids"].long()
    inputs = {"input_ids": torch.where(ids < 0, IMAGE_TOKEN, ids)}
    for key in ("attention_mask", "position_ids", "labels"):
        if key in arrays:
            inputs[key] = arrays[key].long()
    if meta.get("image_sizes"):
        crops = case_crops(meta, arrays)
        order = []  # indices into the case's pictures, which restart at 1 in every row
        before = 0
        for row in ids.tolist():
            numbers = picture_order(row)
            order += [before + number - 1 for number in numbers]
            before += max(numbers, default=0)
        assert before == len(crops), "every picture of the case appears"
        inputs["pixel_values"] = torch.cat([crops[index] for index in order])
        inputs["image_sizes"] = torch.tensor([meta["image_sizes"][index] for index in order])
    return SimpleNamespace(name=name, meta=meta, inputs=inputs, expected=expected)


def case_crops(meta: dict, arrays: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Real crops of each picture of a case, float (crops, 3, 336, 336)."""
    if "images" in meta:  # end_to_end: the crops are what the image processor makes of the files
        from sft_phi3v.phi3_v import Phi3VImageProcessor

        processor = Phi3VImageProcessor(num_crops=meta["num_crops"])
        outputs = [processor(picture(file), return_tensors="pt") for file in meta["images"]]
        assert [output["image_sizes"].tolist()[0] for output in outputs] == meta["image_sizes"]
        return [output["pixel_values"] for output in outputs]
    bases = [arrays[f"pixel_base.{index}"] for index in range(len(meta["image_sizes"]))]
    return [base.repeat_interleave(12, -2).repeat_interleave(12, -1).float() / 64 - 2 for base in bases]


def padded_pixels(inputs: dict, *, crops: int, fill: float = 0.0) -> torch.Tensor:
    """`pixel_values` in the original's form (images, crops, 3, 336, 336), missing crops filled with `fill`."""
    counts = [(height // 336) * (width // 336) + 1 for height, width in inputs["image_sizes"].tolist()]
    padded = torch.full((len(counts), crops, 3, 336, 336), fill)
    for index, real in enumerate(inputs["pixel_values"].split(counts)):
        padded[index, : len(real)] = real
    return padded


def image_token_count(height: int, width: int) -> int:
    """Tokens of a padded picture: (crops + global) · 144 cells, a newline per row, one separator."""
    rows, columns = height // 336, width // 336
    return (rows * columns + 1) * 144 + 1 + (rows + 1) * 12
