"""Alignment methods, alone and together: targets as written out, exact restarts, heads that end apart, what is refused."""

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline
from safetensors.torch import load_file

from tests.conftest import read_metrics
from tests.helpers_data import read_samples
from tests.helpers_runs import PRETRAINED, tensors_of
from vaerepa.alignment import AlignmentContext, SRAAlignment, settings
from vaerepa.alignment.sra import TIME_OFFSET
from vaerepa.alignment.taps import output_of
from vaerepa.data import TrainingNumbers, open_sources
from vaerepa.families import Size
from vaerepa.families.dit import DiT, new_transformer
from vaerepa.logs import RunningMeans, by_noise_level
from vaerepa.options import parse_options
from vaerepa.training.state import TrainingState

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- several methods


def metrics_of(run) -> list[dict]:
    timed = ("train/images_per_second", "train/data_wait")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def test_every_method_is_logged_named_in_the_card_and_leaves_a_stock_pipeline(train):
    run = train(alignment=["vae", "sra"], logging_steps=2, gradient_accumulation_steps=2)
    for name in ("vae", "sra"):
        assert len(read_metrics(run, f"train/alignment_loss_{name}", f"train/alignment_gradient_ratio_{name}")) == 2
    assert DiTPipeline.from_pretrained(run).transformer.config.num_layers == 4
    text = (run / "README.md").read_text()
    assert "aligns block 2 with the latents of the VAE and with [SRA](https://arxiv.org/abs/2505.02831)" in text
    assert "aligns block 1 with block 3 of its own EMA weights" in text
    assert "eprint = {2505.02831}" in text
    assert "\n- sra\n" in text


def test_heads_end_one_after_the_other(train):
    options = {"alignment": ["vae", "sra"], "alignment_stop_step": [2, 4], "max_train_steps": 5}
    run = train(**options, checkpointing_steps=1, alignment_weight_schedule=["cosine", "linear"])
    for step, left in {1: {"vae", "sra"}, 2: {"sra"}, 3: {"sra"}, 4: set(), 5: set()}.items():
        tensors = tensors_of(run, step)
        assert {name.split("/")[2].split(".")[0] for name in tensors if name.startswith("heads/heads/")} == left
        assert {name.split(".")[1] for name in tensors if name.startswith("state/optimizer/heads.")} == left
        config = run / f"checkpoint-{step}/heads/config.json"
        assert (set(json.loads(config.read_text())) if left else set()) == left


def test_a_head_that_ended_does_not_come_back(train, refused):
    options = {"alignment": ["vae", "sra"], "max_train_steps": 3}
    run = train(**options, alignment_stop_step=[2, 9])
    options |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    refused("--alignment_stop_step", "vae", **options, alignment_stop_step=9)
    train(**options, alignment_stop_step=1)
    assert not (run / "checkpoint-4/heads").exists()


def test_fine_tuning_keeps_heads_for_the_same_target_alone(train, tmp_path, caplog):
    caplog.set_level("INFO")
    base = train(output_dir=tmp_path / "base", max_train_steps=1)
    for target, kept in (("latent", True), ("velocity", False)):
        caplog.clear()
        train(
            **PRETRAINED,
            pretrained_model_name_or_path=base,
            alignment_target=target,
            output_dir=tmp_path / target,
            max_train_steps=1,
        )
        assert ("its alignment heads are kept" in caplog.text) == kept
        assert ("new ones are initialised" in caplog.text) != kept


def test_at_weight_zero_no_method_changes_the_transformer(train, tmp_path):
    both = train(alignment=["vae", "sra"], alignment_weight=0.0, output_dir=tmp_path / "both")
    none = train(alignment="none", output_dir=tmp_path / "none")
    one, other = (load_file(run / "checkpoint-4/state/transformer.safetensors") for run in (both, none))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_values_are_for_all_or_one_per_method():
    def filled(*arguments: str):
        return settings.fill_in_defaults(parse_options(["--alignment", "vae", "sra", *arguments]))

    options = filled()
    assert options.alignment_weight == (1.0, 0.5)
    assert options.alignment_loss == ("smooth_l1", "cosine")
    assert options.alignment_layers == (5, 2)
    assert options.alignment_stop_step is None
    options = filled("--alignment_loss", "none", "smooth_l1", "--alignment_stop_step", "7", "none")
    assert options.alignment_loss == ("smooth_l1", "smooth_l1")
    assert options.alignment_weight == (1.0, 0.2)
    assert options.alignment_stop_step == (7, None)
    options = filled("--alignment_weight", "0.3", "--alignment_t_range", "0", "1", "0.4", "0.7")
    assert options.alignment_weight == (0.3, 0.3)
    assert settings.t_ranges_of(options) == [(0.0, 1.0), (0.4, 0.7)]
    assert settings.fill_in_defaults(options) == options


