"""--precompute_latents_only: fills the latents cache, and features beside them, ahead of training, on all processes."""

import sys

from accelerate import Accelerator
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vaerepa import checks, components
from vaerepa.class_images import generate_class_images
from vaerepa.command import command_again
from vaerepa.data import DataError, Feed
from vaerepa.logs import get_logger
from vaerepa.model import check_geometry, family_of
from vaerepa.options import Options
from vaerepa.stopping import StopRequest
from vaerepa.vae import downsampling_factor, shape_of_latents

logger = get_logger(__name__)

FLUSH_STEPS = 200


def precompute_latents(options: Options, accelerator: Accelerator) -> None:
    """Encodes every image that the cache does not hold yet; a signal stops it, and the same command goes on.

    Raises:
        OptionError: VAE, data or cache cannot be opened, or do not fit.
        DataError: too many images cannot be read.
    """
    if options.with_prior_preservation:
        generate_class_images(options, accelerator)
    with accelerator.main_process_first():
        vae, sources = components.open_vae_and_data(options, family_of(options))
        encoder = components.open_encoder(options)
    check_geometry(options, downsampling_factor(vae), patch_size=1)
    shape = shape_of_latents(vae, options.largest_resolution)
    with accelerator.main_process_first():
        feed = Feed(options, accelerator, vae.to(accelerator.device), sources.train, shape, vision_encoder=encoder)
    feed.check_cache()
    feed.choose_precision()
    images_per_step, count = options.train_batch_size * accelerator.num_processes, feed.num_cached
    progress = tqdm(total=count, desc="images", disable=not accelerator.is_local_main_process)
    done = feed.cache.count(sources.train.members)
    logger.info(f"{feed.cache.folder} holds {done} of {count} images; encoding the others")
    with logging_redirect_tqdm(), StopRequest(accelerator.num_processes) as stop:
        for step, _ in enumerate(feed.fill_cache()):
            progress.update(min(images_per_step, count - step * images_per_step))
            if step % FLUSH_STEPS == FLUSH_STEPS - 1:
                feed.flush_cache()
            if stop.is_agreed():
                break
        progress.close()
        feed.reload_cache()
        complete = feed.cache.holds(sources.train.members)
        if not complete:
            reason = f"stopped by {stop.reason}" if stop.reason else "some latents could not be written"
            logger.warning(f"{reason}. Go on with\n    {command_again()}")
    bad, num_images = feed.cache.count_unreadable(sources.train.members), sources.train.num_images
    if bad >= checks.MIN_BAD_IMAGES and bad > options.max_bad_fraction * num_images:
        raise DataError(
            f"{bad} of {num_images} images could not be read, more than --max_bad_fraction {options.max_bad_fraction}; the log "
            "names the first. Mend the data and remove the cache, or raise it."
        )
    if complete:
        seen = f" --alignment repa --alignment_encoder {options.alignment_encoder}" if encoder else ""
        logger.info(f"done: train with --latents_cache {options.latents_cache}{seen}; {bad} images cannot be read")
    elif not stop.reason:
        sys.exit(1)
