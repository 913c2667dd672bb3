"""Makes configs/quickstart/vision_encoder: a small vision transformer of DINOv2's architecture, for REPA on the digits.

    python configs/quickstart/make_vision_encoder.py

It learns to classify the training digits by the mean of its patch tokens; a real run takes DINOv2 itself.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from torch import nn
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit import BitImageProcessorPil

FOLDER = Path(__file__).with_name("vision_encoder")
SIDE, PATCH_SIZE, WIDTH, NUM_CLASSES = 32, 8, 64, 10  # 4x4 patch tokens, as the quickstart's latents have
STEPS, BATCH_SIZE, LEARNING_RATE, MAX_SHIFT = 2000, 64, 2e-3, 2
MEAN = STD = 0.5
CARD = """\
# The quickstart's vision encoder

A transformer of DINOv2's architecture for 32-pixel pictures: {size:.2f} M parameters, 4x4 patch tokens of width {width}, fp16
weights. It learned to classify the training digits beside it from the mean of its patch tokens, and is what `--alignment repa`
aligns to where no published encoder is at hand. Made by `make_vision_encoder.py` in {steps} steps (seed 0); of {count} validation
digits it names {accuracy:.1%}.
"""


class Classifier(nn.Module):
    """The encoder, and one layer over the mean of its patch tokens."""

    def __init__(self):
        super().__init__()
        config = Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH_SIZE,
            layerscale_value=1.0,
            initializer_range=0.1,  # so small a model starts slowly at 0.02
        )
        self.encoder = Dinov2Model(config)
        self.logits = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder(pixel_values=(images / 255.0 - MEAN) / STD).last_hidden_state
        return self.logits(tokens[:, 1:].mean(1))  # the first is the class token


def read(split: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, 32, 32) in [0, 255] and labels (N,)."""
    images = np.stack([np.asarray(image.convert("RGB")) for image in split["image"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float(), torch.tensor(split["label"])


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Shifts all images alike, by up to two pixels."""
    places = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,)).tolist()
    return images.roll(places, dims=(-2, -1))


def main() -> None:
    torch.manual_seed(0)
    splits = load_dataset(str(FOLDER.with_name("digits")))
    (images, labels), (validation_images, answers) = read(splits["train"]), read(splits["validation"])
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        places = torch.randint(len(images), (BATCH_SIZE,))
        F.cross_entropy(model(shifted(images[places])), labels[places]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        accuracy = (model.eval()(validation_images).argmax(1) == answers).float().mean().item()
    shutil.rmtree(FOLDER, ignore_errors=True)
    model.encoder.half().save_pretrained(FOLDER)
    size = {"height": SIDE, "width": SIDE}
    processor = BitImageProcessorPil(
        size=size, do_center_crop=False, resample=3, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    processor.save_pretrained(FOLDER)
    parameters = sum(parameter.numel() for parameter in model.encoder.parameters()) / 1e6
    card = CARD.format(size=parameters, width=WIDTH, steps=STEPS, count=len(answers), accuracy=accuracy)
    (FOLDER / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
