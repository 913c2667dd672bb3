"""The feed: micro-batches with clean latents on the device, from images, from the cache, or from a data set of latents."""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.operations import recursively_apply
from torch import nn

from vaerepa.alignment.vision_encoder import VisionEncoder
from vaerepa.data.buckets import parse_buckets
from vaerepa.data.latents_cache import FEATURES, FLIPPED, MOMENTS, CacheKey, LatentsCache, checksum, rounded
from vaerepa.data.loader import Batches, Draws, Preprocessing, ValidationDraws, read_batches
from vaerepa.data.order import stream_sizes
from vaerepa.data.prompts import Prompts, choose_caption
from vaerepa.data.source import Source, all_captions
from vaerepa.logs import get_logger
from vaerepa.options import Options
from vaerepa.randomness import draw_uniform
from vaerepa.vae import agrees_in_bf16, downsampling_factor, encode_moments, has_posterior, sample_latents

logger = get_logger(__name__)

MAX_NAMED_IMAGES = 5
NUM_COMPARED_IMAGES = 16


class Feed:
    """Reads, encodes and keeps.

    Args:
        vae: on the device.
        source: what is trained on.
        latent_shape: (C, h, w) of a square image.
        prompts: encodes captions, where the transformer is told captions and not labels.
        encoder: makes features of training images, where they are aligned to; in half precision on a GPU.

    Raises:
        OptionError: --latents_cache cannot be used.
    """

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator,
        vae: nn.Module,
        source: Source,
        latent_shape: tuple[int, int, int],
        prompts: Prompts | None = None,
        encoder: VisionEncoder | None = None,
    ):
        self.prompts = prompts
        self.encoder = encoder
        self.options = options
        self.accelerator = accelerator
        self.vae = vae
        self.source = source
        self.latent_shape = latent_shape
        self.buckets = parse_buckets(options, downsampling_factor(vae))
        self.num_skipped = 0  # images that this process could not read
        self.first_skipped: str | None = None  # which, and why
        self.cache = self._open_cache() if options.latents_cache else None
        if encoder is not None:
            half = torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16
            encoder.to(accelerator.device, half if accelerator.device.type == "cuda" else None)
        self.encode_in_bf16 = False
        readers = accelerator.num_processes * max(1, options.dataloader_num_workers)
        if not source.storage.random_access:
            num_streams, _ = stream_sizes(source, options.num_streams, options.shuffle_buffer_size)
            if num_streams % readers:
                logger.warning(
                    f"--num_streams {num_streams} is no multiple of {accelerator.num_processes} processes x "
                    f"{options.dataloader_num_workers} data workers: several read the same rows, to use each once"
                )

    def choose_precision(self, draws: Draws) -> None:
        """Encodes in bfloat16 where the run does and it moves the latents little; every process must call it."""
        if self.accelerator.device.type != "cuda" or self.accelerator.mixed_precision != "bf16":
            return
        count = min(NUM_COMPARED_IMAGES, len(self.source))
        batch = next(self.read(self.source, draws, count, 0, count, share=False))
        if "pixel_values" in batch:
            agrees = agrees_in_bf16(self.vae, batch["pixel_values"])
            self.encode_in_bf16 = broadcast_object_list([agrees])[0]
            logger.info(f"the VAE encodes in {'bfloat16' if self.encode_in_bf16 else 'float32'}")

    def end_features(self) -> None:
        """Reads no features from now on, and makes none as soon as no cache waits for them; every process must call it."""
        if self.encoder is None:
            return
        if self.cache is not None:
            self.cache.reads_features = False
        if self.cache is None or self._all_hold_all():
            self.encoder = None

    def training_batches(self, draws: Draws, first: int, last: int) -> Iterator[dict]:
        """This process's share of the samples `first` to `last`, with `latents` (B, C, h, w) as drawn from the posterior.

        And with `vision_features` (B, z, h', w') of the same images, where there is an encoder.
        Until the cache holds every image it is written along the way, and taken up at the end of each epoch.
        """
        epoch, batch = len(self.source), self.options.global_batch_size
        while first < last:
            writes = self.cache is not None and not self._all_hold_all()
            end_of_epoch = -(-(first // epoch + 1) * epoch // batch) * batch
            end = min(last, end_of_epoch) if writes else last
            yield from self._ahead(self.read(self.source, draws, self.options.train_batch_size, first, end, self.cache))
            if writes:
                self.take_up_cache()
            first = end

    def missing_batches(self, draws: Draws) -> Iterator[dict]:
        """This process's share of one epoch, for the sake of what the cache is given by it."""
        batch_size = self.options.train_batch_size
        return self._ahead(self.read(self.source, draws, batch_size, 0, len(self.source), self.cache))

    def flush(self) -> None:
        """Writes what the cache is still to hold of the images encoded so far."""
        if self.cache is not None:
            self.cache.flush()

    def take_up_cache(self) -> None:
        """Writes what is pending, and reads what all processes wrote; every process must call it."""
        self.flush()
        self.accelerator.wait_for_everyone()
        self.cache.reload()
        if not self.cache.reads_features:
            self.end_features()
        logger.info(f"the latents cache holds {self.cache.count(self.source.members)} of {len(self.source)} images")

    def _all_hold_all(self) -> bool:
        """Whether the cache is complete in the eyes of all processes; another run may be writing into it."""
        complete = torch.tensor([self.cache.holds(self.source.members)], device=self.accelerator.device)
        return bool(self.accelerator.gather(complete).all())

    def read(
        self,
        source: Source,
        draws: Draws,
        batch_size: int,
        first: int,
        last: int,
        cache: LatentsCache | None = None,
        share: bool = True,
    ) -> Iterator[dict]:
        """Batches of the samples `first` to `last` of any source; with `share` this process's part of them.

        Each is one group of samples or, where their shapes differ, several after each other (see `read_batches`).
        """
        options, held_out = self.options, isinstance(draws, ValidationDraws)
        preprocessing = Preprocessing(
            options.resolution,
            options.center_crop or held_out,
            options.random_flip and not held_out,
            options.seed,
            self.buckets,
        )
        batches = Batches(
            source,
            preprocessing,
            draws,
            batch_size,
            first,
            last,
            options.num_streams,
            options.shuffle_buffer_size,
            seed=0 if held_out else options.seed,
            process=self.accelerator.process_index if share else 0,
            num_processes=self.accelerator.num_processes if share else 1,
            cache=cache,
        )
        for batch in read_batches(batches, options.dataloader_num_workers, self.accelerator.device):
            trains = share and not held_out  # what is only measured is read again
            if trains:
                self._count_skipped(batch, cache)
            batch |= self._encodings(batch, cache, with_features=trains)
            batch["latents"] = sample_latents(self.vae, batch["moments"], batch["draws"]["posterior"])
            if self.prompts is not None:
                batch["text"] = self.prompts.condition(self._choose_captions(batch, held_out))
            yield batch

    def _choose_captions(self, batch: dict, held_out: bool) -> list[str]:
        """A caption of each sample, the empty prompt where it is dropped; of held-out samples the first."""
        chosen = []
        for ordinal, caption in zip(batch["ordinal"], batch["caption"], strict=True):
            captions, seed = all_captions(caption), self.options.seed
            drops = draw_uniform(seed, "drop", ordinal) < self.options.proportion_empty_prompts
            chosen.append(captions[0] if held_out else "" if drops else choose_caption(captions, seed, ordinal))
        return chosen

    def _encodings(self, batch: dict, cache: LatentsCache | None, with_features: bool) -> dict[str, torch.Tensor]:
        """Moments and features of each sample, those at hand or encoded now; as the cache holds them, or will."""
        if "pixel_values" not in batch:
            return {}
        pixels = batch["pixel_values"]
        encoded = self._encode(pixels, cache is not None, with_features)
        if cache is not None:
            encoded = {kind: rounded(tensor) for kind, tensor in encoded.items()}
            self._keep(cache, batch, encoded, pixels)
        if "moments" not in batch:
            return encoded
        has_moments = torch.tensor(batch["has_moments"], device=pixels.device)
        return {kind: _merge(has_moments, batch[kind], tensor) for kind, tensor in encoded.items() if kind in batch}

    def _encode(self, pixels: torch.Tensor, one_by_one: bool, with_features: bool) -> dict[str, torch.Tensor]:
        """What the VAE makes of images and, where it is wanted, the vision encoder."""
        encoders = {MOMENTS: lambda part: encode_moments(self.vae, part, self.encode_in_bf16)}
        if with_features and self.encoder is not None:
            encoders[FEATURES] = self.encoder
        # the images beside it in a batch must not change a bit of what a cache holds; on a GPU they may, by a rounding
        parts = pixels.split(1) if one_by_one and pixels.device.type == "cpu" else [pixels]
        return {kind: torch.cat([encode(part) for part in parts]) for kind, encode in encoders.items()}

    def _keep(self, cache: LatentsCache, batch: dict, encoded: dict[str, torch.Tensor], pixels: torch.Tensor) -> None:
        """Gives the cache what it lacks: as each sample saw its image, and the other way round where images are flipped."""
        samples = [i for i, has_moments in enumerate(batch["has_moments"]) if not has_moments]
        as_seen = {kind: tensor.cpu().numpy() for kind, tensor in encoded.items()}
        mirrored = {}
        if cache.key.flips:
            others = self._encode(pixels.flip(-1), one_by_one=True, with_features=True)
            mirrored = {kind: rounded(tensor).cpu().numpy() for kind, tensor in others.items()}
        labels = batch["condition"].tolist()
        for place, i in enumerate(samples):
            plain, flipped = (mirrored, as_seen) if batch["flipped"][i] else (as_seen, mirrored)
            arrays = {kind: array[place] for kind, array in plain.items()}
            arrays |= {kind + FLIPPED: array[place] for kind, array in flipped.items()}
            cache.add(batch["index"][i], arrays, labels[i], batch["caption"][i])

    def _count_skipped(self, batch: dict, cache: LatentsCache | None) -> None:
        for index, line in batch["skipped"]:
            self.num_skipped += 1
            self.first_skipped = self.first_skipped or line
            if self.num_skipped <= MAX_NAMED_IMAGES:
                logger.warning(f"skipped an image that cannot be read: {line}", main_process_only=False)
            if cache is not None:
                cache.add_unreadable(index, line.split("): ", 1)[-1])

    def _ahead(self, batches: Iterator[dict]) -> Iterator[dict]:
        """On a GPU, queues the encoding of the next batch on a stream of its own, beside the step that trains on this one."""
        device = self.accelerator.device
        if device.type != "cuda":
            yield from batches
            return
        stream = torch.cuda.Stream(device)

        def queue_next() -> dict | None:
            with torch.cuda.stream(stream):
                return next(batches, None)

        upcoming = queue_next()
        while upcoming is not None:
            batch = upcoming
            torch.cuda.current_stream(device).wait_stream(stream)
            used = [batch["latents"], batch["condition"], batch["draws"], batch.get("text", {})]
            used += [batch.get(name, {}) for name in ("pixel_values", FEATURES)]
            recursively_apply(lambda tensor: tensor.record_stream(torch.cuda.current_stream(device)), used)
            upcoming = queue_next()
            yield batch

    def _open_cache(self) -> LatentsCache:
        """The cache of --latents_cache, checked against VAE, data and options."""
        options, (channels, height, width) = self.options, self.latent_shape
        folder, features = Path(options.latents_cache), {}
        if self.encoder is not None:  # runs without one, or with another, keep theirs beside it
            made_by = f"{checksum(self.encoder.model)} {self.encoder.preparation}"
            folder = folder / f"vision-{blake2b(made_by.encode(), digest_size=8).hexdigest()}"
            shape = (self.encoder.width, self.encoder.grid, self.encoder.grid)
            features = {"encoder": made_by, "features_shape": shape}
        key = CacheKey(
            vae=checksum(self.vae),
            images=self.source.storage.images,
            resolution=options.resolution,
            crop="centre",
            flips=options.random_flip,
            shape=(channels * (2 if has_posterior(self.vae) else 1), height, width),
            buckets=self.buckets,
            **features,
        )
        return LatentsCache(folder, key, len(self.source.members))


def _merge(is_kept: torch.Tensor, kept: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
    """One tensor of all samples: `kept` of those that `is_kept` (B,) marks, `encoded` of the others."""
    merged = encoded.new_empty(len(is_kept), *encoded.shape[1:])
    merged[is_kept], merged[~is_kept] = kept.to(encoded.dtype), encoded
    return merged
