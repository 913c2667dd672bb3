"""The alignment methods by their names, in the order in which --help lists them."""

from vaerepa.alignment.layersync import LayerSyncAlignment
from vaerepa.alignment.method import AlignmentMethod
from vaerepa.alignment.repa import REPAAlignment
from vaerepa.alignment.sra import SRAAlignment
from vaerepa.alignment.vae import VAEAlignment

METHODS: dict[str, type[AlignmentMethod]] = {
    method.name: method
    for method in (
        VAEAlignment,
        REPAAlignment,
        SRAAlignment,
        LayerSyncAlignment,
    )
}
