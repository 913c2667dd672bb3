"""Makes configs/quickstart/text_encoders: small untrained text encoders and tokenizers, as StableDiffusion3Pipeline has.

    python configs/quickstart/make_text_encoders.py

Frozen random weights are enough to distinguish ten captions; a real run takes those of a real pipeline.
"""

import json
import shutil
import string
from pathlib import Path

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

FOLDER = Path(__file__).with_name("text_encoders")
CLIP_WIDTHS = {"": 48, "_2": 80}
CLIP_TOKENS = 24  # of a prompt
T5_WIDTH = sum(CLIP_WIDTHS.values())  # the pipeline joins the CLIPs' and lays T5's behind them
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
WORDS = "a handwritten zero one two three four five six seven eight nine"


def make_clip(width: int) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection]:
    """Tokenizer whose tokens are letters: no word is unknown."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_TOKENS)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:  # at transformers' 0.02 all captions would look alike
            torch.nn.init.normal_(parameter)
    return tokenizer, encoder


def make_t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """Tokenizer whose tokens are the captions' words, and letters for all other words."""
    pieces = [("▁", -6.0), *((letter, -6.0) for letter in LETTERS), *((f"▁{word}", -3.0) for word in WORDS.split())]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *pieces]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=64)
    config = T5Config(vocab_size=len(vocab), d_model=T5_WIDTH, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def main() -> None:
    torch.manual_seed(0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    pairs = {suffix: make_clip(width) for suffix, width in CLIP_WIDTHS.items()} | {"_3": make_t5()}
    index: dict[str, object] = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.0"}
    for suffix, pair in pairs.items():
        for name, part in zip(("tokenizer", "text_encoder"), pair, strict=True):
            part.save_pretrained(FOLDER / f"{name}{suffix}")
            index[f"{name}{suffix}"] = ["transformers", type(part).__name__]
    (FOLDER / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
