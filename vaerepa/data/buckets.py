"""Buckets of aspect ratios: the sizes, beside the square, that images are cut to where a model generates any."""

from diffusers.training_utils import generate_aspect_ratio_buckets, parse_buckets_string

from vaerepa.data.options import DataOptions
from vaerepa.errors import OptionError

LARGEST_PATCH = 4  # of the presets, so that sizes found by themselves fit them all


def parse_buckets(options: DataOptions, downsampling: int) -> tuple[tuple[int, int], ...]:
    """Heights and widths in pixels that --aspect_ratio_buckets names, or of about the area of --resolution; () without it.

    Raises:
        OptionError: it is of another form.
    """
    text = options.aspect_ratio_buckets
    if text is None:
        return ()
    if text == "auto":
        return tuple(generate_aspect_ratio_buckets(options.resolution, LARGEST_PATCH * downsampling))
    try:
        return tuple(parse_buckets_string(text))
    except ValueError as error:
        raise OptionError(
            f"--aspect_ratio_buckets {text}: expected auto, or heights and widths in pixels such as '512,512;384,640'."
        ) from error
