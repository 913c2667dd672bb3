"""Buckets: the sizes, beside one square, that images are cut to where a model generates any."""

from diffusers.training_utils import generate_aspect_ratio_buckets, parse_buckets_string

from vaerepa.data.options import DataOptions
from vaerepa.errors import OptionError

LARGEST_PATCH = 4  # of the presets, so that sizes found by themselves fit them all


Sizes = tuple[tuple[int, int], ...]  # heights and widths in pixels


def parse_buckets(options: DataOptions, downsampling: int) -> tuple[Sizes, ...]:
    """The sizes of each --resolution, from the smallest on; () where images are cut to one square.

    They are those that --aspect_ratio_buckets names or finds, or else squares.

    Raises:
        OptionError: it is of another form, or names sizes beside several resolutions.
    """
    text, resolutions = options.aspect_ratio_buckets, sorted(options.resolution)
    if text is None:
        return tuple(((side, side),) for side in resolutions) if len(resolutions) > 1 else ()
    if text == "auto":
        return tuple(tuple(generate_aspect_ratio_buckets(side, LARGEST_PATCH * downsampling)) for side in resolutions)
    if len(resolutions) > 1:
        raise OptionError(
            f"--aspect_ratio_buckets {text} names sizes: give one --resolution, or auto for sizes of each."
        )
    try:
        return (tuple(parse_buckets_string(text)),)
    except ValueError as error:
        raise OptionError(
            f"--aspect_ratio_buckets {text}: expected auto, or heights and widths in pixels such as '512,512;384,640'."
        ) from error
