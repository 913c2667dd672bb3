"""One push: a checkpoint's pipeline, with its card and pictures, becomes a commit and a tag.

    python -m vaerepa.hub.push outputs/vaerepa --hub_model_id user/name

The trainer runs this command in the background; by hand it pushes the newest checkpoint of a run.
"""

import argparse
import io
import json
import logging
import os
import sys
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars

from vaerepa.layout import (
    HEADS,
    PIPELINE_INDEX,
    STATE,
    all_checkpoints,
    find_trainer_state,
    folder_of,
    read_lines,
    step_of,
)
from vaerepa.privacy import redact

STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
NO_SUCH_ROUTE = (404, 405, 501)  # answers of a self-hosted Hub without this part of the API
CARD, METRICS, EVENTS = "README.md", "metrics.jsonl", "runs/events.out.tfevents.0.vaerepa"
LAST_CHECKPOINT = "last-checkpoint"


def push(output_dir: Path, checkpoint: Path, repo_id: str, revision: str | None, strategy: str) -> str:
    """Commits a finished checkpoint and tags it; returns the tag.

    Args:
        strategy: as --hub_strategy; it decides whether and where the training state goes up.

    Raises:
        HfHubHTTPError, or an error of the network: nothing was committed, or the tag is missing.
    """
    api, step = HfApi(), step_of(checkpoint)
    files = published_files(output_dir, checkpoint, strategy)
    if card := files.get(CARD):
        files[CARD] = _card_of(card.decode(), repo_id).encode()
    # files in these folders that it does not have itself are deleted; all heads may be gone
    own_folders = (
        f"{HEADS}/",
        *(f"{path.name}/" for path in checkpoint.iterdir() if path.is_dir() and path.name != STATE),
    )
    if strategy == "checkpoint":
        own_folders += (f"{LAST_CHECKPOINT}/",)
    # of all that list the files, the call that fails at once in an outage: the pauses are the caller's
    there = [sibling.rfilename for sibling in api.model_info(repo_id, revision=revision).siblings]
    stale = [path for path in there if path.startswith(own_folders) and path not in files]
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(path, content) for path, content in files.items()]
        + [CommitOperationDelete(path) for path in stale],
        commit_message=f"Step {step}",
        revision=revision,
    )
    tag = tag_of(step, revision)
    _set_tag(api, repo_id, tag, commit.oid)
    return tag


def tag_of(step: int, revision: str | None) -> str:
    """Tag of a step; each branch has tags of its own."""
    return f"step-{step}" if revision in (None, "main") else f"{revision}-step-{step}"


