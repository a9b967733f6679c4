"""One picture file: is it a whole picture, what is odd about it, and what else looks the same.

What is odd is either refused or kept and noted; a file is stored as it came, to the last byte, unless a policy says:

| what | policy |
|---|---|
| cut short, broken, no picture at all (HTML, SVG) | refused: `truncated`, `broken`, `not_a_picture` |
| more than `max_pixels`, shorter side below `min_side` | refused before decoding: `too_many_pixels`, `too_small` |
| a strip too narrow to cut into crops | refused before decoding: `too_narrow` |
| animated, or several pages | refused, since only the first frame would be seen: `animated` |
| 32-bit or floating-point pixels | refused: `unsupported` |
| 16-bit grey | kept as 8-bit PNG, noted `16_bit`: of the bits that the picture uses, the upper eight |
| CMYK | kept as it is, noted `cmyk`: converted to RGB when it is read |
| turned by its EXIF data | kept as it is, noted `exif_rotated`: turned upright when it is read |
| transparent | kept as it is, noted `transparent`: the model drops alpha and sees the colours below it |
| larger than `num_crops` can use | with `downscale: true` kept smaller, noted `downscaled`, if within [`TOLERANCE`] |
"""

import hashlib
import io
import warnings
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sft_phi3v.fetch import Refusal

# Largest mean difference, in levels of 255, between what the model sees of a picture and of its downscaled copy.
TOLERANCE = 1.0
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")  # decoders that run nothing
_SIDE = 336  # of a crop


@dataclass(frozen=True)
class Picture:
    """
    What is known of a picture that may be used.

    Args:
        width (`int`): Width of what is stored, upright, in pixels.
        height (`int`): Height.
        notes (`tuple[str, ...]`): What is odd about it.
        sha256 (`str`): Of the file as it came.
        pixels (`str`): 128-bit hash of the upright RGB pixels: equal pictures in different files have the same.
        perceptual (`int`): 64-bit perceptual hash of the grey picture; looks the same if few bits differ.
        colours (`bytes`): Mean colours of a 4×4 grid, 48 bytes: the perceptual hash knows no colour.
        converted (`bytes`, *optional*): What to store instead of the file; `None` if the file is stored as it came.
    """

    width: int
    height: int
    notes: tuple[str, ...]
    sha256: str
    pixels: str
    perceptual: int
    colours: bytes
    converted: bytes | None


