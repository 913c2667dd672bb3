"""Options of the model: which transformer, from where, and whether it is conditioned on labels or captions."""

from dataclasses import dataclass

from vaerepa.cli import option
from vaerepa.families import custom_models, pipelines_of, presets_of


@dataclass
class ModelOptions:
    """The transformer and its frozen VAE."""

    model: str = option(
        "SiT-B/2",
        f"Transformer to train: {presets_of('labels')}, or `custom` with the four options below; with "
        f"--text_conditioning {presets_of('captions')}, {custom_models()}.",
        resume="fixed",
        group="Model",
    )
    num_layers: int | None = option(None, "Number of transformer blocks of a `custom` model.", resume="fixed", above=0)
    hidden_size: int | None = option(None, "Width of a `custom` model.", resume="fixed", above=0)
    num_attention_heads: int | None = option(
        None, "Number of attention heads of a `custom` model.", resume="fixed", above=0
    )
    patch_size: int | None = option(None, "Patch size, in latent pixels, of a `custom` model.", resume="fixed", above=0)
    pretrained_model_name_or_path: str | None = option(
        None,
        "Hub id or folder of a DiTPipeline to fine-tune, instead of training --model from scratch; with --text_conditioning of "
        f"a {pipelines_of('captions')}.",
        resume="content",
        path="hub",
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None,
        "Hub id or folder of the frozen VAE (AutoencoderKL or AutoencoderTiny; AutoencoderKLFlux2 for FLUX.2); a pipeline's "
        "`vae` subfolder is found. Default: the fine-tuned pipeline's own, or stabilityai/sd-vae-ft-mse.",
        resume="content",
        path="hub",
    )
    revision: str | None = option(
        None, "Revision on the Hub of the pipeline to fine-tune, or else of the VAE.", resume="content"
    )
    variant: str | None = option(
        None,
        "Variant of the files of the pipeline to fine-tune, or else of the VAE, for example fp16.",
        resume="content",
    )


@dataclass
class TextOptions:
    """Captions in place of labels, and what encodes them."""

    text_conditioning: bool = option(
        False, "Train a text-to-image transformer on captions, not on classes.", resume="fixed", group="Text"
    )
    pretrained_text_encoder_model_name_or_path: str | None = option(
        None,
        "Hub id or folder of the pipeline whose tokenizers and text encoders a --model from scratch is given; for PixArt "
        "also of a text encoder of transformers.",
        resume="content",
        path="hub",
        goes_with="text_conditioning",
    )
    guidance_scale: float | None = option(
        None,
        "Guidance scale that FLUX.1-dev, which embeds one, is conditioned on in training. Default: 3.5, as in diffusers' script.",
        resume="fixed",
        at_least=0,
        goes_with="text_conditioning",
    )
