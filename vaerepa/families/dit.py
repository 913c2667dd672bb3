"""DiT: DiTTransformer2DModel, trained on class labels as DiT and SiT are, exported as a stock DiTPipeline."""

from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, SchedulerMixin
from torch import nn

from pipeline_vaerepa import VAEREPAPipeline
from vaerepa.errors import OptionError
from vaerepa.families.base import (
    Conditions,
    Family,
    InputSpec,
    Size,
    have_same_classes,
    initialize_linear,
    initialize_patches,
)
from vaerepa.logs import get_logger
from vaerepa.objectives import flow_scheduler
from vaerepa.randomness import generator, seeded_weights

logger = get_logger(__name__)

PIPELINE_NULL_CLASS = 1000  # DiTPipeline asks for this row when it guides, whatever the number of classes


class DiT(Family):
    """Training form: one timestep-and-label embedder shared by all blocks, no label dropout inside the model.

    Its forward takes latents (B, C, H, W), timesteps 1000 t (B,) and labels (B,), in the words of DiTTransformer2DModel.
    """

    name = "DiT and SiT"
    conditioning = "labels"
    pipelines = ("DiTPipeline", "VAEREPAPipeline")  # ours takes the same parts
    knows_shift = False
    keeps_scheduler = False  # DiTPipeline calls scale_model_input, which not all of them have
    preset = "SiT"
    sizes = {  # noqa: RUF012  DiT, arXiv 2212.09748, table 1; SiT, arXiv 2401.08740, uses the same
        "S": Size(12, 384, 6),
        "B": Size(12, 768, 12),
        "L": Size(24, 1024, 16),
        "XL": Size(28, 1152, 16),
    }
    patch_sizes = (2, 4, 8)

    def build_transformer(self, size: Size, patch_size: int, spec: InputSpec, seed: int) -> DiTTransformer2DModel:
        transformer = new_transformer(size, patch_size, spec.latent_channels, spec.latent_size, spec.num_classes)
        initialize(transformer, seed)
        return transformer

    def default_scheduler(self, shift: float | None) -> SchedulerMixin:
        return flow_scheduler()

    def to_training_form(self, transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
        """Shares one embedder where all are equal, and sets the rows of a learned variance aside."""
        if _has_equal_embedders(transformer):  # a model trained with stock diffusers has different ones
            _share_embedder(transformer)
        if has_learned_sigma(transformer):
            transformer.proj_out_2 = MeanProjection(transformer.proj_out_2, transformer.config.in_channels)
            transformer.out_channels = transformer.config.in_channels
        for block in transformer.transformer_blocks:
            # each block would drop labels for itself: the sample's label is dropped once, by the trainer
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        return super().to_training_form(transformer)

    def to_stock_form(self, transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
        """A stock model on the CPU with the same outputs: every block owns a copy of the embedder again."""
        stock = self.stock_skeleton(transformer)
        stock.load_state_dict(self.stock_weights(transformer), assign=True)
        return stock

    def stock_skeleton(self, transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
        """Not for a thread beside others that build modules: none that is built meanwhile gets weights."""
        with init_empty_weights(include_buffers=False):  # a fresh XL takes seconds to initialise
            return DiTTransformer2DModel.from_config(transformer.config).eval()

    def stock_weights(self, transformer: DiTTransformer2DModel) -> dict[str, torch.Tensor]:
        """Copies on the CPU, one of the embedder for each block."""
        weights = {name: weight.detach().to("cpu", copy=True) for name, weight in transformer.state_dict().items()}
        if isinstance(transformer.proj_out_2, MeanProjection):
            weights["proj_out_2.weight"], weights["proj_out_2.bias"] = transformer.proj_out_2.whole()
            del weights["proj_out_2.variance_weight"], weights["proj_out_2.variance_bias"]
        return weights

    def fit_to_classes(
        self, transformer: DiTTransformer2DModel, known: dict[int, str] | None, id2label: dict[int, str], seed: int
    ) -> None:
        """Keeps the label embeddings where the classes are the same, else initializes their rows; says what it does.

        Raises:
            OptionError: the label table has too few rows.
        """
        if not _shares_embedder(transformer):
            logger.info("its blocks have different timestep and label embedders: they are left apart")
        if has_learned_sigma(transformer):
            logger.info("its learned variance is kept as it is, and is no longer calibrated after training")
        if have_same_classes(known, id2label):
            logger.info("its classes are the data set's: their embeddings are kept")
        else:
            logger.info(
                "its classes are not the data set's: their embeddings are initialised again, the null class' is kept"
            )
            initialize_labels(transformer, len(id2label), seed)

    def inputs(
        self, transformer: DiTTransformer2DModel, timesteps: torch.Tensor, batch: Conditions
    ) -> dict[str, torch.Tensor]:
        return model_inputs(transformer, timesteps, batch.labels, batch.drop)

    def predict(self, transformer: nn.Module, noisy: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return transformer(noisy, **inputs, return_dict=False)[0]

    def conditioning_embedding(
        self,
        transformer: DiTTransformer2DModel,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
    ) -> torch.Tensor:
        embedder = transformer.transformer_blocks[0].norm1.emb  # which the final layer takes too
        return embedder(timestep, class_labels, hidden_dtype=noisy.dtype)

    def read_call(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return hidden_states, timestep, {"timestep": timestep, "class_labels": class_labels}

    def example_inputs(self, transformer: DiTTransformer2DModel, device: torch.device) -> dict[str, torch.Tensor]:
        label, drop = torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.bool, device=device)
        return model_inputs(transformer, torch.zeros(1, device=device), label, drop)

    def fixed_size(self, transformer: DiTTransformer2DModel) -> int:
        return transformer.config.sample_size

    def pipeline_class(self, name: str | None = None) -> type[DiffusionPipeline]:
        return DiTPipeline

    def num_classes(self, transformer: DiTTransformer2DModel) -> int:
        return transformer.config.num_embeds_ada_norm

    def has_learned_sigma(self, transformer: DiTTransformer2DModel) -> bool:
        return has_learned_sigma(transformer)

    def works_in_stock_pipeline(self, num_classes: int) -> bool:
        """Whether guidance in DiTPipeline finds the null class."""
        return num_classes <= PIPELINE_NULL_CLASS

    def flow_pipeline(
        self, transformer: nn.Module, vae: nn.Module, scheduler: SchedulerMixin, id2label: dict[int, str] | None
    ) -> DiffusionPipeline:
        return VAEREPAPipeline(transformer, vae, scheduler, id2label)


def new_transformer(
    size: Size, patch_size: int, latent_channels: int, latent_size: int, num_classes: int
) -> DiTTransformer2DModel:
    """A transformer in training form, with the weights of fresh torch layers (see `initialize`)."""
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
    _share_embedder(transformer)
    return DiT().to_training_form(transformer)


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


def model_inputs(
    transformer: DiTTransformer2DModel, timesteps: torch.Tensor, labels: torch.Tensor, drop: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The timesteps and labels that the forward takes beside the latents, with the null class where labels are dropped.

    Args:
        timesteps: as stock schedulers count them, from 0 to 1000, shape (B,).
        labels: class labels, shape (B,).
        drop: whether each sample loses its label, boolean, shape (B,).
    """
    null_class = transformer.config.num_embeds_ada_norm
    return {"timestep": timesteps, "class_labels": torch.where(drop, null_class, labels)}


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


def has_learned_sigma(transformer: DiTTransformer2DModel) -> bool:
    """Whether the transformer as saved predicts a variance beside the noise, as DiT's do."""
    return transformer.config.out_channels == 2 * transformer.config.in_channels


@torch.no_grad()
def initialize_labels(transformer: DiTTransformer2DModel, num_classes: int, seed: int) -> None:
    """Initializes the rows of the label table for a new set of classes, N(0, 0.02) as at DiT's start; the null row stays.

    Raises:
        OptionError: the table has too few rows.
    """
    if num_classes > transformer.config.num_embeds_ada_norm:
        raise OptionError(
            f"the data set has {num_classes} classes, the pretrained transformer has rows for "
            f"{transformer.config.num_embeds_ada_norm}; train from scratch, or take fewer classes."
        )
    rows = torch.empty(num_classes, transformer.inner_dim)
    rows.normal_(std=0.02, generator=generator(seed, "labels"))
    for block in transformer.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table.weight
        table[:num_classes] = rows.to(table)


def _share_embedder(transformer: DiTTransformer2DModel) -> None:
    for block in transformer.transformer_blocks:
        block.norm1.emb = transformer.transformer_blocks[0].norm1.emb


def _has_equal_embedders(transformer: DiTTransformer2DModel) -> bool:
    """Whether the embedders of all blocks are equal to the bit, so that they can be shared."""
    if _shares_embedder(transformer):
        return True
    first, *others = (block.norm1.emb.state_dict() for block in transformer.transformer_blocks)
    return all(torch.equal(first[name], other[name]) for other in others for name in first)


def _shares_embedder(transformer: DiTTransformer2DModel) -> bool:
    return len({id(block.norm1.emb) for block in transformer.transformer_blocks}) == 1
