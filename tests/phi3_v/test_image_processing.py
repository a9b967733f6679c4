"""The image processor gives the released models' pixels, sizes and token counts, without padding crops."""

import hashlib

import numpy as np
import pytest
import torch
from goldens import GOLDENS, image_arrays, image_goldens, image_token_count, picture, token_counts
from PIL import Image
from transformers import AutoImageProcessor

from sft_phi3v.phi3_v import Phi3VImageProcessor
from sft_phi3v.phi3_v.image_processing_phi3_v import local_crops, normalised

CROP_VALUES = 3 * 336 * 336
CASES = [(file, case["num_crops"]) for file, entry in image_goldens().items() for case in entry["cases"]]


@pytest.fixture(scope="module")
def processor():
    return Phi3VImageProcessor(num_crops=16)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def processed(request, processor):
    """(golden entry, golden case, key of its arrays, our output) of one picture at one number of crops."""
    file, num_crops = request.param
    entry = image_goldens()[file]
    case = next(case for case in entry["cases"] if case["num_crops"] == num_crops)
    output = processor(picture(file), num_crops=num_crops, return_tensors="pt")
    return entry, case, f"{file}|{num_crops}", output


def test_size_token_count_and_number_of_real_crops_equal_the_reference(processed):
    _, case, _, output = processed
    assert output["image_sizes"].dtype == torch.int64
    assert output["image_sizes"].tolist() == [case["image_sizes"]]
    assert output["num_img_tokens"] == [case["num_img_tokens"]]
    assert output["pixel_values"].shape == (case["num_real_crops"], 3, 336, 336)
    assert output["pixel_values"].dtype == torch.float32


def test_pixels_equal_the_reference(processed):
    entry, case, key, output = processed
    decoded = np.asarray(picture(entry["file"]).convert("RGB")).tobytes()
    if hashlib.sha256(decoded).hexdigest() != entry["sha256_rgb"]:
        pytest.skip("this machine's decoder gives other pixels than the one of the goldens")
    pixels = output["pixel_values"]
    index = image_arrays()[f"{key}|idx"].long()
    expected = image_arrays()[f"{key}|val"]
    actual = pixels.flatten()[index]
    in_global_view = index < CROP_VALUES  # bicubic; the others are PIL's own resize
    torch.testing.assert_close(actual[in_global_view], expected[in_global_view], atol=1e-4, rtol=0)
    torch.testing.assert_close(actual[~in_global_view], expected[~in_global_view], atol=1e-6, rtol=0)

    exact = pixels.double()
    mean, std, channels = (image_arrays()[f"{key}|{name}"] for name in ("mean", "std", "chan_mean"))
    torch.testing.assert_close(exact.mean((1, 2, 3)), mean, atol=1e-5, rtol=0)
    # The goldens do not say whether std divides by n or n - 1; at 338,688 values a crop both agree within 2e-6.
    torch.testing.assert_close(exact.flatten(1).std(1, correction=0), std, atol=1e-5, rtol=0)
    torch.testing.assert_close(exact.mean((2, 3)), channels, atol=1e-5, rtol=0)
    assert pixels.min().item() == pytest.approx(case["min"], abs=1e-4)
    assert pixels.max().item() == pytest.approx(case["max"], abs=1e-4)


def test_token_count_without_decoding_equals_the_processed_picture(processed, processor):
    entry, case, _, _ = processed
    count = processor.num_image_tokens(entry["width"], entry["height"], num_crops=case["num_crops"])
    assert count == case["num_img_tokens"]


def test_token_counts_of_all_sizes_equal_the_reference(processor):
    rows = token_counts()
    assert len(rows) > 1000
    for width, height, num_crops, padded_height, padded_width, expected in rows:
        count = processor.num_image_tokens(width, height, num_crops=num_crops)
        assert count == expected, f"{width}x{height} at {num_crops} crops"
        assert count == image_token_count(padded_height, padded_width)


@pytest.mark.parametrize(
    ("width", "height", "num_crops", "expected"),
    [(1000, 1000, 16, 2509), (640, 480, 16, 1921), (480, 640, 16, 1933), (1000, 600, 4, 757), (1, 1, 16, 2509)],
)
def test_token_count_examples_of_the_documentation(width, height, num_crops, expected):
    assert Phi3VImageProcessor(num_crops=num_crops).num_image_tokens(width, height) == expected


