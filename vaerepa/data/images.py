"""Images: from encoded bytes to square uint8 tensors, with the crop of ADM."""

import logging
import warnings
from contextlib import suppress
from importlib import import_module
from io import BytesIO

import fsspec
import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError, features

from vaerepa.data.files import patiently

MAX_ENLARGED_PIXELS = 2**26  # an image that would be enlarged beyond this is cropped before
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what brings an image of this EXIF orientation upright


def quiet_pillow() -> None:
    """Silences Pillow's warnings about single images (large, odd metadata); the reader reports images that cannot be read."""
    warnings.filterwarnings("ignore", module=r"PIL\b")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _known_extensions() -> frozenset[str]:
    """File name extensions, in lower case, of the image formats that can be decoded."""
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        import_module("pillow_jxl")  # registers itself
    Image.init()
    needs_more = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # which Pillow only knows by name
    kinds = set(Image.OPEN) - needs_more - ({"AVIF"} if not features.check("avif") else set())
    return frozenset(extension for extension, kind in Image.registered_extensions().items() if kind in kinds)


EXTENSIONS = _known_extensions()


def read_image(image: dict | None) -> Image.Image:
    """Decodes what an HF Image column holds: the encoded bytes, or the path of a file of its own.

    Raises:
        Exception: there is no image, or it is damaged or far too large. Each format's decoder raises in its own way, so
            whatever is raised is the fault of this one image.
    """
    return decode_image(_read_bytes(image))


def read_masked(image: dict | None, mask: dict | None) -> tuple[Image.Image, Image.Image]:
    """Decodes an image as `read_image`, and its mask, in grey: that of a column or, where it has none, the image's transparency.

    Raises:
        Exception: as of `read_image`, of either; or they are of different sizes.
    """
    decoded = _decode(_read_bytes(image))
    grey = decode_image(_read_bytes(mask)).convert("L") if any((mask or {}).values()) else alpha_of(decoded)
    if grey.size != decoded.size:
        raise ValueError(
            f"the mask has {grey.width} x {grey.height} pixels, the image {decoded.width} x {decoded.height}"
        )
    return on_white(decoded), grey


def _read_bytes(image: dict | None) -> bytes:
    content, path = (image or {}).get("bytes"), (image or {}).get("path")
    if content is not None:
        return content
    if path is None:
        raise ValueError("the row holds no image")
    return patiently(_read_file, path)


def _read_file(path: str) -> bytes:
    is_url = "://" in path  # fsspec would take other characters of a local path for its own
    with fsspec.open(path, "rb") if is_url else open(path, "rb") as file:
        return file.read()


def decode_image(encoded: bytes) -> Image.Image:
    """Decodes a whole image to RGB: EXIF rotation applied, transparency laid on white, 16-bit grey scaled to 8 bit.

    Raises:
        Exception: the bytes are no image, an incomplete one, or a far too large one.
    """
    return on_white(_decode(encoded))


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, its transparency laid on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def alpha_of(image: Image.Image) -> Image.Image:
    """The alpha channel of an image in grey, white where it has none."""
    if image.has_transparency_data:
        return image.convert("RGBA").getchannel("A")
    return Image.new("L", image.size, "white")


def _decode(encoded: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(encoded))
    except UnidentifiedImageError as error:
        raise ValueError(f"{len(encoded)} bytes that are no image of a known format") from error
    image.load()
    orientation = orientation_of(image)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image, dtype=np.int64).clip(0, 65535) // 257).astype(np.uint8))
    return image


def orientation_of(image: Image.Image) -> int | None:
    """The EXIF orientation of an image, None where it has none or its EXIF is damaged: the pixels are usable still."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None
    return orientation if isinstance(orientation, int) else None


def cut(image: Image.Image, size: tuple[int, int], horizontal: float = 0.5, vertical: float = 0.5) -> Image.Image:
    """Brings an image to the smallest size that covers `size` (halved by box filters while twice too large, then bicubic)
    and cuts `size` out of it.

    For a centred square the same result as `center_crop_arr` of openai/guided-diffusion, the preprocessing of ADM, DiT and
    SiT.

    Args:
        size: height and width in pixels.
        horizontal: place of the cut, from 0 (left) to 1 (right).
        vertical: place of the cut, from 0 (top) to 1 (bottom).
    """
    height, width = size
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    covering_width, covering_height = round(image.width * scale), round(image.height * scale)
    left, top = int((covering_width - width) * horizontal), int((covering_height - height) * vertical)
    box = (left, top, left + width, top + height)
    if covering_width * covering_height <= MAX_ENLARGED_PIXELS:
        return image.resize((covering_width, covering_height), resample=Image.Resampling.BICUBIC).crop(box)
    # a strip of 1 x 60000 pixels would take gigabytes: the part that is cut out alone, alike but for its edges
    x, y = image.width / covering_width, image.height / covering_height
    part = (box[0] * x, box[1] * y, min(box[2] * x, image.width), min(box[3] * y, image.height))
    return image.resize((width, height), resample=Image.Resampling.BICUBIC, box=part)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as a uint8 tensor of shape (3, H, W), one in grey as (1, H, W)."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous()
