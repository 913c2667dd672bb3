"""Two processes take the steps of one and restart to the bit; all their runs are made in two starts of two processes."""

import json
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import train_vaerepa
from tests.conftest import ROOT, launcher, read_metrics, tiny_run
from tests.helpers_processes import double_precision
from tests.helpers_runs import (
    EXACT,
    INTERNAL_GUIDANCE,
    MUON,
    PRODIGY,
    assert_same_end,
    command_line,
    rows_in,
    tensors_of,
)
from vaerepa import evaluate
from vaerepa.evaluation.samples import read_pixels
from vaerepa.layout import all_checkpoints, step_of

pytestmark = pytest.mark.usefixtures("one_thread")
REPA = {"alignment": "repa", "alignment_encoder": "dinov2", "alignment_width": 64, "max_train_steps": 12}
DROPPED = {"max_train_steps": 10, "label_dropout": 0.5}
SAME_STEPS = {
    "plain": DROPPED,
    "accumulation": DROPPED | {"gradient_accumulation_steps": 2},
    "vae-sra": DROPPED | {"alignment": ["vae", "sra"], "max_train_steps": 6},
    "dispersive": {"alignment": "dispersive", "alignment_group_size": 4},
    "internal-guidance": INTERNAL_GUIDANCE | DROPPED | {"max_train_steps": 6},
    "muon": MUON | {"max_train_steps": 5},
    "self": DROPPED | {"alignment": "self", "alignment_teacher": "first stage", "max_train_steps": 4},
    "repa": REPA,
    "repa-cache": REPA | {"latents_cache": True, "repeats": 2},  # so that both fill the cache before they train
}
if find_spec("prodigyopt"):
    SAME_STEPS["prodigy"] = PRODIGY | {"max_train_steps": 5}
RECTANGLES = {"aspect_ratio_buckets": "16,16;12,20;20,12", "learning_rate": 1e-4, "masked_loss": True}
RECTANGLES |= {
    "with_prior_preservation": True,
    "class_prompt": "a photo",
    "num_class_images": 3,
    "prior_loss_weight": 0.3,
}
ENCODERS = {"rank": 2, "train_text_encoder": True, "text_encoder_lr": 1e-3, "gradient_accumulation_steps": 2}
RESTARTS = {
    "plain": {**EXACT, "dataloader_num_workers": 2},
    "accumulation": {**EXACT, "dataloader_num_workers": 2, "gradient_accumulation_steps": 2},
    "cache": {
        **EXACT, "latents_cache": True, "dataset_name": "damaged", "max_bad_fraction": 1.0, "dataloader_num_workers": 1
    },
}  # fmt: skip
STEPS = 12
SAMPLES = {"num_samples": 10, "num_inference_steps": 2, "guidance_scale": 2.0, "guidance_interval": (0.2, 0.8)}


@pytest.fixture(scope="module")
def line_of(data, vae, damaged, encoders, tmp_path_factory):
    """Builds the command line of a run with the folders that its options name for short."""

    @cache
    def first_stage():
        folder = tmp_path_factory.mktemp("first") / "run"
        AcceleratorState._reset_state(True)
        options = {"alignment_target": "velocity", "learning_rate": 1e-2, "output_dir": folder}
        assert train_vaerepa.main(tiny_run(data, vae, **options)) == 0
        return folder

    folders = {"damaged": lambda: damaged, "dinov2": lambda: encoders("dinov2"), "first stage": first_stage}

    def build(run, **options) -> list[str]:
        given = {name: folders[v]() if isinstance(v, str) and v in folders else v for name, v in options.items()}
        own = {"latents_cache": f"{run}-cache"} if options.get("latents_cache") else {}
        return tiny_run(data, vae, **given | own | {"output_dir": run})

    return build


def sampling(model, folder, **options) -> list[str]:
    return command_line(SAMPLES | {"pretrained_model_name_or_path": model, "output_dir": folder} | options)


