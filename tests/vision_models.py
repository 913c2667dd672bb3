"""Tiny untrained vision transformers of several kinds, each with its image processor."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers.models.bit import BitImageProcessorPil

SIDE, PATCH_SIZE, WIDTH = 28, 7, 24
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH_SIZE,
    "image_size": SIDE,
}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
CROPPED = {"size": {"shortest_edge": 32}, "crop_size": {"height": SIDE, "width": SIDE}}
KINDS = ("dinov2", "dinov3", "clip", "clip_vision", "siglip", "vit")


def save(kind: str, folder: Path) -> Path:
    """Writes model and processor of a kind."""
    torch.manual_seed(0)
    model, processor = {
        # DINOv2 is trained at another size than it is used at
        "dinov2": lambda: (Dinov2Model(Dinov2Config(**SIZES | {"image_size": 42})), BitImageProcessorPil(**CROPPED)),
        "dinov3": lambda: (
            DINOv3ViTModel(DINOv3ViTConfig(**SIZES, num_register_tokens=4)),
            BitImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False, resample=2),
        ),
        "clip": lambda: (
            CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SIZES)),
            CLIPImageProcessorPil(**CROPPED),
        ),
        "clip_vision": lambda: (CLIPVisionModel(CLIPVisionConfig(**SIZES)), CLIPImageProcessorPil(**CROPPED)),
        "siglip": lambda: (
            SiglipVisionModel(SiglipVisionConfig(**SIZES)),
            SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        ),
        # as classifiers are saved: AutoModel initialises the weights of the pooler that is not there
        "vit": lambda: (
            ViTModel(ViTConfig(**SIZES), add_pooling_layer=False),
            ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        ),
    }[kind]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
