"""How long one core takes to make crops of a picture: `python benchmarks/preprocessing.py [--repeats 30]`.

Beside ours runs a straightforward implementation of the same steps, which are those of the original model's code: it
makes a tensor of the whole picture, normalises it out of place, and fills up with empty crops to the largest number.
Both run in turns on one thread, and must give the same bits. Times are of the CPU, the least of all repeats: whatever
else the machine does only adds to them. In training a worker does the first two parts and hands over bytes; the third
is left to the model's device.
"""

import argparse
import io
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from sft_phi3v.phi3_v import Phi3VImageProcessor
from sft_phi3v.phi3_v.image_processing_phi3_v import CROP, hd_transform, local_crops, normalised

CASES = [((1000, 1000), 16), ((100, 1000), 16), ((1000, 1000), 4)]  # width and height, num_crops


def drawn(size: tuple[int, int]) -> bytes:
    """A JPEG file with shapes and noise in it."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 20, size[0] // 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def decoded(file: bytes) -> Image.Image:
    """The picture in a file."""
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def straightforward(image: Image.Image, num_crops: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """The same steps one after the other: `(1 + num_crops, 3, 336, 336)`, the last crops empty."""
    image = image.convert("RGB")
    upright = image.width < image.height
    if upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio, scale = image.width / image.height, 1
    while scale * math.ceil(scale / ratio) <= num_crops:
        scale += 1
    width = (scale - 1) * CROP
    image = image.resize((width, int(width / ratio)), Image.Resampling.BILINEAR)
    missing = math.ceil(image.height / CROP) * CROP - image.height
    image = ImageOps.expand(image, (0, missing // 2, 0, missing - missing // 2), fill=(255, 255, 255))
    if upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    pixels = pixels.clone().sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))
    whole = torch.nn.functional.interpolate(pixels[None], size=(CROP, CROP), mode="bicubic")
    _, height, width = pixels.shape
    crops = pixels.reshape(1, 3, height // CROP, CROP, width // CROP, CROP).permute(0, 2, 4, 1, 3, 5)
    crops = torch.cat([whole, crops.reshape(-1, 3, CROP, CROP).contiguous()])
    empty = torch.zeros(1 + num_crops - len(crops), 3, CROP, CROP)
    return torch.stack([torch.cat([crops, empty]) if len(empty) else crops])[0]


def milliseconds(repeats: int, parts: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """CPU time of each part, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            start = time.process_time()
            part()
            times[name].append(1000 * (time.process_time() - start))
    return {name: min(found) for name, found in times.items()}


def measured(processor: Phi3VImageProcessor, size: tuple[int, int], num_crops: int, repeats: int) -> dict[str, float]:
    """Milliseconds of both implementations and of our parts, on one picture; both must give the same bits."""
    file = drawn(size)
    image = decoded(file)
    padded = hd_transform(image, num_crops)
    local = local_crops(padded)
    colours = {"mean": [*processor.image_mean], "std": [*processor.image_std]}
    parts = {
        "straightforward": lambda: straightforward(image, num_crops, **colours),
        "ours": lambda: processor(image, num_crops=num_crops, return_tensors="pt"),
        "hd_transform": lambda: hd_transform(image, num_crops),
        "local_crops": lambda: local_crops(padded),
        "normalised": lambda: normalised(local, **colours),
        "decoded": lambda: decoded(file),
    }
    expected, found = parts["straightforward"](), parts["ours"]()["pixel_values"]
    assert torch.equal(found, expected[: len(found)]) and not expected[len(found) :].any()
    return milliseconds(repeats, parts)


def main() -> None:
    """`python benchmarks/preprocessing.py`"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="default: %(default)s")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    processor = Phi3VImageProcessor()
    columns = "straightforward", "ours", "ratio", "a worker's part", "ratio", "resize, pad", "cut", "normalise, shrink"
    print(f"| ms of one core | {' | '.join(columns)} | (JPEG decoding) |\n|{'---|' * (len(columns) + 2)}")
    for size, num_crops in CASES:
        ms = measured(processor, size, num_crops, repeats)
        plain, ours, worker = ms["straightforward"], ms["ours"], ms["hd_transform"] + ms["local_crops"]
        cells = [f"{size[0]}×{size[1]} at {num_crops} crops", f"{plain:.1f}", f"{ours:.1f}", f"{plain / ours:.2f}"]
        cells += [f"{worker:.1f}", f"{plain / worker:.2f}"]
        cells += [f"{ms[name]:.1f}" for name in ("hd_transform", "local_crops", "normalised", "decoded")]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
