"""Stock diffusers in a process where nothing of ours can be imported, and the pictures that its pipelines draw."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers_python import PythonProcess

DRAW = """
from pathlib import Path
import torch
from diffusers import DiffusionPipeline
for folder, lora, target in {jobs!r}:
    pipeline = DiffusionPipeline.from_pretrained(folder, **{given!r})
    assert type(pipeline).__module__.startswith("diffusers.")
    if lora and not Path(lora, "adapter_config.json").exists():
        pipeline.load_lora_weights(lora)
    elif lora:
        from peft import PeftModel
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, lora)
    options = {{"use_resolution_binning": False}} if "PixArt" in type(pipeline).__name__ else {{}}
    options |= {{}} if "Flux2" in type(pipeline).__name__ else {{"negative_prompt": ""}}  # which Flux2 always takes
    pipeline(
        prompt="a red cat", height=16, width=16, guidance_scale=2.0, num_inference_steps=2,
        max_sequence_length=24, generator=torch.Generator().manual_seed(0), **options,
    ).images[0].save(target)
"""


class StockProcess(PythonProcess):
    """A process that cannot import ours; its pictures come from stock pipelines."""

    def __init__(self, folder: Path):
        super().__init__("-I", cwd=folder)
        self.run('import sys; sys.modules["vaerepa"] = sys.modules["train_vaerepa"] = None')

    def draw(self, target_folder: Path, *jobs: tuple[Path, Path | None], **given: None) -> list[np.ndarray]:
        """Pictures of stock pipelines, each from a folder and the folder of a LoRA.

        What is `given` to from_pretrained are the parts to do without.
        """
        targets = [target_folder / f"stock-{number}.png" for number in range(len(jobs))]
        lines = [
            (str(folder), lora and str(lora), str(target)) for (folder, lora), target in zip(jobs, targets, strict=True)
        ]
        self.run(DRAW.format(jobs=lines, given=given))
        return [np.asarray(Image.open(target)).astype(int) for target in targets]


def picture_in_grid(run: Path, step: int) -> np.ndarray:
    """The first picture of a validation grid, without the prompt under it."""
    grid = Image.open(run / "samples" / f"step-{step:07d}.png")
    return np.asarray(grid.crop((0, 0, 16, 16))).astype(int)
