"""One picture becomes a global view and local crops, all 336×336.

A 1000×600 photo with `num_crops=4`: the largest grid of at most four crops in its proportions is 2×2, so it is resized
to 672×403, padded with white to 672×672, and cut into four local crops. The whole padded picture, squeezed to 336×336,
is the global crop in front. The model turns the five crops into (2·2 + 1)·144 + 1 + (2 + 1)·12 = 757 image features.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, load_image
from transformers.processing_utils import ImagesKwargs

CROP = 336
MEAN, STD = tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)


class Phi3VImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    num_crops (`int`, *optional*):
        Largest number of local crops that a picture may be cut into. More crops show more detail and cost more tokens.
    """

    num_crops: int


class Phi3VImageProcessor(PilBackend):
    r"""
    Cuts pictures into crops the way the original model saw them in training.

    Args:
        num_crops (`int`, *optional*, defaults to `1`):
            Largest number of local crops per picture: 16 in Phi-3-vision's file, 4 in Phi-3.5-vision's.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = Phi3VImagesKwargs
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    num_crops = 1
    num_img_tokens = 144  # not used here; kept because the original file carries it

    def process_image(self, image: Any, **kwargs: Any) -> Image.Image:
        """Gives the picture as RGB, as PIL converts it: alpha is dropped, 16-bit grey is clipped, EXIF is ignored."""
        picture = as_picture(image)
        return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy it

    def _preprocess(
        self,
        images: list[Image.Image],
        num_crops: int,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | None = None,
        do_normalize: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images (`list[PIL.Image.Image]`): RGB pictures.
            num_crops (`int`): Largest number of local crops per picture.
            do_normalize (`bool`, *optional*): `False` leaves to the model what it can do on its device.

        Returns:
            `BatchFeature`: `pixel_values`, float32 `(crops, 3, 336, 336)`, the crops of all pictures one after the
            other, global crop first; or with `do_normalize=False` uint8, the local crops alone. `image_sizes`, int64
            `(pictures, 2)`, height and width of each padded picture in pixels; `num_img_tokens`, `list[int]`, image
            features per picture.
        """
        cut = [local_crops(hd_transform(image, num_crops)) for image in images]
        grids = [(len(one), len(one[0])) for one in cut]
        if do_normalize is False:
            if (tuple(image_mean), tuple(image_std)) != (MEAN, STD):
                raise ValueError(f"do_normalize=False: the model would normalise with {MEAN} and {STD}, not as said.")
            pixels = torch.cat([one.flatten(0, 1) for one in cut])
        else:
            numbers = [1 + rows * columns for rows, columns in grids]
            pixels = torch.empty(sum(numbers), 3, CROP, CROP)  # written where they stay: 23 MB a picture at 16 crops
            for one, out in zip(cut, pixels.split(numbers), strict=True):
                normalised(one, mean=image_mean, std=image_std, out=out)
        data: dict[str, Any] = {
            "pixel_values": pixels,
            "image_sizes": torch.tensor(grids, dtype=torch.int64).reshape(-1, 2) * CROP,
        }
        if return_tensors == "np":
            data = {key: value.numpy() for key, value in data.items()}
        tokens = [num_image_tokens(rows, columns) for rows, columns in grids]
        return BatchFeature({**data, "num_img_tokens": tokens})

    def num_image_tokens(self, width: int, height: int, num_crops: int | None = None) -> int:
        """
        Tokens that a picture of this size will take, without opening it.

        Args:
            width (`int`): Width in pixels.
            height (`int`): Height in pixels.
            num_crops (`int`, *optional*): Defaults to the processor's own.

        Returns:
            `int`: Number of image features, each of which is one token.
        """
        num_crops = self.num_crops if num_crops is None else num_crops
        (new_width, new_height), transposed = scaled_size(width, height, num_crops)
        rows, columns = math.ceil(new_height / CROP), new_width // CROP
        return num_image_tokens(columns, rows) if transposed else num_image_tokens(rows, columns)


def as_picture(image: Any) -> Image.Image:
    """A PIL picture from one, from a path or URL, or from an array `(height, width, 3)` of bytes."""
    if isinstance(image, str):
        return load_image(image)
    return image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))


def num_image_tokens(rows: int, columns: int) -> int:
    """Image features of a picture cut into `rows × columns` local crops: 144 each, a separator, newlines."""
    return (rows * columns + 1) * 144 + 1 + (rows + 1) * 12


