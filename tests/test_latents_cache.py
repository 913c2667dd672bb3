"""The latents cache: what trains is what it holds, also in the epoch that writes it; exact restarts; stale ones are refused."""

import io
import json
import os
import resource
import shutil
import signal

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Image, Value, load_dataset
from diffusers import AutoencoderKL

from benchmarks import data as data_benchmark
from tests.conftest import read_metrics
from tests.helpers_runs import EXACT, assert_same_end, rows_in
from vaerepa.data import Preprocessing, latents_cache
from vaerepa.data.batch import Samples
from vaerepa.data.latents_cache import CacheKey, LatentsCache
from vaerepa.data.opening import open_sources
from vaerepa.data.reading import join
from vaerepa.errors import OptionError
from vaerepa.files import digest_of_weights
from vaerepa.vae import agrees_in_bf16, encode_moments, load_vae, sample_latents

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
STEPS = 12  # of 8 images each: two epochs of 40 images and two steps


@pytest.fixture
def options(damaged, tmp_path):
    return {**EXACT, "dataset_name": damaged, "latents_cache": tmp_path / "cache", "max_bad_fraction": 1.0}


def precompute(train, folder, **options):
    train(**options, latents_cache=folder, precompute_latents_only=True, output_dir=folder.with_name("nothing"))
    assert not list(folder.with_name("nothing").glob("checkpoint-*"))
    return folder


@pytest.mark.parametrize("flips", [{}, {"random_flip": True}], ids=["plain", "flips"])
def test_what_trains_is_what_the_cache_holds(train, options, tmp_path, flips):
    """The run that writes the cache ends where one does that found it complete, to the last bit."""
    writing = train(**options | flips, max_train_steps=STEPS, output_dir=tmp_path / "writing")
    assert rows_in(tmp_path / "cache") == list(range(40))
    ahead = precompute(
        train, tmp_path / "ahead", **{k: v for k, v in (options | flips).items() if k != "latents_cache"}
    )
    assert rows_in(ahead) == list(range(40))
    reading = train(
        **options | flips | {"latents_cache": ahead}, max_train_steps=STEPS, output_dir=tmp_path / "reading"
    )
    assert_same_end(writing, reading, step=STEPS)
    counts = [
        [line["train/skipped_images"] for line in read_metrics(run, "train/skipped_images")]
        for run in (writing, reading)
    ]
    assert counts[0] == counts[1]
    assert counts[0][-1] >= 4  # two in each of two epochs


def test_a_cache_changes_no_more_than_a_rounding(train, options, tmp_path):
    """Same order, random numbers and replacements as without it; the moments are in half precision."""
    cached = train(**options | {"random_flip": True}, max_train_steps=STEPS, output_dir=tmp_path / "cached")
    plain = train(
        **options | {"random_flip": True, "latents_cache": None}, max_train_steps=STEPS, output_dir=tmp_path / "plain"
    )
    for one, other in zip(read_metrics(cached, "train/loss"), read_metrics(plain, "train/loss"), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=2e-3)
        assert one["train/loss"] != other["train/loss"]


def test_a_repeated_image_is_encoded_once(train, halves, tmp_path, monkeypatch):
    encode, alone = encode_moments, []

    def count(vae, pixels, *more):
        alone.append(len(pixels) == 1)  # as the cache encodes; latents are measured in batches
        return encode(vae, pixels, *more)

    monkeypatch.setattr("vaerepa.data.encoding.encode_moments", count)
    options = {"dataset_name": None, "train_data_dir": halves, "repeats": [3, 2], "latents_cache": tmp_path / "cache"}
    train(**EXACT, **options, max_train_steps=6)  # half an epoch
    assert sum(alone) == 40
    assert rows_in(tmp_path / "cache") == list(range(40))


def test_a_part_is_completed_and_a_damaged_shard_made_again(train, options, tmp_path, caplog):
    precompute(train, tmp_path / "cache", **{k: v for k, v in options.items() if k != "latents_cache"})
    (shard,) = (tmp_path / "cache").glob("*.arrow")
    whole = train(**options, max_train_steps=STEPS, output_dir=tmp_path / "whole")
    shard.write_bytes(shard.read_bytes()[:-20])
    again = train(**options, max_train_steps=STEPS, output_dir=tmp_path / "again")
    assert "is damaged, and its images are encoded again" in caplog.text
    assert_same_end(whole, again, step=STEPS)


