"""Data: what a split holds (source), in which order it is read (order), how it becomes batches (images, loader)."""

from vaerepa.data.loader import Batches, DataError, Preprocessing, TrainingDraws, ValidationDraws, build_loader
from vaerepa.data.source import Source, Sources, open_sources

__all__ = [
    "Batches",
    "DataError",
    "Preprocessing",
    "Source",
    "Sources",
    "TrainingDraws",
    "ValidationDraws",
    "build_loader",
    "open_sources",
]
