"""Samples as runs of the tests read them."""

from itertools import islice

from vaerepa.data import Preprocessing, SampleReader
from vaerepa.data.batch import Samples
from vaerepa.data.numbers import Numbers


def read_samples(
    source, numbers: Numbers, seed: int, micro_batch: int = 0, preprocessing=None, latent_shape=(4, 8, 8), size: int = 8
) -> Samples:
    """The samples of one micro-batch, counted from 0, as tiny runs of 16 pixels with four streams see them."""
    last = (micro_batch + 1) * size
    reader = SampleReader(source, latent_shape, preprocessing or Preprocessing(16), numbers, size, 0, last, 4, 16, seed)
    [samples] = next(islice(reader, micro_batch, None))
    return samples
