"""The output folder of a run: locked, and searched for the checkpoint to go on from."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vaerepa import checkpoints
from vaerepa.errors import OptionError
from vaerepa.hub import download
from vaerepa.layout import PIPELINE_INDEX, all_checkpoints, step_of
from vaerepa.system import lock_exclusively
from vaerepa.training.options import OutputOptions

logger = logging.getLogger(__name__)


@contextmanager
def locked_output_dir(output_dir: Path) -> Iterator[None]:
    """Creates the folder and locks it for this process; the system releases the lock when the process ends.

    Raises:
        OptionError: the folder cannot be written, or another run holds the lock.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = (output_dir / ".lock").open("w")
    except OSError as error:
        raise OptionError(f"--output_dir {output_dir} cannot be written: {error.strerror}.") from error
    with lock:
        try:
            lock_exclusively(lock)
        except (BlockingIOError, PermissionError) as error:
            raise OptionError(f"--output_dir {output_dir} is in use by another run; choose another.") from error
        except OSError as error:
            logger.warning(
                f"the file system of --output_dir {output_dir} has no locks ({error}): nothing keeps a second run out of it"
            )
        yield


def find_checkpoint(options: OutputOptions, cache_dir: str | None, warn: Callable[[str], None]) -> Path | None:
    """Checkpoint that --resume_from_checkpoint names; None for a new run.

    Args:
        warn: receives a message for each damaged checkpoint that is passed over.

    Raises:
        OptionError: the checkpoint does not exist or is damaged, newer ones would be overwritten, or the output folder of a
            new run holds another run.
    """
    output_dir, wanted = Path(options.output_dir), options.resume_from_checkpoint
    existing = all_checkpoints(output_dir)
    if wanted is None:
        if existing or (output_dir / PIPELINE_INDEX).exists():
            raise OptionError(
                f"--output_dir {output_dir} holds another run. Continue it with --resume_from_checkpoint latest, or choose "
                "another folder."
            )
        return None
    if wanted == "latest":
        newest = checkpoints.newest_valid(output_dir, warn)
        if newest is None and existing:
            raise OptionError(f"--resume_from_checkpoint latest: no checkpoint in {output_dir} is whole.")
        return newest
    if wanted.startswith(download.PREFIX):
        folder = download.fetch_checkpoint(wanted, output_dir, cache_dir)
    else:
        folder = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
    if not folder.is_dir():
        names = ", ".join(path.name for path in existing) or "none"
        raise OptionError(f"--resume_from_checkpoint {wanted}: there is no such folder; {output_dir} holds {names}.")
    damage = checkpoints.find_damage(folder)
    if damage:
        raise OptionError(f"--resume_from_checkpoint {wanted}: {damage}; it is no whole checkpoint of this trainer.")
    newer = [path.name for path in existing if step_of(path) > checkpoints.load_trainer_state(folder)["step"]]
    if newer:
        raise OptionError(
            f"--resume_from_checkpoint {wanted}: {output_dir} holds newer ones, which this run would overwrite "
            f"({', '.join(newer)}). Move them away, or choose another --output_dir."
        )
    return folder
