"""Data: from files to latents on the device, one room after the other.

source (rows in blocks) and opening (which data set, columns and splits) -> order (streams, windows, epochs) -> images
(decoding, crop) -> loader (batches of all processes and workers) -> latents_cache, prompts -> feed (what a step receives).
"""

from vaerepa.data.feed import Feed
from vaerepa.data.loader import Batches, DataError, Preprocessing, TrainingDraws, ValidationDraws, read_batches
from vaerepa.data.opening import Sources, open_images, open_sources, take_at_random
from vaerepa.data.prompts import Prompts
from vaerepa.data.source import Source

__all__ = [
    "Batches",
    "DataError",
    "Feed",
    "Preprocessing",
    "Prompts",
    "Source",
    "Sources",
    "TrainingDraws",
    "ValidationDraws",
    "open_images",
    "open_sources",
    "read_batches",
    "take_at_random",
]
