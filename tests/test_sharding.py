"""FSDP2: processes that hold a part of each weight take the steps of one, save and restart; all runs in two starts."""

import json
import subprocess
import sys
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiTPipeline
from safetensors.torch import load_file

import train_vaerepa
from tests.conftest import ROOT, launcher, read_metrics, tiny_run
from tests.helpers_data import CLASSES, tar_of
from tests.helpers_processes import double_precision, reading_from_afar
from tests.helpers_runs import EXACT, assert_same_end
from vaerepa.checkpoints import find_damage, load_tensors

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]  # minutes, for all runs of the module
CONFIGS = ROOT / "configs/accelerate"
# the launcher's configuration is that of the docs, but for the number of processes and the precision
TWO = ["--config_file", CONFIGS / "fsdp2_8_gpus.yaml", "--num_processes", 2]
FOUR = ["--config_file", CONFIGS / "hsdp_4_nodes.yaml", "--num_processes", 4, "--num_machines", 1]
FOUR += ["--parallelism_config_dp_replicate_size", 2, "--parallelism_config_dp_shard_size", 2]
PLAIN = {"label_dropout": 0.5, "num_validation_samples": 10, "num_validation_images": 2, "max_train_steps": 5}
PLAIN |= {"dataset_name": "nobody/nothing", "num_classes": CLASSES, "validation_split": 0.3}  # and reads it from afar
ENDING = {
    "alignment": ["vae", "sra"],
    "alignment_stop_step": [2, 4],
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "max_train_steps": 5,
    "checkpointing_steps": 1,
}
RESTARTED = {**EXACT, "gradient_accumulation_steps": 2, "alignment_final": "adaln"}
FAMILIES = {
    "sd3": {"validation_prompts": ["tree"], "num_validation_images": 1, "learning_rate": 1e-4},
    "z_image": {"rank": 2, "learning_rate": 1e-3},  # of a LoRA's matrices some processes hold nothing
}
RESUME = {"resume_from_checkpoint": "latest"}
DOUBLE = {"double": True}
STREAMED = {"double": True, "far": True}


def tensors_of(run, step: int) -> dict[str, torch.Tensor]:
    """The training state in checkpoint-`step`, whole, and the weights that are exported."""
    checkpoint = run / f"checkpoint-{step}"
    assert find_damage(checkpoint) is None
    files = [path for path in checkpoint.rglob("*.safetensors") if "state" not in path.parts]
    named = {f"{path.relative_to(checkpoint)}/{key}": t for path in files for key, t in load_file(path).items()}
    for group in ("transformer", "optimizer", "ema_0.9", "ema_0.5", "heads", "ema_heads_0.9", "ema_heads_0.5"):
        named |= {f"{group}/{key}": tensor for key, tensor in load_tensors(checkpoint, group).items()}
    return named


def largest_difference(one, other, step: int) -> float:
    tensors, others = tensors_of(one, step), tensors_of(other, step)
    assert tensors.keys() == others.keys()
    assert any(name.startswith("optimizer/") for name in tensors)
    return max((tensors[name] - others[name]).abs().max().item() for name in tensors)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """A folder of 40 pictures in six tars that no index counts."""
    folder = tmp_path_factory.mktemp("tars")
    for shard, (first, last) in enumerate(pairwise((0, 5, 14, 17, 29, 36, 40))):
        (folder / f"{shard}.tar").write_bytes(tar_of(range(first, last)))
    return folder


@pytest.fixture(scope="module")
def one_process(data, vae, tars, tuning, tmp_path_factory):
    """Folders of the runs of one process, by their names."""
    folder = tmp_path_factory.mktemp("one")

    def train(name: str, double: bool = False, far: bool = False, **options) -> None:
        AcceleratorState._reset_state(True)
        with double_precision() if double else nullcontext(), reading_from_afar(tars) if far else nullcontext():
            assert train_vaerepa.main(tiny_run(data, vae, **options, output_dir=folder / name)) == 0

    train("plain", **STREAMED, **PLAIN)
    train("ending", **DOUBLE, **ENDING)
    train("one-two", **STREAMED, **PLAIN | {"max_train_steps": 2})
    for family, options in FAMILIES.items():
        train(family, **tuning(family, **options))
    return folder


