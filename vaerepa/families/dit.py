"""The class-conditional family: DiTTransformer2DModel, trained as DiT and SiT are, exported as a stock DiTPipeline."""

import re
import types
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from vaerepa.randomness import draw_seed

PATCH_SIZES = (2, 4, 8)
PIPELINE_NULL_CLASS = 1000  # DiTPipeline asks for this row when it guides, whatever the number of classes
TIME_SCALE = 1000.0  # stock schedulers count timesteps from 0 to 999: t in [0, 1] is fed as 1000 t


@dataclass(frozen=True)
class Size:
    """Depth, width (d) and number of heads of a transformer."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int


# DiT, arXiv 2212.09748, table 1; SiT, arXiv 2401.08740, uses the same
SIZES = {
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}


def parse_model_name(name: str) -> tuple[Size, int]:
    """Splits `SiT-XL/2` into its size and its patch size.

    Raises:
        ValueError: there is no such preset.
    """
    match = re.fullmatch(r"SiT-(\w+)/(\d+)", name)
    if match is None or match[1] not in SIZES or int(match[2]) not in PATCH_SIZES:
        raise ValueError(
            f"there is no model `{name}`: presets are SiT-{'|'.join(SIZES)}/{'|'.join(map(str, PATCH_SIZES))}"
        )
    return SIZES[match[1]], int(match[2])


def default_alignment_block(num_layers: int) -> int:
    """The paper's block, counted from 1: 2 for B, 8 for L and XL (method: arXiv 2601.17830)."""
    return 2 if num_layers <= 12 else 8


def build_transformer(
    size: Size, patch_size: int, latent_channels: int, latent_size: int, num_classes: int
) -> DiTTransformer2DModel:
    """A transformer in training form, with the weights of a fresh module (see `initialize`).

    Training form: one timestep-and-label embedder shared by all blocks, no label dropout inside the model, and a residual
    stream that stays float32 under autocast. Its forward takes latents (B, C, H, W), timesteps 1000 t (B,) and labels (B,).
    """
    transformer = DiTTransformer2DModel(
        num_attention_heads=size.num_attention_heads,
        attention_head_dim=size.hidden_size // size.num_attention_heads,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=size.num_layers,
        sample_size=latent_size,
        patch_size=patch_size,
        num_embeds_ada_norm=max(num_classes, PIPELINE_NULL_CLASS),
    )
    return to_training_form(transformer)


def to_training_form(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Shares block 0's embedder with all blocks, in place, and applies the two cures that training needs."""
    embedder = transformer.transformer_blocks[0].norm1.emb
    # each block would drop labels for itself: the sample's label is dropped once, by the trainer
    embedder.class_embedder.dropout_prob = 0.0
    for block in transformer.transformer_blocks:
        block.norm1.emb = embedder
    _keep_residual_stream_float32(transformer)
    return transformer


def to_stock_form(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """A stock model on the CPU with the same outputs: every block owns a copy of the embedder again."""
    with init_empty_weights(include_buffers=False):  # a fresh XL takes seconds to initialise
        stock = DiTTransformer2DModel.from_config(transformer.config)
    weights = {name: weight.detach().to("cpu", copy=True) for name, weight in transformer.state_dict().items()}
    stock.load_state_dict(weights, assign=True)
    return stock.eval()


@torch.no_grad()
def initialize(transformer: DiTTransformer2DModel, seed: int) -> None:
    """DiT's initial weights (`initialize_weights` of facebookresearch/DiT), from a seed of their own.

    Linear layers xavier-uniform with zero bias, q, k and v as the thirds of one fused matrix; the patch convolution as the
    matrix that it is; label table and timestep MLP N(0, 0.02); modulation and final layer zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed(seed, "transformer"))
        for module in transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in transformer.transformer_blocks:
            for projection in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
                # fan-out of the fused (3d, d) matrix: sqrt(6 / 4d) is xavier of (d, d) with this gain
                nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5)
            nn.init.zeros_(block.norm1.linear.weight)
        patch_convolution = transformer.pos_embed.proj
        nn.init.xavier_uniform_(patch_convolution.weight.view(patch_convolution.weight.shape[0], -1))
        nn.init.zeros_(patch_convolution.bias)
        embedder = transformer.transformer_blocks[0].norm1.emb
        nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
        for final_layer in (transformer.proj_out_1, transformer.proj_out_2):
            nn.init.zeros_(final_layer.weight)


def blocks(transformer: DiTTransformer2DModel) -> nn.ModuleList:
    """The transformer blocks; each returns hidden states of shape (B, N, d)."""
    return transformer.transformer_blocks


def model_inputs(
    transformer: DiTTransformer2DModel, t: torch.Tensor, labels: torch.Tensor, drop: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the forward takes beside the latents: the timestep 1000 t and the labels, the null class where dropped.

    Args:
        t: times in [0, 1], shape (B,).
        labels: class labels, shape (B,).
        drop: whether each sample loses its label, boolean, shape (B,).
    """
    null_class = transformer.config.num_embeds_ada_norm
    return {"timestep": TIME_SCALE * t, "class_labels": torch.where(drop, null_class, labels)}


def write_stock_pipeline(
    folder: Path, transformer: DiTTransformer2DModel, vae: nn.Module, id2label: dict[int, str]
) -> None:
    """Writes a DiTPipeline, all but the VAE's folder, from a transformer in training form."""
    pipeline = DiTPipeline(transformer=to_stock_form(transformer), vae=vae, scheduler=build_scheduler())
    pipeline.register_to_config(id2label={str(label): name for label, name in id2label.items()})
    pipeline.save_config(folder)
    pipeline.transformer.save_pretrained(folder / "transformer")
    pipeline.scheduler.save_pretrained(folder / "scheduler")


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Samples the flow in DiTPipeline; FlowMatchEulerDiscreteScheduler lacks scale_model_input, which it calls."""
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)


def works_in_stock_pipeline(num_classes: int) -> bool:
    """Whether guidance in DiTPipeline finds the null class."""
    return num_classes <= PIPELINE_NULL_CLASS


def _keep_residual_stream_float32(transformer: DiTTransformer2DModel) -> None:
    """PatchEmbed casts to its convolution's dtype: in half precision the residual stream of all blocks would follow."""
    patch_embed = transformer.pos_embed
    patch_embed.forward = types.MethodType(
        _forward_without_autocast, patch_embed
    )  # a method follows its module's copies


def _forward_without_autocast(patch_embed: PatchEmbed, latents: torch.Tensor) -> torch.Tensor:
    kind = latents.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():  # not on meta
        return PatchEmbed.forward(patch_embed, latents.to(patch_embed.proj.weight.dtype))