@pytest.fixture(scope="module")
def two_processes(line_of, tuning, rectangles, flow_pipeline, tmp_path_factory):
    """The folder with the runs of two processes, by their names, and what was printed."""
    folder = tmp_path_factory.mktemp("two")

    def training(name: str, **more) -> dict:
        keys = ("double", "code", "elsewhere", "stop", "unread")
        options = {key: value for key, value in more.items() if key not in keys}
        given = {key: more[key] for key in keys if key in more}
        return {"module": "train_vaerepa", "arguments": line_of(folder / name, **options), **given}

    def restart(stop: int) -> list[dict]:
        resume = {"max_train_steps": stop, "resume_from_checkpoint": "latest"}
        return [training(f"pieces-{case}", **options | resume) for case, options in RESTARTS.items()]

    first = [training(f"same-{name}", **options, double=True) for name, options in SAME_STEPS.items()]
    options = RECTANGLES | {"dataset_name": rectangles, "class_data_dir": folder / "class"}
    first.append(training("rectangles", **tuning("sd3", **options)))
    first.append(training("encoders", **tuning("sd3", **ENCODERS), double=True))
    first += [training(f"whole-{name}", **options | {"max_train_steps": STEPS}) for name, options in RESTARTS.items()]
    first += restart(5)
    first.append(training("heads", alignment_stop_step=2, max_train_steps=5, checkpointing_steps=1))
    for rule, code in (("continue", 0), ("stop", 1)):
        (folder / f"fails-{rule}").mkdir()
        (folder / f"fails-{rule}/.checkpoint-2.unfinished").touch()  # a file where the folder should be made
        options = {"checkpoint_failure": rule, "checkpointing_steps": 2, "max_train_steps": 6}
        first.append(training(f"fails-{rule}", **options, code=code))
    generate = {"module": "vaerepa.evaluate", "arguments": sampling(flow_pipeline, folder / "samples", batch_size=3)}
    first += [generate | {"unwritten": 7, "code": 1}, generate]
    whole = RESTARTS["plain"] | {"max_train_steps": STEPS, "resume_from_checkpoint": "latest"}
    first.append(training("stopped", **whole, stop=3))
    first.append(training("unread", **whole | {"dataloader_num_workers": 0}, unread=5 * 8, code=1))
    then = [*restart(9), *restart(STEPS)]  # by other processes
    then += [training("stopped", **whole), training("unread", **whole)]
    then.append(training("not-shared", elsewhere="output_dir", code=2))
    then.append(training("cache-of-each", latents_cache=True, elsewhere="latents_cache", code=2))
    then.append(training("copies", **RESTARTS["cache"] | {"max_train_steps": STEPS}, elsewhere="latents_cache"))
    printed = ""
    for number, runs in enumerate((first, then)):
        if number == 1:
            for copy in ("copies-cache", "copies-cache-elsewhere"):
                shutil.copytree(folder / "whole-cache-cache", folder / copy)
        (folder / f"{number}.json").write_text(json.dumps(runs))
        command, environment = launcher(2)
        command += ["-m", "tests.helpers_processes", str(folder / f"{number}.json")]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        sys.stderr.write(result.stderr)
        assert result.returncode == 0, result.stderr[-3000:]
        printed += result.stderr
    assert printed.count(" x 2 processes x ") >= len(first) + len(then) - 3
    return folder, printed


