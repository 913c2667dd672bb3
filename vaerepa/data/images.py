"""Images: from encoded bytes to square uint8 tensors, with the crop of ADM."""

from io import BytesIO

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # what bad bytes raise


def read_image(image: dict | None) -> Image.Image:
    """Decodes what an HF Image column holds: the encoded bytes, or the path of a file of its own.

    Raises:
        UNREADABLE: there is no image, or it is damaged or far too large.
    """
    if image is None:
        raise ValueError("the row holds no image")
    if image["bytes"] is not None:
        return decode_image(image["bytes"])
    with fsspec.open(image["path"], "rb") as file:
        return decode_image(file.read())


def decode_image(encoded: bytes) -> Image.Image:
    """Decodes a whole image to RGB: EXIF rotation applied, transparency laid on white, 16-bit grey scaled to 8 bit.

    Raises:
        UNREADABLE: the bytes are no image, an incomplete one, or a far too large one.
    """
    try:
        image = Image.open(BytesIO(encoded))
    except UnidentifiedImageError as error:
        raise ValueError(f"{len(encoded)} bytes that are no image of a known format") from error
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image, dtype=np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Brings an image to the smallest size that covers `size`: halved by box filters while twice too large, then bicubic.

    For a square the same result as `center_crop_arr` of openai/guided-diffusion, the preprocessing of ADM, DiT and SiT.

    Args:
        size: height and width in pixels.
    """
    height, width = size
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, resample=Image.Resampling.BICUBIC)


def crop(image: Image.Image, size: tuple[int, int], horizontal: float = 0.5, vertical: float = 0.5) -> Image.Image:
    """Cuts out `size`, height and width in pixels; `horizontal` and `vertical` in [0, 1] place it (0.5: the centre)."""
    height, width = size
    left = int((image.width - width) * horizontal)
    top = int((image.height - height) * vertical)
    return image.crop((left, top, left + width, top + height))


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as a uint8 tensor of shape (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