def check_picture(
    content: bytes, *, min_side: int, max_pixels: int, num_crops: int | None = None, downscale: bool = False
) -> Picture:
    """
    Decodes a picture fully.

    Args:
        content (`bytes`): The file.
        min_side (`int`): Shortest side allowed, in pixels.
        max_pixels (`int`): Most pixels allowed; more are never decoded.
        num_crops (`int`, *optional*): Most 336×336 crops that the model will cut it into.
        downscale (`bool`, *optional*): Whether to store no more pixels than `num_crops` can use.

    Returns:
        [`Picture`]: What is known of it.

    Raises:
        Refusal: If it may not be used, with the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of broken EXIF data and of what is refused here anyway
        image = _open(content, min_side, max_pixels, num_crops or 1)
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            notes, grey = _oddities(image), _eight_bits(upright)
            rgb = (grey or upright).convert("RGB")
        except Refusal:
            raise
        except Exception as error:  # a decoder that meets hostile bytes may raise anything
            cut = isinstance(error, EOFError) or "truncated" in str(error)
            raise Refusal("truncated" if cut else "broken", f"{image.format} picture: {error}") from error
    converted = _encode(grey, "PNG") if grey else None
    stored = rgb
    if downscale and num_crops and (smaller := _downscaled(rgb, num_crops, len(converted or content))):
        converted, stored = smaller
        notes = (*notes, "downscaled")
    grid = rgb.convert("L").resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3.0)
    bits = np.packbits(imagehash.phash(grid).hash)
    return Picture(
        width=stored.width,
        height=stored.height,
        notes=notes,
        sha256=hashlib.sha256(content).hexdigest(),
        pixels=hashlib.blake2b(rgb.tobytes(), digest_size=16, salt=b"%dx%d" % rgb.size).hexdigest(),
        perceptual=int.from_bytes(bits.tobytes(), "big"),
        colours=rgb.resize((4, 4), Image.Resampling.BOX, reducing_gap=3.0).tobytes(),
        converted=converted,
    )


def _open(content: bytes, min_side: int, max_pixels: int, num_crops: int) -> Image.Image:
    """The picture with its header read, if that allows more."""
    Image.init()  # all decoders: Pillow starts with the commonest five
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # phones put a preview behind a JPEG
    except UnidentifiedImageError:
        raise Refusal("not_a_picture", f"no picture format begins with {content[:24]!r}") from None
    except Image.DecompressionBombError:
        raise Refusal("too_many_pixels", f"more than max_pixels {max_pixels:,}") from None
    except Exception as error:
        raise Refusal("broken", f"the header cannot be read: {error}") from error
    width, height = image.size
    short, long = sorted(image.size)
    if width * height > max_pixels:
        raise Refusal("too_many_pixels", f"{width}×{height} pixels, more than max_pixels {max_pixels:,}")
    if short < min_side:
        raise Refusal("too_small", f"{width}×{height} pixels, shorter side below min_side {min_side}")
    if long > _SIDE * num_crops * short:
        raise Refusal("too_narrow", f"{width}×{height} pixels: of its shorter side nothing would be left")
    if frames > 1:
        raise Refusal("animated", f"{frames} frames or pages, of which the model would see the first")
    return image


def _oddities(image: Image.Image) -> tuple[str, ...]:
    found = {
        "cmyk": image.mode == "CMYK",
        "exif_rotated": image.getexif().get(0x0112, 1) in range(2, 9),
        "16_bit": image.mode.startswith("I"),
        "transparent": image.has_transparency_data and _is_transparent(image),
    }
    return tuple(name for name, is_so in found.items() if is_so)


def _is_transparent(image: Image.Image) -> bool:
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return isinstance(lowest, int | float) and lowest < 255


def _eight_bits(image: Image.Image) -> Image.Image | None:
    """A grey picture of more than eight bits as one of eight; `None` for one that has eight."""
    if image.mode == "F":
        raise Refusal("unsupported", "floating-point pixels")
    if not image.mode.startswith("I"):
        return None
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Refusal("unsupported", f"32-bit pixels, from {values.min()} to {values.max()}")
    # Scanners and X-ray machines put 10 or 12 bits into 16: divided by 256 they would be all but black.
    shift = max(0, int(values.max()).bit_length() - 8)
    return Image.fromarray((values >> shift).astype(np.uint8))


def _downscaled(rgb: Image.Image, num_crops: int, size: int) -> tuple[bytes, Image.Image] | None:
    """
    The picture in the size to which the model scales it anyway, by the same filter, if that takes fewer bytes.

    The model's own resizing then has nothing left to do, so the crops differ by what the JPEG loses, and not at all
    where that would be more than [`TOLERANCE`] and it is stored as PNG.
    """
    # Here, because it brings torch: processes that need no crop size start in half the time and a third of the memory.
    from sft_phi3v.phi3_v.image_processing_phi3_v import scaled_size

    target, transposed = scaled_size(*rgb.size, num_crops)
    turned = rgb.transpose(Image.Transpose.TRANSPOSE) if transposed else rgb
    if target[0] >= turned.width:
        return None
    turned = turned.resize(target, Image.Resampling.BILINEAR)
    small = turned.transpose(Image.Transpose.TRANSPOSE) if transposed else turned
    encoded = _encode(small, "JPEG", quality=95, subsampling=0)
    loss = np.asarray(Image.open(io.BytesIO(encoded)), np.int16) - np.asarray(small, np.int16)
    if np.abs(loss).mean() > TOLERANCE:
        encoded = _encode(small, "PNG")
    return (encoded, small) if len(encoded) < size else None


def _encode(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
