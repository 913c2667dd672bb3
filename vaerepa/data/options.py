"""Options of the data: which, how they are read, cached and batched."""

from dataclasses import dataclass
from pathlib import Path

from vaerepa.cli import option
from vaerepa.families.options import TextOptions
from vaerepa.privacy import public_name
from vaerepa.randomness import SeedOptions


@dataclass
class PromptOptions:
    """Captions on their way to the transformer."""

    max_sequence_length: int | None = option(
        None,
        "Tokens of a prompt; longer ones are cut. Default: the stock pipeline's.",
        resume="fixed",
        above=0,
        goes_with="text_conditioning",
    )
    cache_text_embeddings: bool = option(
        False,
        "Encode all captions before training, into --latents_cache or else into the output folder, so that no text encoder "
        "stays in memory.",
        goes_with="text_conditioning",
    )


@dataclass
class PriorOptions:
    """Prior preservation: what the model is to remember of a class while it learns instances of it."""

    with_prior_preservation: bool = option(
        False,
        "Prior preservation as in DreamBooth: half of each batch, which --train_batch_size counts too, are pictures of "
        "--class_data_dir.",
        resume="fixed",
        goes_with="text_conditioning",
    )
    class_data_dir: str | None = option(
        None,
        "Folder of pictures of the class. Where there are fewer than --num_class_images, the pipeline that is fine-tuned "
        "generates the others into it, before it trains.",
        resume="content",
        path="local",
        goes_with="with_prior_preservation",
    )
    class_prompt: str | None = option(
        None,
        "Caption of the pictures of the class, such as 'a photo of dog'.",
        resume="fixed",
        goes_with="with_prior_preservation",
    )
    num_class_images: int = option(
        100,
        "Number of pictures of the class that are trained on.",
        resume="fixed",
        above=0,
        goes_with="with_prior_preservation",
    )
    prior_loss_weight: float = option(
        1.0,
        "Weight of the losses of the pictures of the class, beside 1 of those of the others.",
        resume="schedule",
        at_least=0,
        goes_with="with_prior_preservation",
    )


