"""Data: from files to latents on the device, one room after the other.

folders, shards and tars (what lies where), columns and labels (what it means), source (rows, in blocks) and opening (which
data set and splits, what is held out) -> order (permutation, or streams) and classes (how many a batch holds) -> images
(decoding, crop) and buckets (their sizes) -> loader (batches of all processes and workers) -> latents_cache, prompts -> feed
(what a step receives).
"""

from vaerepa.data.buckets import parse_buckets
from vaerepa.data.classes import ClassesInBatch, classes_in_batch
from vaerepa.data.feed import Feed
from vaerepa.data.loader import (
    Batches,
    Preprocessing,
    TrainingDraws,
    ValidationDraws,
    micro_batch,
    read_batches,
)
from vaerepa.data.opening import Sources, open_data, open_images, open_sources, take_at_random
from vaerepa.data.prompts import Prompts
from vaerepa.data.source import Source
from vaerepa.errors import DataError

__all__ = [
    "Batches",
    "ClassesInBatch",
    "DataError",
    "Feed",
    "Preprocessing",
    "Prompts",
    "Source",
    "Sources",
    "TrainingDraws",
    "ValidationDraws",
    "classes_in_batch",
    "micro_batch",
    "open_data",
    "open_images",
    "open_sources",
    "parse_buckets",
    "read_batches",
    "take_at_random",
]