def test_a_full_disk_costs_the_cache_and_not_the_run(train, options, tmp_path, monkeypatch, caplog):
    """The first shard cannot be written: its images are encoded again, and the run ends the same."""
    whole = train(**options, max_train_steps=STEPS, output_dir=tmp_path / "whole")
    options["latents_cache"] = tmp_path / "other"
    write, limits = latents_cache._write_shard, []
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_onto_a_full_disk(*arguments):
        limits.append(hard if limits else 6_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[-1], hard))
        try:
            return write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    monkeypatch.setattr(latents_cache, "_write_shard", write_onto_a_full_disk)
    again = train(**options, max_train_steps=STEPS, output_dir=tmp_path / "again")
    assert "40 rows could not be written" in caplog.text
    assert_same_end(whole, again, step=STEPS)
    assert not list((tmp_path / "other").glob("*.unfinished"))
    assert rows_in(tmp_path / "other") == list(range(40))  # of the second epoch


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolution": 32}, ["--resolution 16", "another shape"]),
        ({"random_flip": True}, ["--no_random_flip"]),
        ({"masked_loss": True}, ["no --masked_loss"]),
        ({"dataset_name": "other data"}, ["other images"]),
        ({"pretrained_vae_model_name_or_path": "other VAE"}, ["another VAE"]),
    ],
)
def test_a_stale_cache_is_refused_with_the_reason(train, refused, options, damaged, vae, tmp_path, change, words):
    precompute(train, tmp_path / "cache", **{k: v for k, v in options.items() if k != "latents_cache"})
    if "dataset_name" in change:
        change = {"dataset_name": tmp_path / "other"}
        shutil.copytree(damaged, tmp_path / "other")
        file = tmp_path / "other/data/train-00000-of-00003.parquet"
        Dataset.from_parquet(str(file)).select(range(17)).to_parquet(file)
    if "pretrained_vae_model_name_or_path" in change:
        model = AutoencoderKL.from_pretrained(vae)
        with torch.no_grad():
            model.quant_conv.bias[0] += 1e-3
        model.save_pretrained(tmp_path / "vae")
        change = {"pretrained_vae_model_name_or_path": tmp_path / "vae"}
    before = sorted(path.name for path in (tmp_path / "cache").iterdir())
    refused("--latents_cache", *words, **options | change)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == before


def test_it_does_not_matter_where_data_and_cache_lie(train, options, damaged, tmp_path):
    precompute(train, tmp_path / "cache", **{k: v for k, v in options.items() if k != "latents_cache"})
    shutil.copytree(damaged, tmp_path / "moved_data")
    shutil.move(tmp_path / "cache", tmp_path / "moved_cache")
    moved = {"dataset_name": tmp_path / "moved_data", "latents_cache": tmp_path / "moved_cache"}
    train(**options | moved, max_train_steps=2)
    assert rows_in(tmp_path / "moved_cache") == list(range(40))


def test_a_stopped_precomputation_goes_on(train, options, tmp_path, monkeypatch, caplog):
    encode, calls = encode_moments, []

    def encode_until_asked_to_stop(*arguments):
        calls.append(0)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*arguments)

    monkeypatch.setattr("vaerepa.data.encoding.encode_moments", encode_until_asked_to_stop)
    options = options | {"precompute_latents_only": True}
    train(**options)
    assert "stopped by SIGTERM. Go on with" in caplog.text
    assert 0 < len(rows_in(tmp_path / "cache")) < 40
    train(**options)
    assert rows_in(tmp_path / "cache") == list(range(40))
    assert 38 <= len(calls) <= 40  # each image once, the two damaged ones never, and early those that replace them
    assert not (tmp_path / "run").exists()


def test_too_many_bad_images_end_the_precomputation(train, options, tmp_path, capfd):
    bad = io.BytesIO()
    PIL.Image.new("RGB", (16, 16)).save(bad, "PNG")
    (tmp_path / "bad/data").mkdir(parents=True)
    contents = [bad.getvalue() if index % 2 else b"no image" for index in range(64)]
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [0, 1] * 32}
    features = Features({"image": Image(), "label": ClassLabel(num_classes=2)})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "bad/data/train-00000-of-00001.parquet")
    options = options | {"dataset_name": tmp_path / "bad", "max_bad_fraction": 0.05}
    train(code=1, precompute_latents_only=True, **options)
    assert "32 of 64 images could not be read" in capfd.readouterr().err
    assert rows_in(tmp_path / "cache") == list(range(64))