@pytest.fixture(scope="module")
def sharded(data, vae, tars, tuning, one_process, tmp_path_factory):
    """Folders of the runs with sharded weights: of two processes, and of four in two groups."""
    folder = tmp_path_factory.mktemp("sharded")

    def training(name: str, **more) -> dict:
        given = {key: more.pop(key) for key in ("double", "nan") if key in more}
        given |= {"far": str(tars)} if more.pop("far", False) else {}
        options = {"output_dir": folder / name} | more
        return {"module": "train_vaerepa", "arguments": tiny_run(data, vae, **options), "sharded": True, **given}

    two = [
        training("plain", **STREAMED, **PLAIN),
        training("ending", **DOUBLE, **ENDING),
        training("two-one", **STREAMED, **PLAIN | {"max_train_steps": 2}),
        training("two-four", **STREAMED, **PLAIN | {"max_train_steps": 2}),
        training("one-two", **STREAMED, **PLAIN | RESUME, output_dir=one_process / "one-two"),
        training("whole", **RESTARTED, max_train_steps=6),
        training("pieces", **RESTARTED, max_train_steps=3),
        training("pieces", **RESTARTED, **RESUME, max_train_steps=6),
        training("nan", nan=2, max_train_steps=3, checkpointing_steps=1),
        training("half", mixed_precision="bf16", max_train_steps=2),
        *(training(family, **tuning(family, **options)) for family, options in FAMILIES.items()),
    ]
    four = [
        training("four", **STREAMED, **PLAIN, gradient_accumulation_steps=2),
        training("two-four", **STREAMED, **PLAIN, **RESUME),
        training("z_image-four", **tuning("z_image", **FAMILIES["z_image"])),
    ]
    _, environment = launcher(1)
    for arguments, runs in ((TWO, two), (FOUR, four)):
        (folder / "runs.json").write_text(json.dumps(runs))
        command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)]
        command += ["--main_process_port", "0", "--mixed_precision", "no"]
        command += ["-m", "tests.helpers_processes", str(folder / "runs.json")]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        sys.stderr.write(result.stderr)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("name", "reference"), [("plain", "plain"), ("ending", "ending"), ("four", "plain")])
def test_sharded_processes_take_the_steps_of_one(one_process, sharded, name, reference):
    runs = one_process / reference, sharded / name
    assert largest_difference(*runs, 5) < 1e-9
    losses = [read_metrics(run, "train/loss", "train/gradient_norm") for run in runs]
    assert [line["step"] for line in losses[0]] == [1, 2, 3, 4, 5]
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    states = [json.loads((run / "checkpoint-5/state/trainer_state.json").read_text()) for run in runs]
    assert states[0]["shards"] == states[1]["shards"]
    assert bool(states[0]["shards"]) == (reference == "plain")  # whose rows nobody counted


def test_every_process_writes_its_parts_and_none_is_whole(sharded):
    for name, processes in (("plain", 2), ("four", 4)):  # the two groups of four write each weight once
        checkpoint = sharded / name / "checkpoint-5"
        sizes = [sum(t.numel() for t in load_file(path).values()) for path in (checkpoint / "state/parts").iterdir()]
        assert len(sizes) == processes
        assert max(sizes) < 0.6 * sum(sizes)
        groups = ("transformer", "optimizer", "ema_0.9", "heads", "ema_heads_0.9")
        stored = [tensor for group in groups for tensor in load_tensors(checkpoint, group).values()]
        assert sum(sizes) == sum(tensor.numel() for tensor in stored if tensor.ndim)  # all but the counts of steps


def test_heads_leave_sharded_processes_when_alignment_stops(sharded):
    names = [
        {name.split(".")[0] for name in load_tensors(sharded / f"ending/checkpoint-{step}", "ema_heads_0.9")}
        for step in range(1, 6)
    ]
    assert names == [{"vae", "sra"}, {"sra"}, {"sra"}, set(), set()]


def test_restarts_are_exact_on_sharded_processes(sharded):
    assert_same_end(sharded / "whole", sharded / "pieces", 6)


def test_restarts_on_other_processes_are_exact(one_process, sharded, data, vae, tars):
    AcceleratorState._reset_state(True)
    with double_precision(), reading_from_afar(tars):
        goes_on = tiny_run(data, vae, **PLAIN, **RESUME, output_dir=sharded / "two-one")
        assert train_vaerepa.main(goes_on) == 0
    for run in (one_process / "one-two", sharded / "two-one", sharded / "two-four"):
        assert largest_difference(one_process / "plain", run, 5) < 1e-9


def test_the_export_of_sharded_processes_is_stock(sharded):
    pipeline = DiTPipeline.from_pretrained(sharded / "whole")
    weights = load_tensors(sharded / "whole/checkpoint-6", "ema_0.9")
    exported = pipeline.transformer.state_dict()
    assert len(exported) > len(weights)  # an embedder per block
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())


def test_a_bad_batch_of_one_sharded_process_is_skipped_by_all(sharded):
    kept = [load_tensors(sharded / f"nan/checkpoint-{step}", "transformer") for step in (1, 2, 3)]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(kept)]
    assert same == [True, False]
    assert all(tensor.isfinite().all() for tensor in kept[-1].values())


@pytest.mark.parametrize("name", [*FAMILIES, "z_image-four"])
def test_text_models_are_fine_tuned_sharded(one_process, sharded, name):
    reference = one_process / name.removesuffix("-four")
    one, other = (load_tensors(run / "checkpoint-4", "transformer") for run in (reference, sharded / name))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], atol=2e-5) for key in one)
    losses = [[line["train/loss"] for line in read_metrics(run, "train/loss")] for run in (reference, sharded / name)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
