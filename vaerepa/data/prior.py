"""Prior preservation: rows to train on, and beside each a row of the class that the model is to remember.

As in DreamBooth (arXiv 2208.12242) the loss is that of the instances plus a weight times that of the class. Samples of even index
are instances, those of odd index are of the class: so half of each global batch is of either, however it is split.
"""

from collections.abc import Sequence

import numpy as np

from vaerepa.data.joined import JoinedRows
from vaerepa.data.source import Source


class PairedSource(Source):
    """Instances, and as many rows of the class; an epoch has each instance as often as alone, whatever the number of the others.

    Args:
        instances, prior: rows of one storage.
    """

    def __init__(self, instances: Source, prior: Source):
        super().__init__(instances.storage, instances.parts, instances.members | prior.members)
        self.instances, self.prior = instances, prior
        self._length = 2 * len(instances)

    def without_content(self) -> "PairedSource":
        return PairedSource(self.instances.without_content(), self.prior.without_content())


def pair(instances: Source, prior: Source, class_prompt: str) -> PairedSource:
    """Pairs rows of two storages; the class prompt is the caption of the latter's."""
    storage = JoinedRows([instances.storage, prior.storage])
    parts = [*instances.parts, *(part._replace(instance_prompt=class_prompt) for part in prior.parts)]
    of_instances = np.concatenate([instances.members, np.zeros_like(prior.members)])
    of_class = np.concatenate([np.zeros_like(instances.members), prior.members])
    return PairedSource(Source(storage, parts, of_instances), Source(storage, parts, of_class))


def is_prior(sample_index: int) -> bool:
    """Whether this sample of a paired source is of the class."""
    return sample_index % 2 == 1


def loss_weights(sample_indices: Sequence[int], prior_loss_weight: float) -> list[float]:
    """Weights by which the mean over all samples is that over the instances plus the weighted one over the class."""
    return [2.0 * (prior_loss_weight if is_prior(i) else 1.0) for i in sample_indices]