def hd_transform(image: Image.Image, num_crops: int) -> Image.Image:
    """
    Scales a picture to the largest grid of at most `num_crops` crops in its proportions, and pads it with white.

    Args:
        image (`PIL.Image.Image`): RGB picture.
        num_crops (`int`): Largest number of local crops.

    Returns:
        `PIL.Image.Image`: Picture whose height and width are multiples of 336.

    Raises:
        ValueError: If the picture is so narrow that nothing would be left of its shorter side.
    """
    size, transposed = scaled_size(image.width, image.height, num_crops)
    if transposed:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    image = image.resize(size, Image.Resampling.BILINEAR)
    if missing := -image.height % CROP:
        top = missing // 2
        image = ImageOps.expand(image, (0, top, 0, missing - top), fill=(255, 255, 255))
    return image.transpose(Image.Transpose.TRANSPOSE) if transposed else image


def scaled_size(width: int, height: int, num_crops: int) -> tuple[tuple[int, int], bool]:
    """Size before padding, in landscape orientation, and whether the picture must be transposed to get there."""
    transposed = width < height
    ratio = height / width if transposed else width / height
    scale = 0
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    # Float arithmetic in this very order, as the original has it: int(336 / (420 / 380)) is 303, not 304.
    new_width, new_height = CROP * scale, int(CROP * scale / ratio)
    if new_height < 1:
        raise ValueError(
            f"A picture of {width}×{height} pixels cannot be cut into crops with num_crops={num_crops}: its shorter "
            "side would vanish. Drop the row, crop the picture, or raise num_crops."
        )
    return (new_width, new_height), transposed


def local_crops(padded: Image.Image) -> torch.Tensor:
    """
    Cuts a padded picture.

    Args:
        padded (`PIL.Image.Image`): From [`hd_transform`].

    Returns:
        `torch.Tensor`: uint8 `(rows, columns, 3, 336, 336)`.
    """
    rows, columns = padded.height // CROP, padded.width // CROP
    pixels = np.asarray(padded).reshape(rows, CROP, columns, CROP, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def normalised(
    local: torch.Tensor,
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    What the model sees of one picture, on the device that its crops are on.

    Args:
        local (`torch.Tensor`): uint8 `(rows, columns, 3, 336, 336)`, from [`local_crops`].
        mean (sequence of `float`, *optional*): Of each channel, on a scale from 0 to 1; CLIP's by default.
        std (sequence of `float`, *optional*): Of each channel.
        out (`torch.Tensor`, *optional*): Where to write it, contiguous.

    Returns:
        `torch.Tensor`: float32 `(1 + rows · columns, 3, 336, 336)`, the global crop first.
    """
    rows, columns = local.shape[:2]
    local = local.flatten(0, 1)
    if out is None:
        out = torch.empty(1 + len(local), 3, CROP, CROP, device=local.device)
    # 255 is a tensor too: a GPU would multiply by the reciprocal of a plain number, which is not the same.
    full, shift, scale = (torch.tensor(one, device=local.device).view(-1, 1, 1) for one in ([255.0], mean, std))
    at_once = 1 if local.device.type == "cpu" else len(local)  # one crop fits into a CPU's cache
    for pixels, crops in zip(out[1:].split(at_once), local.split(at_once), strict=True):
        pixels.copy_(crops).div_(full).sub_(shift).div_(scale)
    out[:1] = _global_crop(out[1:], rows, columns)
    return out


def _global_crop(local: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The whole picture in one crop `(1, 3, 336, 336)`, from its normalised local crops."""
    # Bicubic without antialiasing, on normalised pixels, white bars included: this is what the model was trained on.
    shrunk = partial(torch.nn.functional.interpolate, mode="bicubic")
    # Of each n lines that become one, bicubic reads the middle four (n even) or the middle one (n odd). Where n divides
    # 336, and is not 2, these lie in one crop: then each crop is shrunk alone, which gives the same bits, and what is
    # put together is small.
    if alone := all(CROP % n == 0 and n != 2 for n in (rows, columns)):
        local = shrunk(local, size=(CROP // rows, CROP // columns))
    height, width = local.shape[-2:]
    whole = local.view(rows, columns, 3, height, width).permute(2, 0, 3, 1, 4)  # (3, rows, height, columns, width)
    whole = whole.reshape(1, 3, rows * height, columns * width)
    return whole if alone else shrunk(whole, size=(CROP, CROP))


__all__ = ["Phi3VImageProcessor"]
