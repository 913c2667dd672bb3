"""Files on disk: each appears complete under its name or not at all. Also hard links and checksums."""

import contextlib
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from torch import nn

MAX_SAMPLED_VALUES = 4096  # of a tensor


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file written there is renamed to `path` at the end of the block.

    If the block raises, the temporary file is removed and a file at `path` stays as it was. After a kill it is left, and the
    next write of `path` takes it over.

    Args:
        shared: other processes may write the same file at the same time; the last one to finish wins.
    """
    unfinished = path.with_name(f".{path.name}{f'.{uuid.uuid4().hex}' if shared else ''}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def link_tree(source: Path, target: Path) -> None:
    """Hard-links the files of a folder into another, copying where the file system has no links; each file atomically."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        destination = target / path.relative_to(source)
        if destination.exists() and destination.samefile(path):
            continue  # renaming one link over another of the same file would leave both
        destination.parent.mkdir(parents=True, exist_ok=True)
        with replacing(destination) as unfinished:
            unfinished.unlink(missing_ok=True)  # left by a kill
            try:
                os.link(path, unfinished)
            except OSError:
                shutil.copy2(path, unfinished)


def digest_of(*content: bytes, size: int = 16) -> str:
    """BLAKE2b digest of bytes, as 2 * `size` hexadecimal digits."""
    digest = blake2b(digest_size=size)
    for part in content:
        digest.update(part)
    return digest.hexdigest()


def digest_of_weights(module: nn.Module, sampled: bool = False) -> str:
    """BLAKE2b digest of names and values of all weights; where `sampled`, of at most some thousand values of each tensor."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().flatten()
        values = values[:: max(1, len(values) // MAX_SAMPLED_VALUES)] if sampled else values
        digest.update(name.encode())
        digest.update(values.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def crc_of_file(path: Path) -> int:
    """CRC-32 of a file's content, which is flushed to the disk before."""
    crc = 0
    with path.open("rb") as file:
        if os.name == "posix":  # Windows flushes no file that is open for reading
            os.fsync(file.fileno())  # what a manifest vouches for must have reached the disk
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc
