"""Tiny untrained class-conditional transformers, as stock diffusers leaves them."""

import torch
from diffusers import DiTTransformer2DModel


def build(learned_sigma: bool = True, equal_embedders: bool = False) -> DiTTransformer2DModel:
    """A stock model whose blocks have different embedders, as one that was trained with stock diffusers has."""
    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        2, 16, in_channels=4, out_channels=8 if learned_sigma else 4, num_layers=3, sample_size=8, patch_size=2
    )
    if equal_embedders:
        for block in transformer.transformer_blocks:
            block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    return transformer.eval()
