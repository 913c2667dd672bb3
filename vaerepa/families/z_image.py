"""Z-Image: ZImageTransformer2DModel (arXiv 2511.22699), a flow that counts time from noise to data and predicts z - eps.

Its VAE is a plain AutoencoderKL, and in its joint sequence the image's tokens come first, in the order of the patches.
"""

from typing import Any

import torch
from torch import nn

from vaerepa.families.text_family import Condition, TextFamily


class ZImage(TextFamily):
    name = "Z-Image"
    tags = ("z-image", "z-image-diffusers")
    pipelines = ("ZImagePipeline",)
    text_components = ("tokenizer", "text_encoder")
    knows_shift = True
    generates_by_flow_only = True
    varies_in_length = True
    max_sequence_length = 512
    lora_layers = ("to_k", "to_q", "to_v", "to_out.0")

    def predict(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        frames = list(noisy.unsqueeze(2).unbind(0))
        predictions = transformer(frames, 1.0 - timesteps / 1000.0, condition["cap_feats"], return_dict=False)[0]
        return self.prediction_of(predictions, noisy)

    def conditioning_embedding(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Embedding of t; captions enter by attention only."""
        return transformer.t_embedder((1.0 - timesteps / 1000.0) * transformer.t_scale).type_as(noisy)

    def read_call(
        self, x: list[torch.Tensor], t: torch.Tensor, cap_feats: list[torch.Tensor], **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        timesteps = 1000.0 * (1.0 - t)
        return torch.stack(x).squeeze(2), timesteps, {"timesteps": timesteps, "condition": {"cap_feats": cap_feats}}

    def prediction_of(self, sample: list[torch.Tensor], noisy: torch.Tensor) -> torch.Tensor:
        return -torch.stack(sample).squeeze(2)

    def with_prediction(self, sample: list[torch.Tensor], prediction: torch.Tensor) -> list[torch.Tensor]:
        return list(-prediction.unsqueeze(2))

    def conditioning_width(self, transformer: nn.Module) -> int:
        return transformer.t_embedder.mlp[-1].out_features

    def inner_width(self, transformer: nn.Module) -> int:
        return transformer.dim

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        return transformer.layers

    def patch_size(self, transformer: nn.Module) -> int:
        return transformer.config.all_patch_size[0]

    def max_patches(self, transformer: nn.Module) -> int:
        return min(transformer.config.axes_lens[1:])

    def image_token_slice(self, transformer: nn.Module, noisy: torch.Tensor, hidden_states: torch.Tensor) -> slice:
        height, width = noisy.shape[-2:]
        return slice(0, height * width // self.patch_size(transformer) ** 2)  # padding and text follow

    def encode_prompts(self, pipeline, prompts: list[str], max_sequence_length: int) -> list[dict[str, torch.Tensor]]:
        embeds, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return [{"cap_feats": one} for one in embeds]

    def collate(self, embeddings: list[dict[str, torch.Tensor]]) -> Condition:
        return {"cap_feats": [one["cap_feats"] for one in embeddings]}

    def prompt_inputs(self, condition: Condition) -> dict[str, Any]:
        return {"prompt_embeds": condition["cap_feats"]}

    def example_condition(self, transformer: nn.Module, length: int, device: torch.device) -> Condition:
        return {"cap_feats": [torch.zeros(length, transformer.config.cap_feat_dim, device=device)]}