def test_pictures_of_different_sizes_are_concatenated_without_padding_crops(processor):
    pictures = [Image.new("RGB", size, "teal") for size in ((336, 336), (1344, 336), (300, 700))]
    together = processor(pictures, num_crops=4, return_tensors="pt")
    alone = [processor(one, num_crops=4, return_tensors="pt") for one in pictures]
    assert torch.equal(together["pixel_values"], torch.cat([one["pixel_values"] for one in alone]))
    assert torch.equal(together["image_sizes"], torch.cat([one["image_sizes"] for one in alone]))
    assert together["num_img_tokens"] == [count for one in alone for count in one["num_img_tokens"]]
    crops = [(height // 336) * (width // 336) + 1 for height, width in together["image_sizes"].tolist()]
    assert len(together["pixel_values"]) == sum(crops)


def test_crop_zero_is_the_global_view_and_local_crops_are_row_major(processor):
    quarters = Image.new("RGB", (672, 672))
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    for index, colour in enumerate(colours):
        quarters.paste(colour, (index % 2 * 336, index // 2 * 336, index % 2 * 336 + 336, index // 2 * 336 + 336))
    pixels = processor(quarters, num_crops=4, return_tensors="pt")["pixel_values"]
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    for crop, colour in zip(pixels[1:], colours, strict=True):
        assert ((crop * std + mean) * 255).mean((1, 2)).tolist() == pytest.approx(colour, abs=1e-3)
    corners = pixels[0][:, [5, 5, -5, -5], [5, -5, 5, -5]] * std[..., 0] + mean[..., 0]
    assert (corners.T * 255).tolist() == [pytest.approx(colour, abs=1e-2) for colour in colours]


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (2, 4), (3, 1), (4, 4), (3, 5), (10, 1), (1, 16)], ids=str)
def test_crops_are_bit_for_bit_those_of_the_whole_normalised_picture(processor, grid):
    rows, columns = grid
    height, width = rows * 336, columns * 336
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mean, std = (torch.tensor(one)[:, None, None] for one in (processor.image_mean, processor.image_std))
    whole = (torch.from_numpy(values).permute(2, 0, 1) / 255 - mean) / std
    expected = [torch.nn.functional.interpolate(whole[None], size=(336, 336), mode="bicubic")[0]]
    expected += [whole[:, y : y + 336, x : x + 336] for y in range(0, height, 336) for x in range(0, width, 336)]
    local = local_crops(Image.fromarray(values))
    assert local.dtype == torch.uint8 and local.shape == (rows, columns, 3, 336, 336)
    assert torch.equal(normalised(local, mean=processor.image_mean, std=processor.image_std), torch.stack(expected))


def test_white_bars_pad_only_the_short_side(processor):
    pixels = processor(Image.new("RGB", (672, 400), "black"), num_crops=4, return_tensors="pt")["pixel_values"]
    white = (1 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
    rows = (pixels[1:] == white[:, None, None]).all(1).all(-1)  # (crops, 336): rows that are all white
    assert rows.sum(1).tolist() == [136, 136, 136, 136]  # 672 - 400 = 272 rows: 136 above, 136 below
    assert rows[:2, :136].all() and rows[2:, 200:].all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "HSV"])
def test_every_mode_of_pil_is_read(processor, mode):
    pixels = processor(Image.new(mode, (40, 30)), num_crops=1, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 336, 336)
    assert pixels.isfinite().all()


def test_alpha_is_dropped_not_composed(processor):
    transparent_red = Image.new("RGBA", (336, 336), (255, 0, 0, 0))
    red = Image.new("RGB", (336, 336), (255, 0, 0))
    outputs = [processor(one, num_crops=1, return_tensors="pt")["pixel_values"] for one in (transparent_red, red)]
    assert torch.equal(*outputs)


def test_the_picture_given_is_not_changed(processor):
    given = Image.new("RGBA", (30, 50), (1, 2, 3, 4))
    before = given.tobytes()
    processor(given, num_crops=4, return_tensors="pt")
    assert (given.mode, given.size, given.tobytes()) == ("RGBA", (30, 50), before)


@pytest.mark.parametrize(
    ("size", "num_crops"), [((400, 1), 1), ((1, 400), 1), ((337, 1), 1), ((5000, 1), 4), ((100, 100), 0)]
)
def test_a_picture_that_would_shrink_to_nothing_is_refused(processor, size, num_crops):
    with pytest.raises(ValueError):
        processor(Image.new("RGB", size), num_crops=num_crops, return_tensors="pt")
    with pytest.raises(ValueError):
        processor.num_image_tokens(*size, num_crops=num_crops)


@pytest.mark.parametrize(("size", "num_crops", "padded"), [((5000, 1), 16, [336, 5376]), ((336, 1), 1, [336, 336])])
def test_the_thinnest_picture_that_fits_is_read(processor, size, num_crops, padded):
    output = processor(Image.new("RGB", size), num_crops=num_crops, return_tensors="pt")
    assert output["image_sizes"].tolist() == [padded]


def test_num_crops_of_the_call_wins_over_the_processor_own():
    processor = Phi3VImageProcessor(num_crops=4)
    square = Image.new("RGB", (500, 500))
    assert processor(square, return_tensors="pt")["num_img_tokens"] == [757]
    assert processor(square, num_crops=1, return_tensors="pt")["num_img_tokens"] == [313]
    assert processor(square, return_tensors="pt")["num_img_tokens"] == [757]


def test_save_and_reload_keeps_num_crops_and_pixels(tmp_path):
    saved = Phi3VImageProcessor(num_crops=9)
    saved.save_pretrained(tmp_path)
    reloaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(reloaded, Phi3VImageProcessor)
    assert reloaded.num_crops == 9
    picture_file = picture("p_400x300.png")
    first, second = (one(picture_file, return_tensors="pt")["pixel_values"] for one in (saved, reloaded))
    assert torch.equal(first, second)


def test_released_preprocessor_files_load_natively(reference_folder):
    processor = AutoImageProcessor.from_pretrained(reference_folder)
    assert isinstance(processor, Phi3VImageProcessor)
    assert processor.num_crops == {"phi3_vision": 16, "phi3_5_vision": 4}[reference_folder.name]
    assert AutoImageProcessor.from_pretrained(reference_folder, num_crops=1).num_crops == 1


def test_goldens_cover_every_picture_mode():
    modes = {entry["mode"] for entry in image_goldens().values()}
    assert {"RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"} <= modes, GOLDENS
