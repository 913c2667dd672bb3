"""The class-conditional family: DiTTransformer2DModel, trained as DiT and SiT are, exported as a stock DiTPipeline."""

import re
import types
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiTPipeline, DiTTransformer2DModel, SchedulerMixin
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from vaerepa.errors import OptionError
from vaerepa.families.pretrained import EXPECTED, load_index
from vaerepa.hub.reasons import UNREADABLE, why_unreadable
from vaerepa.randomness import generator, seeded_weights

is_text, knows_shift = False, False
PATCH_SIZES = (2, 4, 8)
PIPELINE_NULL_CLASS = 1000  # DiTPipeline asks for this row when it guides, whatever the number of classes


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
    """Shares block 0's embedder with all blocks, in place, and applies the cures that training needs."""
    for block in transformer.transformer_blocks:
        block.norm1.emb = transformer.transformer_blocks[0].norm1.emb
    return _cure(transformer)


def to_stock_form(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """A stock model on the CPU with the same outputs: every block owns a copy of the embedder again."""
    with init_empty_weights(include_buffers=False):  # a fresh XL takes seconds to initialise
        stock = DiTTransformer2DModel.from_config(transformer.config)
    weights = {name: weight.detach().to("cpu", copy=True) for name, weight in transformer.state_dict().items()}
    if isinstance(transformer.proj_out_2, MeanProjection):
        weights["proj_out_2.weight"], weights["proj_out_2.bias"] = transformer.proj_out_2.whole()
        del weights["proj_out_2.variance_weight"], weights["proj_out_2.variance_bias"]
    stock.load_state_dict(weights, assign=True)
    return stock.eval()


class MeanProjection(nn.Linear):
    """The last layer of a model with learned sigma, without the rows of the variance.

    Those keep out of training altogether (no gradient, no decay) and wait here for the export, so that the file keeps its
    shape.

    Args:
        projection: the whole layer, of output width p * p * 2C, the C channels of the mean before those of the variance.
        latent_channels: C.
    """

    def __init__(self, projection: nn.Linear, latent_channels: int):
        rows = torch.arange(projection.out_features).view(-1, 2, latent_channels)
        super().__init__(projection.in_features, projection.out_features // 2)
        self.latent_channels = latent_channels
        with torch.no_grad():
            self.weight.copy_(projection.weight[rows[:, 0].flatten()])
            self.bias.copy_(projection.bias[rows[:, 0].flatten()])
        self.register_buffer("variance_weight", projection.weight[rows[:, 1].flatten()].detach().clone())
        self.register_buffer("variance_bias", projection.bias[rows[:, 1].flatten()].detach().clone())

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the whole layer, on the CPU."""
        pairs = ((self.weight, self.variance_weight), (self.bias, self.variance_bias))
        return tuple(
            torch.stack([tensor.detach().cpu().unflatten(0, (-1, self.latent_channels)) for tensor in pair], 1).flatten(
                0, 2
            )
            for pair in pairs
        )


@torch.no_grad()
def initialize(transformer: DiTTransformer2DModel, seed: int) -> None:
    """DiT's initial weights (`initialize_weights` of facebookresearch/DiT), from a seed of their own.

    Linear layers xavier-uniform with zero bias, q, k and v as the thirds of one fused matrix; the patch convolution as the
    matrix that it is; label table and timestep MLP N(0, 0.02); modulation and final layer zero.
    """
    with seeded_weights(seed, "transformer"):
        initialize_linear(transformer)
        for block in transformer.transformer_blocks:
            for projection in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
                # fan-out of the fused (3d, d) matrix: sqrt(6 / 4d) is xavier of (d, d) with this gain
                nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5)
            nn.init.zeros_(block.norm1.linear.weight)
        initialize_patches(transformer.pos_embed.proj)
        embedder = transformer.transformer_blocks[0].norm1.emb
        nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
        for final_layer in (transformer.proj_out_1, transformer.proj_out_2):
            nn.init.zeros_(final_layer.weight)


def initialize_linear(module: nn.Module) -> None:
    """All Linear layers xavier-uniform with zero bias."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


def initialize_patches(convolution: nn.Conv2d) -> None:
    """The patch convolution as the matrix that it is."""
    nn.init.xavier_uniform_(convolution.weight.view(convolution.weight.shape[0], -1))
    nn.init.zeros_(convolution.bias)


@dataclass(frozen=True)
class PretrainedPipeline:
    """What is taken over from a DiTPipeline that is fine-tuned; `id2label` is None where it names no classes."""

    transformer: DiTTransformer2DModel
    scheduler: SchedulerMixin
    id2label: dict[int, str] | None
    shares_embedder: bool


def is_official_file(name_or_path: str) -> bool:
    """Whether this is a checkpoint as the official code of DiT, SiT and REPA writes them."""
    return name_or_path.endswith((".pt", ".pth", ".ckpt"))


def load_pipeline(name_or_path: str, **where: str | None) -> PretrainedPipeline:
    """Loads transformer (in training form), scheduler and class names of a DiTPipeline from the Hub or a folder.

    Args:
        where: revision, variant and cache_dir, as `from_pretrained` takes them.

    Raises:
        OptionError: nothing there, another kind of pipeline, or a checkpoint of the official code.
    """
    flag = f"--pretrained_model_name_or_path {name_or_path}"
    if is_official_file(name_or_path):
        raise OptionError(
            f"{flag}: checkpoints of the official code are no diffusers pipelines. DiT's are on the Hub as "
            "facebook/DiT-XL-2-256 and -512; SiT's and REPA's cannot be used, for they know time as t in [0, 1] by another "
            "sinusoid."
        )
    variant = where.pop("variant", None)
    index = load_index("pretrained_model_name_or_path", name_or_path, **where)
    if index.get("transformer", [None, None])[1] != "DiTTransformer2DModel":
        raise OptionError(f"{flag} holds a {index.get('_class_name')}; expected a DiTPipeline.")
    try:  # weights in safetensors, or in files that torch opens with weights_only
        transformer = DiTTransformer2DModel.from_pretrained(
            name_or_path, subfolder="transformer", variant=variant, dtype=torch.get_default_dtype(), **where
        )
    except UNREADABLE as error:
        reason = why_unreadable(name_or_path, error, EXPECTED)
        raise OptionError(f"{flag}: its transformer cannot be loaded: {reason}") from error
    scheduler_class = getattr(diffusers, index["scheduler"][1])
    shares_embedder = _share_equal_embedders(transformer)
    if has_learned_sigma(transformer):
        transformer.proj_out_2 = MeanProjection(transformer.proj_out_2, transformer.config.in_channels)
        transformer.out_channels = transformer.config.in_channels
    id2label = index.get("id2label")
    return PretrainedPipeline(
        _cure(transformer),
        scheduler_class.from_pretrained(name_or_path, subfolder="scheduler", **where),
        {int(label): name for label, name in id2label.items()} if id2label else None,
        shares_embedder,
    )


def has_learned_sigma(transformer: DiTTransformer2DModel) -> bool:
    """Whether its file predicts a variance beside the noise, as DiT's do."""
    return transformer.config.out_channels == 2 * transformer.config.in_channels


@torch.no_grad()
def draw_new_labels(transformer: DiTTransformer2DModel, num_classes: int, seed: int) -> None:
    """Rows of the label table for a new set of classes, N(0, 0.02) as at DiT's start; the null row stays.

    Raises:
        OptionError: the table has too few rows.
    """
    if num_classes > transformer.config.num_embeds_ada_norm:
        raise OptionError(
            f"the data set has {num_classes} classes, the pretrained transformer room for "
            f"{transformer.config.num_embeds_ada_norm}; train from scratch, or take fewer classes."
        )
    rows = torch.empty(num_classes, inner_width(transformer))
    rows.normal_(std=0.02, generator=generator(seed, "labels"))
    for block in transformer.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table.weight
        table[:num_classes] = rows.to(table)


def latent_shape(transformer: DiTTransformer2DModel) -> tuple[int, int, int]:
    """Shape (C, H, W) of the latents that it was made for."""
    return transformer.config.in_channels, transformer.config.sample_size, transformer.config.sample_size


def inner_width(transformer: DiTTransformer2DModel) -> int:
    """Width d of the hidden states (B, N, d)."""
    return transformer.inner_dim


def blocks(transformer: DiTTransformer2DModel) -> nn.ModuleList:
    """The transformer blocks; each returns hidden states of shape (B, N, d)."""
    return transformer.transformer_blocks


def patch_size(transformer: DiTTransformer2DModel) -> int:
    """Side p of a patch in latent pixels."""
    return transformer.config.patch_size


def inputs(transformer: DiTTransformer2DModel, timesteps: torch.Tensor, batch: dict) -> dict[str, torch.Tensor]:
    """What `predict` takes beside the latents of a batch."""
    return model_inputs(transformer, timesteps, batch["condition"], batch["draws"]["drop"])


def predict(transformer: nn.Module, noisy: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Velocity eps - z, or noise, of shape (B, C, H, W), from noisy latents of that shape."""
    return transformer(noisy, **inputs, return_dict=False)[0]


def example_inputs(transformer: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs of one sample, for measuring."""
    label, drop = torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.bool, device=device)
    return model_inputs(transformer, torch.zeros(1, device=device), label, drop)


def hidden_states_of(output: torch.Tensor) -> torch.Tensor:
    """The hidden states (B, N, d) in what a block returns."""
    return output


def image_places(transformer: nn.Module, noisy: torch.Tensor) -> slice:
    """Which of them are the image's."""
    return slice(None)


def model_inputs(
    transformer: DiTTransformer2DModel, timesteps: torch.Tensor, labels: torch.Tensor, drop: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the forward takes beside the latents: the timesteps and the labels, the null class where dropped.

    Args:
        timesteps: as stock schedulers count them, from 0 to 1000, shape (B,).
        labels: class labels, shape (B,).
        drop: whether each sample loses its label, boolean, shape (B,).
    """
    null_class = transformer.config.num_embeds_ada_norm
    return {"timestep": timesteps, "class_labels": torch.where(drop, null_class, labels)}


def build_stock_pipeline(
    transformer: DiTTransformer2DModel, vae: nn.Module, scheduler: SchedulerMixin, id2label: dict[int, str]
) -> DiTPipeline:
    """A DiTPipeline, on the CPU but for the VAE, from a transformer in training form."""
    pipeline = DiTPipeline(transformer=to_stock_form(transformer), vae=vae, scheduler=scheduler)
    pipeline.register_to_config(id2label={str(label): name for label, name in id2label.items()})
    return pipeline


def write_stock_pipeline(folder: Path, pipeline: DiTPipeline) -> None:
    """Writes all of a DiTPipeline but the VAE's folder."""
    pipeline.save_config(folder)
    pipeline.transformer.save_pretrained(folder / "transformer")
    pipeline.scheduler.save_pretrained(folder / "scheduler")


def works_in_stock_pipeline(num_classes: int) -> bool:
    """Whether guidance in DiTPipeline finds the null class."""
    return num_classes <= PIPELINE_NULL_CLASS


def _share_equal_embedders(transformer: DiTTransformer2DModel) -> bool:
    """Shares the embedders of a loaded model only when that changes nothing: when they are bit-equal in all blocks."""
    first, *others = (block.norm1.emb.state_dict() for block in transformer.transformer_blocks)
    equal = all(torch.equal(first[name], other[name]) for other in others for name in first)
    if equal:
        to_training_form(transformer)
    return equal


def _cure(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    for block in transformer.transformer_blocks:
        # each block would drop labels for itself: the sample's label is dropped once, by the trainer
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    keep_residual_stream_float32(transformer)
    return transformer


def keep_residual_stream_float32(transformer: DiTTransformer2DModel) -> None:
    """PatchEmbed casts to its convolution's dtype: in half precision the residual stream of all blocks would follow."""
    patch_embed = transformer.pos_embed
    patch_embed.forward = types.MethodType(
        _forward_without_autocast, patch_embed
    )  # a method follows its module's copies


def _forward_without_autocast(patch_embed: PatchEmbed, latents: torch.Tensor) -> torch.Tensor:
    kind = latents.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():  # not on meta
        return PatchEmbed.forward(patch_embed, latents.to(patch_embed.proj.weight.dtype))