@pytest.mark.parametrize("case", SAME_STEPS)
def test_two_processes_take_the_steps_of_one(two_processes, line_of, tmp_path, case):
    AcceleratorState._reset_state(True)
    options = SAME_STEPS[case]
    with double_precision():
        assert train_vaerepa.main(line_of(tmp_path / "one", **options)) == 0
    runs = [tmp_path / "one", two_processes[0] / f"same-{case}"]
    one, two = (tensors_of(run, options.get("max_train_steps", 4)) for run in runs)
    assert next(iter(one.values())).dtype == torch.float64
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one if one[name].is_floating_point()) < 1e-9
    weights = [name for name in one if name.startswith("state/transformer/")]
    assert max((one[name] - two[name]).abs().max().item() for name in weights) < 1e-10
    for name in ("train/loss", "train/denoising_loss"):
        losses = [[line[name] for line in read_metrics(run, name)] for run in runs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_two_processes_take_the_steps_of_one_over_rectangles(two_processes, finetune, rectangles):
    folder, _ = two_processes
    options = RECTANGLES | {"dataset_name": rectangles, "class_data_dir": folder / "class"}
    assert len(list((folder / "class").rglob("*.png"))) == 3  # generated by both
    runs = [finetune("sd3", **options), folder / "rectangles"]
    one, two = (tensors_of(run, 4) for run in runs)
    weights = [name for name in one if name.startswith("state/transformer/")]
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in weights)
    losses = [[line["train/loss"] for line in read_metrics(run, "train/loss")] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_processes_train_text_encoders_as_one(two_processes, finetune):
    with double_precision():
        runs = [finetune("sd3", **ENCODERS), two_processes[0] / "encoders"]
    one, two = (tensors_of(run, 4) for run in runs)
    layers = [name for name in one if name.startswith("state/transformer/text_encoder") and "lora_B" in name]
    assert all(one[name].any() for name in layers)
    assert len(layers) == 2 * 2 * 4  # encoders, their blocks, q, k, v and out
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-9


@pytest.mark.parametrize("case", RESTARTS)
def test_restarts_are_exact_on_two_processes(two_processes, case):
    folder, _ = two_processes
    assert_same_end(folder / f"whole-{case}", folder / f"pieces-{case}", STEPS)
    if case == "cache":
        assert set(rows_in(folder / "pieces-cache-cache")) == set(range(40))


@pytest.mark.parametrize("case", ["stopped", "unread"])
def test_what_befalls_one_process_ends_both_after_the_same_step(two_processes, case):
    folder, printed = two_processes
    # a signal after step 3 is heard while step 4 is taken; of 8 samples a step those of the sixth cannot be read
    end = {"stopped": 4, "unread": 5}[case]
    assert [step_of(checkpoint) for checkpoint in all_checkpoints(folder / case)] == [end, STEPS]
    assert {"stopped": "stopped by another process after step 4", "unread": "another process cannot read"}[
        case
    ] in printed
    assert_same_end(folder / "whole-plain", folder / case, STEPS)


def test_the_head_leaves_on_two_processes_when_alignment_stops(two_processes):
    run = two_processes[0] / "heads"
    held = [any(name.startswith("heads/heads/") for name in tensors_of(run, step)) for step in range(1, 6)]
    trained = [any(name.startswith("state/optimizer/heads.") for name in tensors_of(run, step)) for step in range(1, 6)]
    assert held == trained == [True, False, False, False, False]
    assert [line["step"] for line in read_metrics(run, "train/alignment_loss_vae")] == [1, 2]


def test_two_processes_agree_on_a_save_that_fails(two_processes):
    folder, printed = two_processes
    kept = {rule: [path.name for path in all_checkpoints(folder / f"fails-{rule}")] for rule in ("continue", "stop")}
    assert kept == {"continue": ["checkpoint-4", "checkpoint-6"], "stop": []}
    assert read_metrics(folder / "fails-stop", "train/loss")[-1]["step"] <= 4
    assert "Training goes on and tries again in 2 steps" in printed


def test_two_processes_generate_what_one_generates_where_one_was_stopped_by_a_full_disk(
    two_processes, flow_pipeline, tmp_path
):
    assert evaluate.main(sampling(flow_pipeline, tmp_path / "samples", batch_size=4)) == 0
    one, two = (
        np.stack([pixels.numpy() for _, pixels in read_pixels(folder, range(10))]).astype(int)
        for folder in (tmp_path / "samples", two_processes[0] / "samples")
    )
    assert np.abs(one - two).max() <= 1
    full = f"No space left on device: {two_processes[0] / 'samples/images/000007.png'}"
    assert two_processes[1].count(full) == 2  # the second process was refused a file, and both ended


@pytest.mark.parametrize("name", ["not-shared", "cache-of-each-cache"])
def test_a_folder_that_is_not_shared_is_refused(two_processes, name):
    folder, printed = two_processes
    assert f"{folder / name} is not the same folder for all processes (1 of 2 see what the first writes)" in printed
    assert not list((folder / name).glob("[!.]*.arrow")) + list((folder / name).glob("checkpoint-*"))


def test_each_process_may_read_a_copy_of_a_complete_cache(two_processes):
    assert_same_end(two_processes[0] / "whole-cache", two_processes[0] / "copies", STEPS)
