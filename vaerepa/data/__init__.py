"""Data: from files to latents on the device, one module after the other.

folders, shards, tars and index (what lies where), columns and labels (what it means), source (rows, in blocks), joined (those of
several storages), prior (with a class beside them), uncounted (rows of shards far away) and opening (which data sets, training
and validation split) -> order (permutation, or streams) and classes (how many a batch holds) -> images (decoding, crop), buckets
(their sizes) and numbers (random ones, by name) -> reading, by workers (samples of all processes) -> encoding (VAE, vision
encoder), latents_cache and prompts -> feed (batches of a run). `batch` says what a batch is.
"""

from vaerepa.data.batch import Batch
from vaerepa.data.buckets import parse_buckets
from vaerepa.data.classes import ClassesInBatch, classes_in_batch
from vaerepa.data.feed import Feed
from vaerepa.data.numbers import TrainingNumbers, ValidationNumbers
from vaerepa.data.opening import Sources, open_data, open_images, open_sources, take_at_random
from vaerepa.data.prompts import Prompts
from vaerepa.data.reading import Preprocessing, SampleReader, read_micro_batches
from vaerepa.data.source import Source
from vaerepa.errors import DataError

__all__ = [
    "Batch",
    "ClassesInBatch",
    "DataError",
    "Feed",
    "Preprocessing",
    "Prompts",
    "SampleReader",
    "Source",
    "Sources",
    "TrainingNumbers",
    "ValidationNumbers",
    "classes_in_batch",
    "open_data",
    "open_images",
    "open_sources",
    "parse_buckets",
    "read_micro_batches",
    "take_at_random",
]