def published_files(output_dir: Path, checkpoint: Path, strategy: str) -> dict[str, bytes | Path]:
    """Published files, by their path in the repository."""
    in_checkpoint = {str(p.relative_to(checkpoint)): p for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    is_lora = PIPELINE_INDEX not in in_checkpoint
    kept_back = (f"{STATE}/", f"{HEADS}/") if is_lora else (f"{STATE}/",)  # heads would be several times a LoRA
    files = {place: path for place, path in in_checkpoint.items() if not place.startswith(kept_back)}
    # read at once: the run goes on and will write them anew
    pictures = [*sorted((output_dir / "samples").rglob("*.png")), output_dir / "training_curves.png"]
    for path in (output_dir / CARD, *pictures):
        if path.is_file():
            files[str(path.relative_to(output_dir))] = path.read_bytes()
    if events := metric_events(output_dir / METRICS):
        files[EVENTS] = events
    trainer_state = checkpoint / STATE / find_trainer_state(path.name for path in (checkpoint / STATE).iterdir())
    public_options = json.loads(trainer_state.read_text(encoding="utf-8"))["options"]
    files["run_config.yaml"] = yaml.safe_dump(public_options, sort_keys=False).encode()
    if strategy in ("checkpoint", "all_checkpoints"):
        folder = LAST_CHECKPOINT if strategy == "checkpoint" else checkpoint.name
        files |= {f"{folder}/{place}": path for place, path in in_checkpoint.items()}
        if (output_dir / METRICS).is_file():  # for the curves of who goes on from it
            files[f"{folder}/{METRICS}"] = (output_dir / METRICS).read_bytes()
    return files


def _card_of(card: str, repo_id: str) -> str:
    """The card under the repository's name: that of a run without --push_to_hub names the run's folder."""
    name = ModelCard(card, ignore_metadata_errors=True).data.get("model_name")
    if name in (None, repo_id):
        return card
    quoted, named = (json.dumps(one, ensure_ascii=False) for one in (name, repo_id))
    head, heading, text = card.partition("\n# ")
    text = repo_id + "\n" + text.partition("\n")[2]
    return head.replace(f"model_name: {name}", f"model_name: {repo_id}") + heading + text.replace(quoted, named)


def metric_events(path: Path) -> bytes:
    """metrics.jsonl as an event file of TensorBoard, which the Hub shows; empty where there is none, or no TensorBoard.

    The trackers' own files hold the machine's name, and the options with their paths.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:
        return b""
    lines, file = read_lines(path), io.BytesIO()
    if not lines:
        return b""
    writer = RecordWriter(file)
    writer.write(Event(file_version="brain.Event:2").SerializeToString())
    for line in lines:
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        # the step stands for the time, which metrics.jsonl does not know
        event = Event(wall_time=line["step"], step=line["step"], summary=Summary(value=values))
        writer.write(event.SerializeToString())
    return file.getvalue()


def _set_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code in NO_SUCH_ROUTE:
            return  # a Hub without tags; the commit is there
        if error.response.status_code != 409:
            raise
        api.delete_tag(repo_id, tag=tag)  # of this step before a restart
        api.create_tag(repo_id, tag=tag, revision=commit)


def what_went_wrong(error: Exception) -> str:
    """One line about an error of the Hub or of the network, without a token in it."""
    response = getattr(error, "response", None)
    meaning = {
        401: "the token is not valid, or there is no such repository; log in anew with `hf auth login`",
        403: "the token has no right to write there",
        404: "there is no such repository; `hf repos create` makes one",
        429: "too many requests",
    }
    status = getattr(response, "status_code", None)
    if isinstance(error, RevisionNotFoundError):
        return "there is no such branch; `hf repos branch create` makes one"
    if status in meaning:
        return f"{meaning[status]} (status {status})"
    return redact(" ".join(str(error).split()) or type(error).__name__)[:300]


def main(arguments: list[str] | None = None) -> int:
    """Pushes the newest checkpoint of a run, or the one that is named."""
    parser = argparse.ArgumentParser(prog="python -m vaerepa.hub.push", description=main.__doc__)
    parser.add_argument("output_dir", type=Path, help="The run's --output_dir.")
    parser.add_argument("--hub_model_id", required=True, help="Repository, user/name; it must exist.")
    parser.add_argument("--hub_revision", help="Branch to push to. Default: main.")
    parser.add_argument("--hub_strategy", choices=STRATEGIES, default="every_save", help="As in training.")
    parser.add_argument("--step", type=int, help="Step of the checkpoint. Default: the newest.")
    options = parser.parse_args(arguments)
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the caller reports an error once
    kept = all_checkpoints(options.output_dir)
    checkpoint = folder_of(options.output_dir, options.step) if options.step is not None else kept[-1] if kept else None
    if checkpoint is None or not checkpoint.is_dir():
        print(f"error: {checkpoint or options.output_dir} is no checkpoint, or holds none", file=sys.stderr)
        return 2
    try:
        tag = push(options.output_dir, checkpoint, options.hub_model_id, options.hub_revision, options.hub_strategy)
    except Exception as error:  # whatever the network, the Hub or the disk came up with is one line for who called
        print(f"error: {what_went_wrong(error)}", file=sys.stderr)
        return 1
    print(f"pushed {checkpoint.name} to {options.hub_model_id}, tag {tag}")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # no thread of a client may hold up who waits for this
