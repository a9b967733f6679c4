"""What is refused, what is kept and noted, and that a downscaled picture looks to the model as it did."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from sft_phi3v.catalogue import draw_picture, draw_product
from sft_phi3v.fetch import Refusal
from sft_phi3v.phi3_v.image_processing_phi3_v import hd_transform
from sft_phi3v.pictures import TOLERANCE, check_picture


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def check(content, **changes):
    return check_picture(content, **{"min_side": 8, "max_pixels": 10**7} | changes)


def large(size):
    rng = random.Random(0)
    return draw_picture(draw_product(rng), rng).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(1500, 900), (700, 2100), (1111, 1113)])
def test_a_downscaled_picture_gives_the_crops_of_the_original(size):
    picture = large(size)
    found = check(encoded(picture), num_crops=4, downscale=True)
    assert "downscaled" in found.notes and len(found.converted) < len(encoded(picture))
    stored = Image.open(io.BytesIO(found.converted))
    assert stored.size == (found.width, found.height) and max(stored.size) <= 4 * 336
    seen, expected = (np.asarray(hd_transform(one, 4), np.int16) for one in (stored.convert("RGB"), picture))
    assert np.abs(seen - expected).mean() <= TOLERANCE


def test_a_picture_that_is_small_enough_is_stored_as_it_came():
    found = check(encoded(large((300, 300))), num_crops=4, downscale=True)
    assert found.converted is None and found.notes == ()


def test_of_16_bits_the_upper_eight_of_those_in_use_are_kept():
    for bits in (16, 12):
        values = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
        found = check(encoded(Image.fromarray(values)))
        assert found.notes == ("16_bit",)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(found.converted))), values >> (bits - 8))


def test_equal_pixels_in_other_files_are_equal_and_a_colour_is_not():
    red = large((200, 150))
    png, bmp = check(encoded(red)), check(encoded(red, "BMP"))
    assert png.pixels == bmp.pixels and png.sha256 != bmp.sha256
    assert check(encoded(red.rotate(180))).pixels != png.pixels
    again = check(encoded(red.resize((180, 135)), "JPEG", quality=80))
    assert (again.perceptual ^ png.perceptual).bit_count() <= 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not_a_picture"),
        (b"<html>", "not_a_picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not_a_picture"),
        (encoded(large((300, 200)))[:5000], "truncated"),
        (encoded(large((300, 200)), "JPEG")[:3000], "truncated"),
        (encoded(Image.new("RGB", (4, 400))), "too_small"),
        (encoded(Image.new("L", (8, 8 * 337))), "too_narrow"),
        (encoded(Image.new("1", (4000, 4000))), "too_many_pixels"),
        (encoded(Image.fromarray(np.ones((64, 64), np.float32)), "TIFF"), "unsupported"),
        (
            encoded(Image.new("L", (64, 64)), "TIFF", save_all=True, append_images=[Image.new("L", (64, 64))]),
            "animated",
        ),
    ],
)
def test_what_is_refused_and_why(content, reason):
    with pytest.raises(Refusal) as refused:
        check(content)
    assert refused.value.reason == reason and refused.value.detail


def test_transparency_is_noted_only_where_something_shows_through():
    assert check(encoded(Image.new("RGBA", (64, 64), (9, 9, 9, 100)))).notes == ("transparent",)
    assert check(encoded(Image.new("RGBA", (64, 64), (9, 9, 9, 255)))).notes == ()