def test_a_fine_tuned_text_model_is_aligned_more_weakly():
    given = ["--text_conditioning", "--pretrained_model_name_or_path", "x", "--alignment", "vae", "sra"]
    options = settings.fill_in_defaults(parse_options([*given, "--alignment_weight", "1.0", "none"]))
    assert options.alignment_weight == (1.0, 0.2)
    assert options.alignment_weight_schedule == ("constant", "cosine")
    assert settings.end_with_run(options, 30).alignment_stop_step == (None, 10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alignment": ["vae", "none"]}, ["--alignment vae none", "none alone"]),
        ({"alignment": ["vae", "vae"]}, ["--alignment vae vae", "different methods"]),
        ({"alignment_weight": [1.0, 0.5]}, ["--alignment_weight 1.0 0.5", "one value", "--alignment vae"]),
        (
            {"alignment": ["vae", "sra"], "alignment_block": [1, 2, 3]},
            ["--alignment_block 1 2 3", "one for each of --alignment vae sra"],
        ),
        ({"alignment_t_range": [0, 0.5, 1]}, ["--alignment_t_range 0.0 0.5 1.0", "two numbers"]),
        ({"alignment": ["vae", "sra"], "alignment_t_range": [0, 1, 0.7, 0.4]}, ["rising"]),
        ({"alignment": ["vae", "sra"], "alignment_block": [2, 0]}, ["--alignment_block 0", "above 0"]),
        ({"alignment": ["vae", "sra"], "alignment_block": [2, 5]}, ["--alignment_block 5", "4 blocks"]),
        (
            {
                "alignment": ["vae", "sra"],
                "alignment_weight_schedule": ["constant", "cosine"],
                "alignment_stop_step": [5, "none"],
            },
            ["--alignment_weight_schedule cosine", "--alignment_stop_step"],
        ),
        ({"alignment": "sra", "alignment_teacher_block": 5}, ["--alignment_teacher_block 5", "4 blocks"]),
        ({"alignment_teacher_block": 3}, ["--alignment_teacher_block", "--alignment sra"]),
        ({"alignment": "sra", "no_use_ema": True}, ["--alignment sra", "--no_use_ema"]),
        ({"alignment": "sra", "offload_ema": True}, ["--alignment sra", "--offload_ema"]),
        ({"alignment": "sra", "rank": 4, "text_conditioning": True}, ["--alignment sra", "--rank"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_cannot_go_together_is_refused(refused, options, words):
    refused(*words, **options)


# ---- the loss by noise level


class OneProcess:
    @staticmethod
    def reduce(tensor, reduction):
        return tensor


def test_losses_are_logged_by_noise_level(train):
    running_means = RunningMeans()
    running_means.add(loss=by_noise_level(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.1, 0.15, 1.0])))
    running_means.add(loss=by_noise_level(torch.tensor([6.0, 7.0, 9.0]), torch.tensor([0.0, 0.5, 0.5])))
    expected = {"loss/0.0-0.2": 3.0, "loss/0.4-0.6": 8.0, "loss/0.8-1.0": 5.0}
    assert running_means.means(OneProcess, {}) == pytest.approx(expected)
    run = train(max_train_steps=4, logging_steps=4)
    (line,) = [line for line in metrics_of(run) if "train/loss" in line]
    levels = [name for name in line if name.startswith("train/alignment_by_t_vae/")]
    assert 3 <= len(levels) <= 5
    assert min(line[name] for name in levels) <= line["train/alignment_loss_vae"] <= max(line[name] for name in levels)


# ---- SRA


def test_the_papers_blocks_are_sras_default():
    assert [SRAAlignment.default_blocks(depth) for depth in (12, 24, 28)] == [(3, 8), (6, 16), (8, 20)]
    assert all(
        1 <= student <= teacher <= depth
        for depth in range(1, 60)
        for student, teacher in [SRAAlignment.default_blocks(depth)]
    )


def test_sras_losses_are_as_written_out():
    prediction = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 1.0]]])
    target = torch.tensor([[[4.0, 3.0], [0.0, 5.0]], [[0.0, 1.0], [-1.0, -1.0]]])
    # similarities per token: 24/25 and 0; 1 and -1
    assert SRAAlignment(3).loss(prediction, target).tolist() == pytest.approx([(0.04 + 1) / 2, (0 + 2) / 2])
    # differences 1, 1, 1, 5; 0, 1, 2, 2; each above beta, but for 0, costs itself less 0.025
    smooth = SRAAlignment(3, distance="smooth_l1").loss(prediction, target).tolist()
    assert smooth == pytest.approx([(8 - 4 * 0.025) / 4, (5 - 3 * 0.025) / 4])


