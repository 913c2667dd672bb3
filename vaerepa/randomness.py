"""Random numbers by name: everything random about a sample follows from (seed, name of the number, sample index in the run).

Never from rank, worker or micro-batch: so a restart needs no generator state to be exact, any number of processes sees
the same steps, and two methods can be compared under the same noise. NVlabs/edm2 gets its exact resume the same way. The
one exception is the dropout of a LoRA: torch generates its masks, seeded by the first sample of each micro-batch.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from vaerepa.cli import option


@dataclass
class SeedOptions:
    """The seed of all random numbers."""

    seed: int = option(
        0, "Everything random follows from it: weights, order, noise, timesteps.", resume="fixed", group="Training"
    )


def draw_seed(seed: int, name: str, *indices: int) -> int:
    """A 64-bit integer that depends on all arguments and on nothing else."""
    key = f"{seed}/{name}/{'/'.join(map(str, indices))}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def draw_uniform(seed: int, name: str, index: int) -> float:
    """One number, uniform on (0, 1)."""
    return ((draw_seed(seed, name, index) >> 11) + 0.5) * 2.0**-53


def draw_uniforms(seed: int, name: str, indices: range) -> np.ndarray:
    """The number of `draw_uniform` for each of many indices, shape (number of indices,)."""
    common = hashlib.blake2b(f"{seed}/{name}/".encode(), digest_size=8)

    def draw(index: int) -> bytes:
        own = common.copy()
        own.update(b"%d" % index)
        return own.digest()

    numbers = np.frombuffer(b"".join(map(draw, indices)), "<u8")
    return ((numbers >> 11) + 0.5) * 2.0**-53


def draw_normal(seed: int, name: str, index: int) -> float:
    """One standard normal number."""
    return NormalDist().inv_cdf(draw_uniform(seed, name, index))


def draw_noise(
    seed: int, name: str, index: int, shape: tuple[int, ...], out: torch.Tensor | None = None
) -> torch.Tensor:
    """A standard normal float32 tensor of `shape`, on the CPU; into `out` where that is given."""
    return torch.randn(shape, generator=generator(seed, name, index), dtype=torch.float32, out=out)


def draw_permutation(seed: int, name: str, size: int, *indices: int) -> torch.Tensor:
    """A random order of `range(size)`, shape (size,)."""
    return torch.randperm(size, generator=generator(seed, name, *indices))


@contextmanager
def seeded_weights(seed: int, name: str) -> Iterator[None]:
    """Context in which new modules get weights from a seed of their own; torch's other random numbers do not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed(seed, name))
        yield


def generator(seed: int, name: str, *indices: int) -> torch.Generator:
    """A CPU generator for one random number, or tensor, by name; also seeds weights (name "transformer" or "head")."""
    return torch.Generator().manual_seed(draw_seed(seed, name, *indices) & (2**63 - 1))
