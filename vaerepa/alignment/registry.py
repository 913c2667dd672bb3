"""The alignment methods by their names, in the order in which --help lists them, and their own options in one class."""

from dataclasses import dataclass

from vaerepa.alignment.dispersive import DispersiveAlignment
from vaerepa.alignment.layersync import LayerSyncAlignment
from vaerepa.alignment.method import AlignmentMethod
from vaerepa.alignment.repa import REPAAlignment
from vaerepa.alignment.self_transcendence import SelfAlignment
from vaerepa.alignment.sra import SRAAlignment
from vaerepa.alignment.vae import VAEAlignment

METHODS: dict[str, type[AlignmentMethod]] = {
    method.name: method
    for method in (
        VAEAlignment,
        REPAAlignment,
        SRAAlignment,
        LayerSyncAlignment,
        DispersiveAlignment,
        SelfAlignment,
    )
}


@dataclass
class MethodOptions(*(method.options for method in METHODS.values() if method.options)):
    """The options that go with single methods."""
