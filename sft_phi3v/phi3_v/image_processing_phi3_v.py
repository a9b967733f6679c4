"""One picture becomes a global view and local crops, all 336×336.

A 1000×600 photo with `num_crops=4`: the largest grid of at most four crops in its proportions is 2×2, so it is resized
to 672×403, padded with white to 672×672, and cut into four local crops. The whole padded picture, squeezed to 336×336,
is the global crop in front. The model turns the five crops into (2·2 + 1)·144 + 1 + (2 + 1)·12 = 757 image features.
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, load_image
from transformers.processing_utils import ImagesKwargs

CROP = 336


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
        return as_picture(image).convert("RGB")

    def _preprocess(
        self,
        images: list[Image.Image],
        num_crops: int,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images (`list[PIL.Image.Image]`): RGB pictures.
            num_crops (`int`): Largest number of local crops per picture.

        Returns:
            `BatchFeature`: `pixel_values`, float32 `(crops, 3, 336, 336)`, the crops of all pictures one after the
            other, global crop first; `image_sizes`, int64 `(pictures, 2)`, height and width of each padded picture in
            pixels; `num_img_tokens`, `list[int]`, image features per picture.
        """
        crops = []
        sizes = []
        for image in images:
            padded = hd_transform(image, num_crops)
            crops.append(_crop(padded, image_mean, image_std))
            sizes.append((padded.height, padded.width))
        data: dict[str, Any] = {
            "pixel_values": torch.cat(crops) if crops else torch.zeros(0, 3, CROP, CROP),
            "image_sizes": torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        }
        if return_tensors == "np":
            data = {key: value.numpy() for key, value in data.items()}
        tokens = [num_image_tokens(height // CROP, width // CROP) for height, width in sizes]
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
    missing = math.ceil(image.height / CROP) * CROP - image.height
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


def _crop(padded: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Cuts a padded picture into `(1 + local crops, 3, 336, 336)` normalised float32 crops, global crop first."""
    pixels = torch.from_numpy(np.array(padded)).permute(2, 0, 1).float() / 255  # (3, H, W)
    pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    rows, columns = padded.height // CROP, padded.width // CROP
    # Bicubic without antialiasing, on normalised pixels, white bars included: this is what the model was trained on.
    global_crop = torch.nn.functional.interpolate(pixels[None], size=(CROP, CROP), mode="bicubic")  # (1, 3, 336, 336)
    local_crops = pixels.view(3, rows, CROP, columns, CROP)
    local_crops = local_crops.permute(1, 3, 0, 2, 4).reshape(rows * columns, 3, CROP, CROP)
    return torch.cat([global_crop, local_crops])


__all__ = ["Phi3VImageProcessor"]
