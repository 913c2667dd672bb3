"""Makes configs/quickstart/text_encoders: two small untrained CLIP text encoders and tokenizers, as StableDiffusion3Pipeline has.

    python configs/quickstart/make_text_encoders.py

Frozen random weights are enough to tell ten captions apart; a real run takes those of a real pipeline.
"""

import json
import string
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

FOLDER = Path(__file__).with_name("text_encoders")
MAX_TOKENS = 32
WIDTHS = {"": 48, "_2": 80}


def make_tokenizer() -> CLIPTokenizer:
    """Letters as tokens: no word is unknown."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_TOKENS)


def make_encoder(width: int, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:  # at transformers' 0.02 all captions would look alike
            torch.nn.init.normal_(parameter)
    return encoder


def main() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    index: dict[str, object] = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.0"}
    for suffix, width in WIDTHS.items():
        tokenizer.save_pretrained(FOLDER / f"tokenizer{suffix}")
        make_encoder(width, tokenizer).save_pretrained(FOLDER / f"text_encoder{suffix}")
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
        index[f"text_encoder{suffix}"] = ["transformers", "CLIPTextModelWithProjection"]
    (FOLDER / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
