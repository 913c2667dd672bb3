"""Tiny untrained text-to-image pipelines of each family, with tokenizers and text encoders made in memory."""

import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = string.ascii_lowercase + string.digits + " "
FAMILIES = ("pixart_alpha", "pixart_sigma", "sd3", "sd3_5", "z_image", "flux2", "flux", "chroma")


def t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS[:-1])]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=24)
    config = T5Config(vocab_size=len(vocab), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    return tokenizer, T5EncoderModel(config)


def clip(
    width: int, kind: type[CLIPTextModel | CLIPTextModelWithProjection] = CLIPTextModelWithProjection
) -> tuple[CLIPTokenizer, torch.nn.Module]:
    letters = [letter for letter in LETTERS if letter != " "]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=24,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    return tokenizer, kind(config)


def qwen(kind: type[Qwen3Model | Qwen3ForCausalLM] = Qwen3Model, **config) -> tuple[Qwen2Tokenizer, torch.nn.Module]:
    letters = [*(letter.replace(" ", "Ġ") for letter in LETTERS), "Ċ"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*letters, *special])},
        merges=[],
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    config = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 12} | config
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return tokenizer, kind(Qwen3Config(vocab_size=len(letters) + len(special), **heads, **config))


def vae(channels: int, **config) -> AutoencoderKL:
    """16 pixels to 8 latents."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        mid_block_add_attention=False,
        **config,
    )


def pixart(pipeline_class: type[DiffusionPipeline], sample_size: int = 8) -> DiffusionPipeline:
    tokenizer, text_encoder = t5()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,  # the noise, then what a learned sigma needs
        num_layers=4,
        cross_attention_dim=24,
        sample_size=sample_size,
        patch_size=2,
        caption_channels=24,
        use_additional_conditions=sample_size == 128,
    )
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return pipeline_class(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae(4, scaling_factor=1.0),
        scheduler=scheduler,
    )


def sd3(is_3_5: bool) -> StableDiffusion3Pipeline:
    parts = {}
    for suffix, width in (("", 8), ("_2", 12)):
        parts[f"tokenizer{suffix}"], parts[f"text_encoder{suffix}"] = clip(width)
    parts["tokenizer_3"], parts["text_encoder_3"] = t5()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=24,
        caption_projection_dim=24,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
        qk_norm="rms_norm" if is_3_5 else None,
        dual_attention_layers=(0, 1) if is_3_5 else (),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        **parts,
    )


def z_image() -> ZImagePipeline:
    tokenizer, text_encoder = qwen()
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=24,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 4, 4],
        axes_lens=[128, 32, 32],
    )
    torch.nn.init.normal_(transformer.x_pad_token, std=0.02)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(16, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def flux2() -> Flux2KleinPipeline:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 28, "head_dim": 4}  # it reads layer 27
    tokenizer, text_encoder = qwen(Qwen3ForCausalLM, **sizes)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    autoencoder.bn.running_mean.normal_(std=0.2)
    autoencoder.bn.running_var.uniform_(0.5, 1.5)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, autoencoder, text_encoder, tokenizer, transformer)


# FLUX.1's and Chroma's
BLOCKS = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def flux() -> FluxPipeline:
    parts = dict(zip(("tokenizer", "text_encoder"), clip(8, CLIPTextModel), strict=True))
    parts |= dict(zip(("tokenizer_2", "text_encoder_2"), t5(), strict=True))
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**BLOCKS, pooled_projection_dim=8, guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(4, scaling_factor=0.4, shift_factor=0.1),
        **parts,
    )


def chroma() -> ChromaPipeline:
    tokenizer, text_encoder = t5()
    approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 24, "approximator_layers": 2}
    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(**BLOCKS, **approximator),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def build(family: str) -> DiffusionPipeline:
    """The tiny pipeline of a family."""
    torch.manual_seed(0)
    builders = {
        "pixart_alpha": lambda: pixart(PixArtAlphaPipeline),
        "pixart_sigma": lambda: pixart(PixArtSigmaPipeline),
        "sd3": lambda: sd3(is_3_5=False),
        "sd3_5": lambda: sd3(is_3_5=True),
        "z_image": z_image,
        "flux2": flux2,
        "flux": flux,
        "chroma": chroma,
    }
    return builders[family]()


def save_bert(folder: Path) -> Path:
    """Saves a tiny BertModel with its tokenizer, and returns their folder."""
    torch.manual_seed(0)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "another", "red", "cat", "tree", "house", "blue"]
    BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


def save(family: str, folder: Path) -> Path:
    """Saves the tiny pipeline of a family, and returns its folder."""
    build(family).save_pretrained(folder)
    return folder
