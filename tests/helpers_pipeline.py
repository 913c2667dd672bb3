"""Parts of a tiny class-conditional pipeline, and a transformer whose velocity is known exactly."""

from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel, DPMSolverMultistepScheduler
from torch import nn

from pipeline_vaerepa import VAEREPAPipeline

ID2LABEL = {0: "tench, Tinca tinca", 1: "goldfish", 2: "great white shark, white shark"}
NULL = 1000


def build_transformer(num_embeds=1000, out_channels=4):
    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    transformer = DiTTransformer2DModel(
        in_channels=4, out_channels=out_channels, num_embeds_ada_norm=num_embeds, **size
    )
    # in train mode every block would drop labels at random
    return transformer.eval()


def build_vae(**kwargs):
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, **blocks, **kwargs).eval()


def build_tiny_vae():
    torch.manual_seed(2)
    widths = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    return AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=0.5, **widths).eval()


def build_scheduler():
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)


def build_pipeline(transformer=None, vae=None, id2label=ID2LABEL, scheduler=None):
    pipe = VAEREPAPipeline(
        transformer=transformer or build_transformer(),
        vae=vae or build_vae(),
        scheduler=scheduler or build_scheduler(),
        id2label=id2label,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class GaussianField(nn.Module):
    """Exact v(x, t) when channel c of the data of class k is N(mean[c] + 3 k, spread[c]^2), each number for itself."""

    def __init__(self, spread, mean=1.0):
        super().__init__()
        self.spread, self.mean = (torch.tensor(value).view(-1, 1, 1) for value in (spread, mean))
        self.config = SimpleNamespace(in_channels=4, out_channels=4, sample_size=16, num_embeds_ada_norm=1000)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, hidden_states, timestep, class_labels):
        t = (timestep / 1000).view(-1, 1, 1, 1)
        mean = self.mean + 3 * class_labels.view(-1, 1, 1, 1)
        variance = ((1 - t) * self.spread) ** 2 + t**2
        # E[eps - z | x_t = x], by regression of the jointly normal eps - z on x_t
        slope = (t - (1 - t) * self.spread**2) / variance
        return SimpleNamespace(sample=-mean + slope * (hidden_states - (1 - t) * mean))
