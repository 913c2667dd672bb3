"""Prompts: captions chosen and dropped, embeddings cached in the text encoders' place, negative prompts."""

import gc
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPTextModelWithProjection, Qwen3Model, T5EncoderModel

import train_vaerepa
from tests.conftest import CAPTIONS
from tests.helpers_runs import PROMPTS, assert_same_end
from vaerepa.data import Prompts


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The prompts of every batch that a run asks for."""
    prompts, condition = [], Prompts.condition

    def record(self, texts):
        prompts.append(list(texts))
        return condition(self, texts)

    monkeypatch.setattr(Prompts, "condition", record)
    return prompts


def test_another_caption_of_an_image_is_taken_in_each_epoch(finetune, asked):
    finetune("pixart_alpha", max_train_steps=40, proportion_empty_prompts=0.25, alignment="none")
    training = asked
    counts = Counter(text for batch in training for text in batch)
    assert sum(counts.values()) == 8 * 40
    assert 0.15 < counts.pop("") / 320 < 0.35
    assert counts.keys() == {*CAPTIONS, *(f"another {caption}" for caption in CAPTIONS)}
    assert 0.4 < sum(counts[caption] for caption in CAPTIONS) / counts.total() < 0.6


@pytest.mark.parametrize("caches", [True, None])
@pytest.mark.parametrize("captions", [{}, {"0": "a red cat"}])
def test_images_without_a_caption_have_the_instance_prompt(captions, caches, finetune, asked, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "0123":
        Image.new("RGB", (16, 16), (60 * int(name), 0, 0)).save(folder / f"{name}.png")
    for name, caption in captions.items():
        (folder / f"{name}.txt").write_text(caption)
    data = {"dataset_name": None, "train_data_dir": folder, "instance_prompt": "a photo of sks dog"}
    finetune("pixart_alpha", **data, max_train_steps=1, proportion_empty_prompts=0.0, cache_text_embeddings=caches)
    assert Counter(asked[0]) == {"a photo of sks dog": 8 - 2 * len(captions)} | dict.fromkeys(captions.values(), 2)


def test_validation_images_have_their_first_caption(finetune, asked):
    finetune("pixart_alpha", max_train_steps=1, num_validation_samples=10)
    validation = [text for batch in asked[-2:] for text in batch]
    assert Counter(validation) == {caption: 3 - (i > 1) for i, caption in enumerate(CAPTIONS)}


@pytest.mark.parametrize("family", ["pixart_alpha", "sd3", "z_image"])
def test_cached_embeddings_change_no_bit_and_leave_no_text_encoder(family, finetune, tmp_path, monkeypatch):
    plain = finetune(family, output_dir=tmp_path / "plain", max_train_steps=2, **PROMPTS)
    loop, encoders = train_vaerepa.loop, []

    def look(setup, *others):
        gc.collect()
        encoders.extend(
            o for o in gc.get_objects() if isinstance(o, T5EncoderModel | CLIPTextModelWithProjection | Qwen3Model)
        )
        assert not setup.conditioning.prompts.encoders
        return loop(setup, *others)

    monkeypatch.setattr(train_vaerepa, "loop", look)
    cached = finetune(family, output_dir=tmp_path / "cached", max_train_steps=2, cache_text_embeddings=True, **PROMPTS)
    assert not encoders
    assert_same_end(plain, cached, 2)
    grids = [np.asarray(Image.open(run / "samples/step-0000002.png")) for run in (plain, cached)]
    assert (grids[0] == grids[1]).all()
    assert (cached / "text_encoder").is_dir()  # the pipeline is whole all the same


def test_a_damaged_cache_of_embeddings_is_made_again(finetune, tmp_path):
    options = {"cache_text_embeddings": True, "latents_cache": tmp_path / "cache"}
    whole = finetune("sd3", **options, output_dir=tmp_path / "whole")
    (file,) = (tmp_path / "cache").glob("text-*/*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    again = finetune("sd3", **options, output_dir=tmp_path / "again")  # from latents and captions that are cached now
    assert_same_end(whole, again, 4)


def test_more_tokens_of_a_prompt_change_the_images(finetune, tmp_path):
    runs = [finetune("sd3", max_sequence_length=n, output_dir=tmp_path / str(n), **PROMPTS) for n in (4, 24)]
    grids = [np.asarray(Image.open(run / "samples/step-0000004.png")) for run in runs]
    assert (grids[0] != grids[1]).any()


def test_a_negative_prompt_changes_the_images(finetune, tmp_path):
    grids = []
    for negative in ("", "tree"):
        run = finetune("sd3", negative_prompt=negative, output_dir=tmp_path / f"run{negative}", **PROMPTS)
        grids.append(np.asarray(Image.open(run / "samples/step-0000004.png")))
    assert (grids[0] != grids[1]).any()
