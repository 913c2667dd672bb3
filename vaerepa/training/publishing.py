"""Publishing: copies the result to the root of the output folder, writes curves and model card, and uploads to the Hub."""

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vaerepa import lora, model_card, objectives, throughput
from vaerepa.ema import relative_distance
from vaerepa.evaluation import newest_report
from vaerepa.files import link_tree
from vaerepa.hub.push import tag_of
from vaerepa.hub.uploader import Uploader
from vaerepa.layout import HEADS, STATE, folder_of, step_of
from vaerepa.logs import get_logger, plot_curves
from vaerepa.system import write_or_go_on
from vaerepa.training.monitor import Monitor
from vaerepa.training.setup import Setup
from vaerepa.training.state import TrainingState

logger = get_logger(__name__)

CARD_TEMPLATE = Path(__file__).parents[2] / "model_card_template.md"
DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}
PACKAGES = ("torch", "diffusers", "accelerate", "datasets")


def copy_to_root(setup: Setup, state: TrainingState) -> None:
    """Copies the last checkpoint's pipeline to the root of the output folder; call it on the main process."""
    root, last = setup.output_dir, folder_of(setup.output_dir, state.step)
    shutil.rmtree(root / HEADS, ignore_errors=True)  # they may have been dropped since
    training_only = {STATE} if setup.export.ships_heads else {STATE, HEADS}
    for part in last.iterdir():
        if part.is_file():
            shutil.copyfile(part, root / part.name)
        elif part.name not in training_only:
            link_tree(part, root / part.name)
    if setup.base_weights:
        trained = relative_distance(setup.trained_weights.items(), setup.base_weights)
        exported = trained
        if state.ema:
            exported = relative_distance(state.exported_transformer.named_parameters(), setup.base_weights)
        way = f", {exported / trained:.0%} of the way that training went" if trained else ""
        logger.info(f"the exported weights have moved by {exported:.2%} of the base's norm{way}")


def publish(setup: Setup, state: TrainingState, step: int, monitor: Monitor, uploader: Uploader | None) -> None:
    """Writes curves and model card of the checkpoint of a step and gives it to the uploader; call it on the main process."""
    name = uploader.repo_id if uploader else setup.output_dir.resolve().name
    with write_or_go_on("curves and model card"):
        plot_curves(monitor.metrics.read(), setup.output_dir / "training_curves.png")
        facts = card_facts(setup, state, step, monitor)
        facts["tag"] = tag_of(step, setup.options.hub_revision) if uploader else None
        model_card.write_card(setup.output_dir / "README.md", CARD_TEMPLATE, setup.options, name, facts)
    if uploader:
        uploader.push(folder_of(setup.output_dir, step))


def card_facts(setup: Setup, state: TrainingState, step: int, monitor: Monitor) -> dict[str, Any]:
    """Facts for the model card of a step's checkpoint, beside the options."""
    root, transformer = setup.output_dir, state.exported_transformer
    grids = sorted((root / "samples").glob("*.png"))
    published = setup.export.parameters(transformer)
    of_condition = setup.conditioning.card_facts(transformer, root, step)
    return {
        "dtype": DTYPES.get(setup.accelerator.mixed_precision, "torch.float32"),
        "parameters": f"{sum(parameter.numel() for parameter in published) / 1e6:.1f}",
        "steps": step,
        "alignments": setup.alignment_facts,
        "grid": f"samples/{grids[-1].name}" if grids else None,
        "grid_step": step_of(Path(grids[-1].stem)) if grids else None,
        "curves": "training_curves.png" if (root / "training_curves.png").exists() else None,
        "validation_loss": _validation_loss(setup, step, monitor),
        "report": newest_report(root, step),
        "is_flow": objectives.name_of(setup.objective.scheduler) == "flow_matching",
        "pipeline_class": setup.conditioning.pipeline_class.__name__,
        "adapter": lora.NAMES[setup.options.adapter],
        "has_lora_loader": lora.has_loader(setup.conditioning.pipeline_class, setup.options.adapter),
        "machine": throughput.describe_machine(setup.accelerator),
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        **of_condition,
        "tags": (*of_condition["tags"], *setup.export.tags),
        "rank": setup.export.rank,
        "trains_encoders": bool(setup.trained_encoders),
    }


def _validation_loss(setup: Setup, step: int, monitor: Monitor) -> float | None:
    """Validation loss of the weights that were exported at this step; None where there is none."""
    decays = setup.options.ema_decay if setup.options.use_ema else ()
    key = f"validation/ema_{decays[0]}/loss" if len(decays) > 1 else "validation/loss"
    return next((line[key] for line in monitor.metrics.read() if key in line and line["step"] == step), None)
