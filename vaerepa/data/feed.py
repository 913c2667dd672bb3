"""The feed: micro-batches on the device, from images, from the latents cache, or from a data set of latents.

It joins `reading` (rows, pixels, random numbers), `encoding` (VAE, vision encoder), `latents_cache` and, where the transformer
is conditioned on captions, `prompts`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from vaerepa.alignment.vision_encoder import VisionEncoder
from vaerepa.data.batch import Batch, Samples, Shape, SkippedRow, to_device
from vaerepa.data.buckets import parse_buckets
from vaerepa.data.encoding import Encoding
from vaerepa.data.latents_cache import FEATURES, MOMENTS, LatentsCache, open_cache, rounded
from vaerepa.data.numbers import DROP, NOISE, POSTERIOR, Numbers, PosteriorNumbers, T, ValidationNumbers, no_numbers
from vaerepa.data.options import FeedOptions
from vaerepa.data.order import stream_sizes
from vaerepa.data.prior import PairedSource, loss_weights
from vaerepa.data.prompts import Prompts, choose_prompt
from vaerepa.data.reading import Preprocessing, SampleReader, read_micro_batches
from vaerepa.data.source import Source
from vaerepa.data.uncounted import FinishedShard, UncountedSource
from vaerepa.logs import get_logger
from vaerepa.processes import check_shared
from vaerepa.vae import downsampling_factor, has_posterior

logger = get_logger(__name__)

MAX_NAMED_IMAGES = 5
NUM_COMPARED_IMAGES = 16
PIXELS = "pixel_values"


Together = Callable[[Iterator[list[Samples]]], Iterator[list[Samples]]]


class Feed:
    """Source of a run's training and validation batches.

    Args:
        vae: VAE, already on the device.
        source: rows that are trained on.
        latent_shape: (C, h, w) of a square image, the largest.
        prompts: encodes captions; None where the transformer is conditioned on labels.
        vision_encoder: computes features of training images; None where no alignment method needs them.

    Attributes:
        cache: cache of --latents_cache; None without it.
        num_cached: number of images that it holds in the end, one at each resolution.
        num_skipped: number of images that this process could not read.
        first_skipped: the first of these images, with the reason.

    Raises:
        OptionError: --latents_cache cannot be used.
    """

    def __init__(
        self,
        options: FeedOptions,
        accelerator: Accelerator,
        vae: nn.Module,
        source: Source | UncountedSource,
        latent_shape: Shape,
        prompts: Prompts | None = None,
        vision_encoder: VisionEncoder | None = None,
    ):
        self.options = options
        self.accelerator = accelerator
        self.source = source
        self.latent_shape = latent_shape
        self.prompts = prompts
        self.encoding = Encoding(accelerator, vae, vision_encoder)
        self.buckets = parse_buckets(options, downsampling_factor(vae))
        self.num_cached = len(options.resolution) * (source.num_images or 0)
        self.cache: LatentsCache | None = None
        if options.latents_cache:
            self.cache = open_cache(options, source, vae, vision_encoder, latent_shape, self.buckets)
        self.needs = frozenset({PIXELS, FEATURES})
        self.num_skipped = 0
        self.first_skipped: SkippedRow | None = None
        self._num_named = 0
        self._named_shards: set[int] = set()
        self._validation_samples: list[list[Samples]] | None = None  # of data that are not counted
        self._warn_of_few_streams()

    def choose_precision(self) -> None:
        """Lets the VAE encode in bfloat16 if the run uses it and latents change little; every process must call it."""
        if not self.encoding.may_choose_bf16:
            return
        count = self.source.at_most(NUM_COMPARED_IMAGES)
        [first, *_] = next(self._read(self.source, no_numbers, count, 0, count, distributed=False))
        if first.pixel_values is not None:
            self.encoding.choose_precision(first.pixel_values.to(self.accelerator.device))

    def first_latents(self, count: int) -> Iterator[torch.Tensor]:
        """Yields latents (B, C, h, w) of the first `count` samples of a run, all of them in each process."""
        numbers = PosteriorNumbers(self.options.seed)
        for micro_batch in self._read(self.source, numbers, min(count, 16), 0, count, distributed=False):
            for samples in map(self._to_device, micro_batch):
                yield self._latents_of(samples, self._encode(samples))

    def training_batches(
        self,
        numbers: Numbers,
        first: int,
        last: int,
        together: Together = iter,
    ) -> Iterator[list[Batch]]:
        """Yields this process's micro-batches of the samples `first` to `last`, each a list of batches, one for each shape.

        Until the cache holds every image it is written along the way, and reloaded at the end of each epoch; where an epoch
        has images several times, it is filled before. Skipped images are counted with the micro-batch that they are missing
        from, however far ahead it was read.

        Args:
            together: passes on what is read as long as every process can read, see `StopRequest.together`.
        """
        if self.cache is not None and self.num_cached != len(self.source) and not self._all_hold_all():
            logger.info("an epoch is not each image once: those that the latents cache does not hold are encoded first")
            for _ in self.fill_cache(together):
                pass
            self.reload_cache()
        while first < last:
            writes, end = self.cache is not None and not self._all_hold_all(), last
            if writes:
                epoch, batch_size = len(self.source), self.options.global_batch_size
                end = min(last, -(-(first // epoch + 1) * epoch // batch_size) * batch_size)
            elif self.cache is not None or self.source.holds_latents:
                self.encoding.let_vae_rest()
            read = self._read(self.source, numbers, self.options.train_batch_size, first, end, self.cache)
            ahead = self._ahead(self._batches(samples, trains=True) for samples in together(read))
            for micro_batch in ahead:
                for batch in micro_batch:
                    self._count_skipped(batch.skipped)
                yield micro_batch
            if writes:
                self.reload_cache()
            first = end

    def validation_batches(self, source: Source | UncountedSource, count: int) -> Iterator[Batch]:
        """Yields this process's batches of the first `count` samples of `source`; their random numbers ignore the seed."""
        if self._validation_samples is not None:
            read = self._validation_samples
        else:
            read = self._read(source, ValidationNumbers(), self.options.train_batch_size, 0, count, validates=True)
        if isinstance(source, UncountedSource):  # a fraction of it is found by reading many more
            read = self._validation_samples = list(read)
        return chain.from_iterable(self._batches(micro_batch, trains=False) for micro_batch in read)

    def narrow(self, needs: Iterable[str]) -> None:
        """Limits `pixel_values` and `vision_features` of further training batches to those in `needs`.

        Features are still computed as long as a cache needs them. Every process must call it.
        """
        self.needs = frozenset(needs)
        if FEATURES in self.needs or self.encoding.vision_encoder is None:
            return
        if self.cache is not None:
            self.cache.reads_features = False
        if self.cache is None or self._all_hold_all():
            self.encoding.vision_encoder = None

    # ---- shards that are not counted

    def gather_shards(self) -> dict[str, list] | None:
        """What all processes have learned of shards that are not counted, for a checkpoint; every process must call it.

        Returns:
            `rows` of each that was read to its end, in their sequence (None of others), and the numbers of the `lost`; None
            where rows are counted.
        """
        if not isinstance(self.source, UncountedSource):
            return None
        for finished, lost in gather_object([(self.source.finished, self.source.lost)]):
            self.source.finished = finished | self.source.finished
            self.source.lost |= lost
        finished = self.source.finished
        rows = [finished.get(reading) for reading in range(max(finished, default=-1) + 1)]
        return {"rows": rows, "lost": sorted(self.source.lost)}

    def count_lost_shards(self) -> tuple[int, int]:
        """Number of shards that are gone or damaged, by all processes, and of all; every process must call it."""
        if not isinstance(self.source, UncountedSource):
            return 0, 0
        return len(set().union(*gather_object([self.source.lost]))), self.source.num_shards

    def load_shards(self, shards: dict[str, list] | None) -> None:
        """Takes over what `gather_shards` gave before a restart."""
        if shards and isinstance(self.source, UncountedSource):
            self.source.finished |= {reading: rows for reading, rows in enumerate(shards["rows"]) if rows is not None}
            self.source.lost |= set(shards["lost"])

    # ---- the cache

    def fill_cache(self, together: Together = iter) -> Iterator[int]:
        """Encodes this process's images that the cache does not hold; yields the number of images after each micro-batch.

        An image counts at each resolution.
        """
        source, batch_size = self.source.repeated(len(self.options.resolution)), self.options.train_batch_size
        for micro_batch in together(self._read(source, no_numbers, batch_size, 0, len(source), self.cache)):
            for samples in micro_batch:
                for row in samples.skipped:
                    self._pass_over(row)
                self._encode(self._to_device(samples), self.cache, with_features=True)
            yield sum(map(len, micro_batch))

    def flush_cache(self) -> None:
        """Writes images that were encoded but not yet written to the cache."""
        if self.cache is not None:
            self.cache.flush()

    def reload_cache(self) -> None:
        """Writes pending rows, and loads those that all processes wrote; every process must call it."""
        self.flush_cache()
        self.accelerator.wait_for_everyone()
        self.cache.reload()
        self.narrow(self.needs)
        logger.info(f"the latents cache holds {self.cache.count(self.source.members)} of {self.num_cached} images")

    def check_cache(self) -> None:
        """Checks that all processes write into one cache; of a complete one each node may have a copy.

        Every process must call it.

        Raises:
            OptionError: it lacks images, and some processes do not see what the first one writes.
        """
        if self.cache is not None and not self._all_hold_all():
            check_shared(self.cache.folder, self.accelerator)

    def _all_hold_all(self) -> bool:
        """Whether every process sees the cache complete; another run may be writing into it."""
        complete = torch.tensor([self.cache.holds(self.source.members)], device=self.accelerator.device)
        return bool(self.accelerator.gather(complete).all())

    # ---- from rows to batches

    def _read(
        self,
        source: Source | UncountedSource,
        numbers: Numbers,
        batch_size: int,
        first: int,
        last: int,
        cache: LatentsCache | None = None,
        distributed: bool = True,
        validates: bool = False,
    ) -> Iterator[list[Samples]]:
        """Micro-batches of the samples `first` to `last` on the host: this process's part, or all if not `distributed`."""
        options, accelerator = self.options, self.accelerator
        preprocessing = Preprocessing(
            options.largest_resolution,
            options.center_crop or validates,
            options.random_flip and not validates,
            options.seed,
            self.buckets[-1:] if validates else self.buckets,
            options.masked_loss,
        )
        reader = SampleReader(
            source,
            self.latent_shape,
            preprocessing,
            numbers,
            batch_size,
            first,
            last,
            options.num_streams,
            1 if validates and isinstance(source, UncountedSource) else options.shuffle_buffer_size,
            seed=0 if validates else options.seed,
            process=accelerator.process_index if distributed else 0,
            num_processes=accelerator.num_processes if distributed else 1,
            cache=cache,
            has_posterior=has_posterior(self.encoding.vae),
        )
        pin_memory = accelerator.device.type == "cuda"
        return read_micro_batches(reader, options.dataloader_num_workers, pin_memory)

    def with_text(self, batch: Batch) -> Batch:
        """The batch with its prompts encoded, if they are not yet, with gradients of the text encoders that train."""
        if not batch.prompts:
            return batch
        with self.accelerator.autocast():
            return replace(batch, text=self.prompts.condition(batch.prompts), prompts=())

    def without_condition(self, batch: Batch) -> Batch:
        """The batch with every label dropped, or with empty captions."""
        text = self.prompts.condition([""] * len(batch.t)) if self.prompts else None
        return replace(batch, drop=torch.ones_like(batch.drop), text=text)

    def _batches(self, micro_batch: list[Samples], trains: bool) -> list[Batch]:
        """Batches of a micro-batch; validation images are not cached."""
        size = sum(map(len, micro_batch))
        batches = []
        for samples in micro_batch:
            if trains and isinstance(self.source, UncountedSource):
                self._learn(samples.finished)
            prompts = self._prompts_of(samples, trains) if self.prompts else []
            in_step = trains and self.prompts and self.prompts.trained  # by the weights of that step
            text = self.prompts.condition(prompts) if self.prompts and not in_step else None
            samples = self._to_device(samples)
            encoded = self._encode(samples, self.cache if trains else None, with_features=trains)
            clean, numbers = self._latents_of(samples, encoded), dict(samples.numbers)
            weights = None
            if trains and isinstance(self.source, PairedSource):
                weights = loss_weights(samples.sample_indices, self.options.prior_loss_weight)
                weights = to_device(torch.tensor(weights, dtype=clean.dtype), clean.device)
            batches.append(
                Batch(
                    sample_indices=samples.sample_indices,
                    weight=len(samples) / size,
                    latents=clean,
                    noise=numbers.pop(NOISE).to(clean.dtype),
                    t=numbers.pop(T).to(clean.dtype),
                    labels=samples.labels,
                    drop=numbers.pop(DROP),
                    numbers={name: values for name, values in numbers.items() if name != POSTERIOR},
                    text=text,
                    prompts=prompts if in_step else (),
                    pixel_values=samples.pixel_values if PIXELS in self.needs and trains else None,
                    vision_features=encoded.get(FEATURES) if FEATURES in self.needs else None,
                    mask=None if samples.masks is None else samples.masks.unsqueeze(1).to(clean.dtype),
                    loss_weights=weights,
                    skipped=samples.skipped,
                )
            )
        return batches

    def _prompts_of(self, samples: Samples, trains: bool) -> list[str]:
        rows = zip(samples.captions, samples.numbers[DROP].tolist(), samples.sample_indices, strict=True)
        seed = self.options.seed if trains else None
        return [choose_prompt(caption, drop, seed, i) for caption, drop, i in rows]

    def _to_device(self, samples: Samples) -> Samples:
        return samples.map_tensors(lambda tensor: to_device(tensor, self.accelerator.device))

    def _encode(
        self, samples: Samples, cache: LatentsCache | None = None, with_features: bool = False
    ) -> dict[str, torch.Tensor]:
        """Moments and features of each sample, from the cache or encoded now, in the cache's precision."""
        at_hand = {MOMENTS: samples.moments, FEATURES: samples.vision_features}
        at_hand = {kind: tensor for kind, tensor in at_hand.items() if tensor is not None}
        pixels = samples.pixel_values
        if pixels is None:
            return at_hand
        encoded = self.encoding.encode(pixels, with_features, one_by_one=cache is not None)
        if cache is not None:
            encoded, mirrored = rounded(encoded), {}
            if cache.key.flips:
                mirrored = rounded(self.encoding.encode(pixels.flip(-1), with_features=True, one_by_one=True))
            cache.add_samples(samples, encoded, mirrored)
        if not at_hand:
            return encoded
        return {kind: _merge(samples.has_moments, at_hand[kind], encoded[kind]) for kind in encoded if kind in at_hand}

    def _latents_of(self, samples: Samples, encoded: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.encoding.sample_latents(encoded[MOMENTS], samples.numbers.get(POSTERIOR))

    def _learn(self, finished: list[FinishedShard]) -> None:
        """Keeps what was learned of shards that are not counted, and names those that are lost; how far ahead does not matter."""
        self.source.record(finished)
        for shard in sorted(self.source.lost - self._named_shards):
            name = self.source.storage.names[shard]
            logger.warning(f"the shard {name} is gone or damaged, and passed over", main_process_only=False)
        self._named_shards |= self.source.lost

    def _count_skipped(self, skipped: Iterable[SkippedRow]) -> None:
        for row in skipped:
            self.num_skipped += 1
            self.first_skipped = self.first_skipped or row
            self._pass_over(row)

    def _pass_over(self, row: SkippedRow) -> None:
        """Names one of the first images that cannot be read, and keeps it from being read again where there is a cache."""
        self._num_named += 1
        if self._num_named <= MAX_NAMED_IMAGES:
            logger.warning(f"skipped an image that cannot be read: {row}", main_process_only=False)
        if self.cache is not None:
            self.cache.add_unreadable(row.row_index, row.reason)

    def _ahead(self, micro_batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """On a GPU, encodes the next micro-batch on a CUDA stream of its own, while the step trains on the current one."""
        device = self.accelerator.device
        if device.type != "cuda":
            yield from micro_batches
            return
        stream = torch.cuda.Stream(device)

        def queue_next() -> list[Batch] | None:
            with torch.cuda.stream(stream):
                return next(micro_batches, None)

        def use_here(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(torch.cuda.current_stream(device))
            return tensor

        upcoming = queue_next()
        while upcoming is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
            micro_batch = [batch.map_tensors(use_here) for batch in upcoming]
            upcoming = queue_next()
            yield micro_batch

    def _warn_of_few_streams(self) -> None:
        options, processes = self.options, self.accelerator.num_processes
        if self.source.storage.random_access:
            return
        num_streams, _ = stream_sizes(self.source, options.num_streams, options.shuffle_buffer_size)
        if num_streams % (processes * max(1, options.dataloader_num_workers)):
            logger.warning(
                f"--num_streams {num_streams} is no multiple of {processes} processes x {options.dataloader_num_workers} "
                "data workers: several read the same rows, to use each once"
            )


def _merge(is_kept: list[bool], kept: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
    """One tensor of all B samples: `kept` of those that `is_kept` marks, `encoded` of the others."""
    merged = encoded.new_empty(len(is_kept), *encoded.shape[1:])
    marked = torch.tensor(is_kept)
    for is_one, values in ((marked, kept.to(encoded.dtype)), (~marked, encoded)):
        merged.index_copy_(0, to_device(is_one.nonzero().flatten(), encoded.device), values)
    return merged
