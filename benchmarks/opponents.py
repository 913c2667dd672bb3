"""Training losses of other implementations of SiT, for benchmarks.step_time: of official checkouts, and of stock diffusers."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import nn

from vaerepa.families import parse_preset

NUM_CLASSES = 1000
FEATURES = 768  # width of DINOv2-B, whose tokens REPA's projector meets

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of latents (B, C, H, W) and labels (B,)


def build(name: str, path: str | None, model: str, latent_size: int) -> tuple[nn.Module, Loss]:
    """The module that trains and its loss.

    Args:
        name: sit (github.com/willisma/SiT), repa (github.com/sihyun-yu/REPA) or stock (diffusers).
        path: checkout of an official one. Their packages are needed: timm, and torchdiffeq for SiT.
    """
    return {"sit": _sit, "repa": _repa, "stock": _stock}[name](path, model, latent_size)


def _sit(path: str, model: str, latent_size: int) -> tuple[nn.Module, Loss]:
    models, transport = _import_from(path, "models", "transport")
    module = models.SiT_models[model](input_size=latent_size, num_classes=NUM_CLASSES)
    flow = transport.create_transport()
    return module, lambda latents, labels: flow.training_losses(module, latents, {"y": labels})["loss"].mean()


def _repa(path: str, model: str, latent_size: int) -> tuple[nn.Module, Loss]:
    """With the projector, and with features that are given: its image encoder is no part of the step."""
    models, losses = _import_from(path, "models.sit", "loss")
    width = (
        {"decoder_hidden_size": 384} if model.startswith("SiT-S") else {}
    )  # its S is built for another, and cannot run
    module = models.SiT_models[model](
        input_size=latent_size, num_classes=NUM_CLASSES, z_dims=[FEATURES], fused_attn=True, qk_norm=False, **width
    )
    alignment_loss = losses.SILoss()

    def loss(latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        tokens = (latents.shape[-1] // module.patch_size) ** 2
        features = torch.randn(len(latents), tokens, FEATURES, device=latents.device)
        denoising, projection = alignment_loss(module, latents, {"y": labels}, zs=[features])
        return denoising.mean() + 0.5 * projection.mean()

    return module, loss


def _stock(path: None, model: str, latent_size: int) -> tuple[nn.Module, Loss]:
    """DiTTransformer2DModel as diffusers builds it: an embedder in each block, labels dropped within."""
    _, size, patch_size = parse_preset(model)
    module = DiTTransformer2DModel(
        num_attention_heads=size.num_attention_heads,
        attention_head_dim=size.hidden_size // size.num_attention_heads,
        in_channels=4,
        out_channels=4,
        num_layers=size.num_layers,
        sample_size=latent_size,
        patch_size=patch_size,
        num_embeds_ada_norm=NUM_CLASSES,
    )

    def loss(latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        noise, t = torch.randn_like(latents), torch.rand(len(latents), device=latents.device)
        mix = t.view(-1, 1, 1, 1)
        velocity = module((1 - mix) * latents + mix * noise, timestep=1000 * t, class_labels=labels).sample
        return F.mse_loss(velocity, noise - latents)

    return module, loss


def _import_from(path: str, *names: str) -> list[ModuleType]:
    """Modules of a checkout, which are forgotten again: both have modules of the same names."""
    before = set(sys.modules)
    sys.path.insert(0, path)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(path)
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            places = (getattr(module, "__file__", None), *getattr(module, "__path__", ()))  # a folder may have no file
            if any(place and place.startswith(path) for place in places):
                del sys.modules[name]
