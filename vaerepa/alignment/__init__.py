"""Representation alignment: teach an early block of the transformer what is already known about the image.

One file per method. To align your own diffusers transformer, wrap it in `AlignedTransformer` with a method's head and add
the method's loss to yours; docs/alignment.md shows it in a dozen lines.
"""

from vaerepa.alignment.aligned_transformer import AlignedTransformer
from vaerepa.alignment.guidance import GuidingHead, HeadGuidance, SelfGuidance
from vaerepa.alignment.method import AlignmentContext, AlignmentMethod, MethodParts, ScheduledMethod
from vaerepa.alignment.registry import METHODS
from vaerepa.alignment.repa import REPAAlignment
from vaerepa.alignment.sra import SRAAlignment
from vaerepa.alignment.vae import VAEAlignment

__all__ = [
    "METHODS",
    "AlignedTransformer",
    "AlignmentContext",
    "AlignmentMethod",
    "GuidingHead",
    "HeadGuidance",
    "MethodParts",
    "REPAAlignment",
    "SRAAlignment",
    "ScheduledMethod",
    "SelfGuidance",
    "VAEAlignment",
]