# ---- data sets of latents


@torch.no_grad()
def write_moments(data, vae, path) -> None:
    """The training images' moments as a data set of its own, in the shards of the images."""
    model, source = load_vae(str(vae)), open_sources(str(data)).train
    features = Features({"moments": Array3D((8, 8, 8), "float16"), "label": Value("int64")})
    for block in range(3):
        rows = list(source.read_block(block))
        pixels = [Preprocessing(16)(row, 0)[None] for row in rows]
        moments = [encode_moments(model, p)[0].half().numpy() for p in pixels]
        columns = {"moments": moments, "label": [row.label for row in rows]}
        (path / "data").mkdir(parents=True, exist_ok=True)
        file = path / f"data/train-{block:05d}-of-00003.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(file)


def test_a_data_set_of_moments_trains_like_the_cache(train, request, vae, tmp_path):
    pictures = request.getfixturevalue("pictures")
    write_moments(pictures, vae, tmp_path / "moments")
    cached = train(**EXACT, dataset_name=pictures, max_train_steps=STEPS, latents_cache=tmp_path / "cache")
    direct = train(
        **EXACT,
        dataset_name=None,
        train_data_dir=tmp_path / "moments",
        max_train_steps=STEPS,
        output_dir=tmp_path / "direct",
    )
    assert_same_end(cached, direct, step=STEPS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty-one whole pictures in three shards of one row group."""
    folder, random = tmp_path_factory.mktemp("whole"), np.random.default_rng(3)
    (folder / "data").mkdir()
    features = Features({"image": Image(), "label": Value("int64")})
    for shard, count in enumerate((9, 4, 8)):
        pixels = list(random.integers(0, 256, (count, 20, 24, 3), dtype=np.uint8))
        rows = {"image": pixels, "label": [int(i) for i in random.integers(0, 3, count - 1)] + [2]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"data/train-{shard:05d}-of-00003.parquet")
    return folder


def test_latents_in_a_data_set_cannot_be_flipped_or_cached_again_or_seen(refused, pictures, vae, tmp_path):
    write_moments(pictures, vae, tmp_path / "moments")
    needs_images = ({"alignment": "repa"}, {"alignment_target": "vae_mid_block"})
    masks = {"masked_loss": True}
    for option in ({"random_flip": True}, {"latents_cache": tmp_path / "cache"}, masks, *needs_images):
        refused("holds latents", dataset_name=None, train_data_dir=tmp_path / "moments", **option)


def test_latents_of_a_vae_that_normalises_are_refused(refused, pictures, vae, tmp_path):
    write_moments(pictures, vae, tmp_path / "moments")
    shutil.copytree(vae, tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"shift_factor": 0.1}))
    options = {"dataset_name": None, "pretrained_vae_model_name_or_path": tmp_path / "vae"}
    refused("VAE shifts", train_data_dir=tmp_path / "moments", **options)


# ---- the files


def pair(moments: np.ndarray) -> dict[str, np.ndarray]:
    features = moments[:, :1] + 1
    arrays = {"moments": moments, "vision_features": features}
    return arrays | {"moments_flipped": -moments, "vision_features_flipped": -features}


def test_rows_of_several_writers_and_errors(tmp_path):
    key = CacheKey("v", "d", 16, "centre", True, (2, 2, 2), encoder="e", features_shape=(2, 1, 2))
    one, other = (LatentsCache(tmp_path / "cache", key, 10) for _ in range(2))
    arrays = [np.random.default_rng(i).standard_normal((2, 2, 2)).astype(np.float16) for i in range(10)]
    for i in range(4):
        one.add(i, pair(arrays[i]), label=i, caption=f"number {i}")
    other.add(6, pair(arrays[6]), label=6, caption=["six", "half a dozen"])
    other.add_unreadable(7, "no image")
    assert 6 not in other  # what is pending is not there yet
    one.flush()
    other.flush()
    one.reload()
    members = np.isin(np.arange(10), [0, 1, 2, 3, 6, 7])
    assert one.holds(members)
    assert not one.holds(np.ones(10, bool))
    assert (one.count(np.ones(10, bool)), one.count_unreadable(members)) == (6, 1)
    for i in (0, 1, 2, 3, 6):
        assert np.array_equal(one.read(i).moments, arrays[i])
        assert np.array_equal(one.read(i, flipped=True).moments, -arrays[i])
        assert np.array_equal(one.read(i).features, arrays[i][:, :1] + 1)
        assert np.array_equal(one.read(i, flipped=True).features, -arrays[i][:, :1] - 1)
    assert (one.read(7).moments, one.read(7).error) == (None, "no image")


def test_many_shards_keep_no_file_open(tmp_path):
    cache = LatentsCache(tmp_path, CacheKey("v", "d", 16, "centre", False, (2, 2, 2)), 50)
    moments = np.ones((2, 2, 2), np.float16)
    for i in range(50):
        cache.add(i, {"moments": i * moments}, 0, None)
        cache.flush()
    before = len(os.listdir("/dev/fd"))
    cache.reload()
    assert all(np.array_equal(cache.read(i).moments, i * moments) for i in range(50))
    assert len(os.listdir("/dev/fd")) == before


def test_its_shards_are_a_data_set_by_themselves(train, pictures, tmp_path):
    precompute(train, tmp_path / "cache", dataset_name=pictures)
    rows = load_dataset("arrow", data_files=str(tmp_path / "cache/*.arrow"), split="train", cache_dir=tmp_path / "hf")
    assert sorted(rows["index"]) == list(range(21))
    assert len(rows[0]["moments"]) == 8 * 8 * 8
    (tmp_path / "moments/data").mkdir(parents=True)
    shutil.copyfile(next((tmp_path / "cache").glob("*.arrow")), tmp_path / "moments/data/train-00000-of-00001.arrow")
    run = train(dataset_name=tmp_path / "moments", max_train_steps=2)
    assert (run / "model_index.json").exists()
    assert json.loads((tmp_path / "cache/key.json").read_text())["resolution"] == 16


def test_the_checksum_sees_every_weight(vae):
    model = AutoencoderKL.from_pretrained(vae)
    before = digest_of_weights(model)
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-4
    assert digest_of_weights(model) != before


def test_a_folder_with_another_key_is_refused(tmp_path):
    key = CacheKey("v", "d", 16, "centre", True, (2, 2, 2))
    LatentsCache(tmp_path, key, 10)
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(OptionError, match="cannot be used"):
        LatentsCache(tmp_path, key, 10)


@torch.no_grad()
def test_moments_and_samples_are_those_of_the_posterior(vae):
    model = load_vae(str(vae))
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    posterior = model.encode(pixels / 127.5 - 1).latent_dist
    sampled = sample_latents(model, encode_moments(model, pixels), noise)
    torch.testing.assert_close(sampled, (posterior.mean + posterior.std * noise) * model.config.scaling_factor)
    assert agrees_in_bf16(model, pixels, tolerance=0.05)
    assert not agrees_in_bf16(model, pixels, tolerance=1e-6)


def test_the_benchmark_of_the_data_reads_all_of_them(vae, capsys):
    sizes = {"num_images": 96, "num_encoded": 16, "num_cached": 768, "resolution": 16, "num_workers": 1, "rounds": 1}
    line = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    data_benchmark.main([*line, "--pretrained_vae_model_name_or_path", str(vae)])
    rows = capsys.readouterr().out.strip().splitlines()[2:]
    assert len(rows) == 9
    assert all(float(row.split("|")[2]) > 0 for row in rows)


def test_parts_with_and_without_vision_features_join_to_a_batch_without():
    """As they are read while REPA ends."""

    def part(index: int, vision_features: torch.Tensor | None) -> Samples:
        moments = torch.full((1, 8, 2, 2), float(index))
        label = torch.tensor([index])
        arrays = {"moments": moments, "vision_features": vision_features, "pixel_values": None}
        return Samples((4, 2, 2), [index], [index], [0], label, [None], [False], {}, [True], [], **arrays)

    features = torch.ones(1, 3, 2, 2)
    (whole,) = join([[part(1, features)], [part(0, features)]], False)
    assert whole.moments[:, 0, 0, 0].tolist() == [0, 1]
    assert len(whole.vision_features) == 2
    (mixed,) = join([[part(1, None)], [part(0, features)]], False)
    assert mixed.vision_features is None
    assert torch.equal(mixed.moments, whole.moments)