@dataclass
class DataOptions:
    """The data set, its splits and columns, images, order, cache and workers."""

    dataset_name: str | None = option(
        None,
        "One data set: a Hub id, or a local folder in the Hub's layout; --train_data_dir takes several folders. It is streamed.",
        resume="content",
        group="Data",
        path="hub",
    )
    train_data_dir: tuple[str, ...] | None = option(
        None,
        "Local data instead of --dataset_name: a folder of images in folders by class, of parquet files, of webdataset tar "
        "shards, what save_to_disk wrote, the vae-sd layout of REPA and SRA, or one such file; or several of these.",
        resume="content",
        path="local",
    )
    repeats: tuple[int, ...] = option(
        (1,),
        "How often an epoch has each image that is trained on: one number, or one for each of --train_data_dir.",
        resume="fixed",
        above=0,
    )
    dataset_config_name: str | None = option(None, "Config of the data set, when it has several.", resume="content")
    dataset_revision: str | None = option(None, "Revision of the data set on the Hub.", resume="content")
    train_split: str = option("train", "Split to train on.", resume="fixed")
    validation_split: str | None = option(
        None,
        "Validation images: the name of a split, or a fraction such as 0.02 that is taken out of the training split. "
        "Default: the data set's own validation or test split, if it has one.",
        resume="fixed",
    )
    image_column: str | None = option(
        None,
        "Column with the images. Default: found from the features; a column `moments` or `latents` goes before.",
        resume="content",
    )
    label_column: str | None = option(
        None,
        "Column with the class labels: ClassLabel, whole numbers from 0 on, or the classes' names. Default: found from the "
        "features.",
        resume="content",
    )
    num_classes: int | None = option(
        None,
        "Number of classes: labels are whole numbers from 0 to this minus 1. Default: found from the labels, for which tar "
        "shards on the Hub are all read once before training.",
        resume="fixed",
        above=0,
        goes_with="no_text_conditioning",
    )
    caption_column: str | None = option(
        None,
        "Column with captions; of several captions of an image one is sampled per epoch. Default: "
        "found from the features.",
        resume="content",
    )
    masked_loss: bool = option(
        False,
        "Learn only from the part of each image that its mask shows: white is learned, black is not. The mask is that of "
        "--mask_column or, where there is none, the image's alpha channel.",
        resume="fixed",
    )
    mask_column: str | None = option(
        None,
        "Column with the masks, images of the size of theirs. Default: a column `mask`, if there is one.",
        resume="content",
        goes_with="masked_loss",
    )
    instance_prompt: tuple[str, ...] | None = option(
        None,
        "Caption of images that have none, so that folders of images alone train too: one, or one for each of "
        "--train_data_dir.",
        resume="fixed",
        goes_with="text_conditioning",
    )
    max_train_samples: int | None = option(
        None, "Train on so many images, sampled by --seed. Default: on all.", resume="fixed", above=0
    )
    cache_dir: str | None = option(None, "Where downloaded models and data sets are kept.", path="local")
    resolution: tuple[int, ...] = option(
        (256,),
        "Images are resized and cropped to this many pixels square. With several numbers, which text-to-image models take, an "
        "epoch has each image once at each; one that would be enlarged is trained at the largest that it fills in its place. "
        "Validation, sample grids and evaluation are of the largest.",
        resume="fixed",
        above=0,
    )
    center_crop: bool = option(
        True, "Crop the centre, as ADM, DiT and SiT do; otherwise a random square.", resume="fixed"
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "Cut each image to the nearest of these sizes instead of to a square: 'height,width;height,width;...' in pixels, or auto "
        "for the usual ratios from 1:2 to 2:1 at the area of --resolution, or of each.",
        resume="fixed",
        goes_with="text_conditioning",
    )
    random_flip: bool = option(False, "Flip images horizontally at random. The paper does not.", resume="fixed")
    num_streams: int | None = option(
        None,
        "Places in parquet files, or in tar shards on the Hub, that are read at once; all other data are permuted whole. Give a "
        "multiple of devices x data workers: else several workers read the same rows. The order depends on this number, not on "
        "devices or workers. Default: 256, halved until there is a shard for each, or a row group for every two, and what is "
        "read at once takes at most 16 GiB over all workers.",
        resume="fixed",
        above=0,
    )
    shuffle_buffer_size: int | None = option(
        None,
        "Images that parquet files, or remote tar shards, are shuffled within, over all streams; row groups and shards are "
        "too. Default: as many as take 1 GiB, undecoded, over all data workers.",
        resume="fixed",
        above=0,
    )
    latents_cache: str | None = option(
        None,
        "Folder where the latents' moments, and what --alignment repa aligns to, are kept in half precision: written in the "
        "first epoch, read in the others. Not with a random crop.",
        resume="schedule",
        path="local",
    )
    precompute_latents_only: bool = option(
        False, "Fill --latents_cache with all processes, and exit.", goes_with="latents_cache"
    )
    max_bad_fraction: float = option(
        0.05,
        "Stop when more than this fraction of the images, or of the shards on the Hub, cannot be read. Those are skipped, and "
        "counted in the metrics.",
        at_least=0,
        at_most=1,
    )
    dataloader_num_workers: int = option(
        2, "Data worker processes per device; 0 loads in the main process.", at_least=0
    )

    @property
    def largest_resolution(self) -> int:
        """Side in pixels of the square that validation images, sample grids and evaluation have."""
        return max(self.resolution)


@dataclass
class BatchOptions:
    """Sizes of a step's batch."""

    train_batch_size: int | None = option(
        None, "Batch size per device. Default: 16, or what --global_batch_size asks of one device.", above=0
    )
    gradient_accumulation_steps: int | None = option(
        None, "Number of micro-batches per step. Default: 1, or what --global_batch_size needs.", above=0
    )
    global_batch_size: int | None = option(
        None, "Images per step over all devices. Default: batch size x devices x accumulation.", resume="fixed", above=0
    )


def public_dataset(options: DataOptions) -> str:
    """Name of the data set as others may see it: a Hub id, or the last part of each path; empty where there is none."""
    return ", ".join(public_folders(options)) or public_name(options.dataset_name or "")


def public_folders(options: DataOptions) -> list[str]:
    """The last part of each path of --train_data_dir."""
    return [Path(path).name for path in options.train_data_dir or ()]


class FeedOptions(TextOptions, PriorOptions, DataOptions, SeedOptions, BatchOptions):
    """Options by which data are opened and a run is given its batches."""