def test_the_teachers_time_is_earlier_by_a_fifth_at_most_and_never_below_zero():
    asked = []

    def teacher(t, block):
        asked.append((t, block))
        return torch.zeros(3, 4, 8)

    latents, offset = torch.zeros(3, 4, 4, 4), torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    context = AlignmentContext(
        latents, latents, torch.tensor([0.05, 0.9, 0.5]), numbers={TIME_OFFSET: offset}, teacher=teacher
    )
    SRAAlignment(3).target(context)
    ((t, block),) = asked
    assert block == 3
    assert t.tolist() == pytest.approx([0.0, 0.7, 0.45])


def test_a_tap_stops_where_it_reads():
    size = Size(4, 32, 2)
    transformer = new_transformer(size, 2, 4, 8, 3).eval()
    noisy, inputs = torch.randn(2, 4, 8, 8), {"timestep": torch.rand(2), "class_labels": torch.arange(2)}
    whole, visited = {}, []

    def keep(place):
        def hook(module, args, output):
            visited.append(place)
            whole[place] = output

        return hook

    for place, block in enumerate(transformer.transformer_blocks):
        block.register_forward_hook(keep(place))
    DiT().predict(transformer, noisy, **inputs)
    visited.clear()
    last = transformer.transformer_blocks[2]
    tapped = output_of(last, lambda: DiT().predict(transformer, noisy, **inputs))
    assert torch.equal(tapped, whole[2])
    assert not tapped.requires_grad
    assert visited == [0, 1, 2]
    assert len(last._forward_hooks) == 1  # the test's own


def test_sras_first_steps_are_as_computed_a_second_time(train, data, vae):
    """The third block of the EMA weights of a checkpoint, at the sampled time offset, under the same noise and labels."""
    options = {"alignment": "sra", "seed": 3, "ema_decay": [0.5, 0.9], "label_dropout": 0.5, "checkpointing_steps": 1}
    run = train(**options, max_train_steps=3)
    logged = read_metrics(run, "train/alignment_loss_sra", "train/loss", "train/denoising_loss")[2]
    source = open_sources(str(data)).train
    samples = read_samples(source, TrainingNumbers(3, 0.5, names=SRAAlignment.numbers), seed=3, micro_batch=2)
    numbers = samples.numbers
    state = run / "checkpoint-2/state"
    student = new_transformer(Size(4, 32, 2), 2, 4, 8, 3)
    teacher = copy.deepcopy(student)
    student.load_state_dict(load_file(state / "transformer.safetensors"), strict=False)
    teacher.load_state_dict(load_file(state / "ema_0.5.safetensors"), strict=False)
    head = SRAAlignment(3).build_head(32, 4, 3)
    tensors = load_file(run / "checkpoint-2/state/heads.safetensors")
    head.load_state_dict({name.removeprefix("sra."): tensor for name, tensor in tensors.items()})
    tokens = {}
    student.transformer_blocks[0].register_forward_hook(lambda m, a, output: tokens.__setitem__("student", output))
    teacher.transformer_blocks[2].register_forward_hook(lambda m, a, output: tokens.__setitem__("teacher", output))
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(vae).encode(samples.pixel_values / 127.5 - 1).latent_dist
        z = posterior.mean + posterior.std * numbers["posterior"]
        labels = torch.where(numbers["drop"], 1000, samples.labels)
        t = numbers["t"]
        for model, time in ((student, t), (teacher, torch.relu(t - 0.2 * numbers[TIME_OFFSET]))):
            at = time.view(-1, 1, 1, 1)
            model((1 - at) * z + at * numbers["noise"], timestep=1000 * time, class_labels=labels)
        outputs = head(tokens["student"])
        dot = (outputs * tokens["teacher"]).sum(-1)
        loss = (1 - dot / outputs.norm(dim=-1) / tokens["teacher"].norm(dim=-1)).mean().item()
    assert 0 < numbers["drop"].sum() < 8
    assert logged["train/alignment_loss_sra"] == pytest.approx(loss, rel=1e-4)
    assert logged["train/loss"] == pytest.approx(logged["train/denoising_loss"] + 0.5 * loss, rel=1e-4)


def test_the_teacher_gets_no_gradient(train, monkeypatch):
    ema_weights, snapshot = [], TrainingState.snapshot

    def watched(state):
        ema_weights.append(state.ema.exported)
        return snapshot(state)

    monkeypatch.setattr(TrainingState, "snapshot", watched)
    train(alignment="sra", max_train_steps=2)
    assert all(p.grad is None and not p.requires_grad for p in ema_weights[-1].parameters())
    assert not any(block._forward_hooks for block in ema_weights[-1].transformer_blocks)
