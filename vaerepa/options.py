"""Every option of the trainer, and what its command line and YAML files are made of."""

import types
from collections.abc import Sequence
from dataclasses import Field, dataclass
from typing import Any, Literal

from vaerepa import cli, families
from vaerepa.alignment.options import AlignmentOptions
from vaerepa.cli import Resume, as_plain, option
from vaerepa.foreign_flags import ALIASES, FOREIGN
from vaerepa.privacy import public_values


@dataclass
class ModelOptions:
    model: str = option(
        "SiT-B/2",
        f"Transformer to train: {families.presets_of('labels')}, or `custom` with the four options below; with "
        f"--text_conditioning {families.presets_of('captions')}, {families.custom_models()}.",
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
        f"a {families.pipelines_of('captions')}.",
        resume="content",
        path=True,
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None,
        "Hub id or folder of the frozen VAE (AutoencoderKL or AutoencoderTiny); a pipeline's `vae` subfolder is found. "
        "Default: the fine-tuned pipeline's own, or stabilityai/sd-vae-ft-mse.",
        resume="content",
        path=True,
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
    text_conditioning: bool = option(
        False, "Train a text-to-image transformer on captions, not on classes.", resume="fixed", group="Text"
    )
    pretrained_text_encoder_model_name_or_path: str | None = option(
        None,
        "Hub id or folder of the pipeline whose tokenizers and text encoders a --model from scratch is given; for PixArt "
        "also of a text encoder of transformers.",
        resume="content",
        path=True,
        goes_with="text_conditioning",
    )
    max_sequence_length: int | None = option(
        None, "Tokens of a prompt; longer ones are cut. Default: the stock pipeline's.", resume="fixed", above=0
    )
    proportion_empty_prompts: float = option(
        0.1,
        "Share of captions replaced by the empty prompt, for classifier-free guidance.",
        resume="fixed",
        at_least=0,
        below=1,
    )
    cache_text_embeddings: bool = option(
        False,
        "Encode all captions before training, into --latents_cache or else into the output folder, so that no text encoder "
        "stays in memory.",
        goes_with="text_conditioning",
    )
    rank: int | None = option(
        None,
        "Fine-tune a LoRA of this rank instead of all weights (diffusers' scripts: 4); it keeps no average.",
        resume="fixed",
        above=0,
        goes_with="text_conditioning",
    )
    lora_alpha: int | None = option(
        None, "Alpha of the LoRA. Default: its rank.", resume="fixed", above=0, goes_with="rank"
    )
    lora_dropout: float = option(
        0.0, "Dropout in the LoRA layers.", resume="schedule", at_least=0, below=1, goes_with="rank"
    )
    lora_layers: tuple[str, ...] = option(
        (),
        "Layers that the LoRA is laid over, by the ends of their names, with commas or spaces between. Default: those of the "
        "attention.",
        resume="fixed",
        goes_with="rank",
    )


@dataclass
class DataOptions:
    dataset_name: str | None = option(
        None,
        "Data set: a Hub id, or a local folder in the Hub's layout. It is streamed.",
        resume="content",
        group="Data",
        path=True,
    )
    train_data_dir: str | None = option(
        None,
        "Local data instead of --dataset_name: a folder of images in folders by class, of parquet files, of webdataset tar "
        "shards, what save_to_disk wrote, the vae-sd layout of REPA and SRA, or one such file.",
        resume="content",
        path=True,
    )
    dataset_config_name: str | None = option(None, "Config of the data set, when it has several.", resume="content")
    dataset_revision: str | None = option(None, "Revision of the data set on the Hub.", resume="content")
    train_split: str = option("train", "Split to train on.", resume="fixed")
    validation_split: str | None = option(
        None,
        "Held-out images: the name of a split, or a fraction such as 0.02 that is taken out of the training split. "
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
    caption_column: str | None = option(
        None,
        "Column with captions; of several captions of an image one is drawn per epoch. Default: "
        "found from the features.",
        resume="content",
    )
    max_train_samples: int | None = option(
        None, "Train on so many images, drawn at random by --seed. Default: on all.", resume="fixed", above=0
    )
    cache_dir: str | None = option(None, "Where downloaded models and data sets are kept.", path=True)
    resolution: int = option(256, "Images are resized and cropped to this many pixels square.", resume="fixed", above=0)
    center_crop: bool = option(
        True, "Crop the centre, as ADM, DiT and SiT do; otherwise a random square.", resume="fixed"
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "Cut each image to the nearest of these sizes instead of to a square: 'height,width;height,width;...' in pixels, or auto "
        "for the usual ratios from 1:2 to 2:1 at the area of --resolution. With --text_conditioning.",
        resume="fixed",
        goes_with="text_conditioning",
    )
    random_flip: bool = option(False, "Flip images horizontally at random. The paper does not.", resume="fixed")
    num_streams: int | None = option(
        None,
        "Places of parquet files, or of tar shards from afar, that are read at once; all else is permuted whole. Each belongs to "
        "one data worker, if this is a multiple of devices x workers. The order depends on it, not on those. Default: 256, or "
        "as many as there are row groups or shards for (two to each, and 16 GiB for row groups over all workers).",
        resume="fixed",
        above=0,
    )
    shuffle_buffer_size: int | None = option(
        None,
        "Images that parquet files, or tar shards from afar, are shuffled within, over all streams; row groups and shards are "
        "too. Default: as many as take 1 GiB, undecoded, over all data workers.",
        resume="fixed",
        above=0,
    )
    latents_cache: str | None = option(
        None,
        "Folder where the latents' moments, and what --alignment repa aligns to, are kept in half precision: written in the "
        "first epoch, read in the others. Not with a random crop.",
        resume="schedule",
        path=True,
    )
    precompute_latents_only: bool = option(
        False, "Fill --latents_cache with all processes, and exit.", goes_with="latents_cache"
    )
    max_bad_fraction: float = option(
        0.05,
        "Stop when more than this share of the images cannot be read. Those are skipped, and counted in the metrics.",
        at_least=0,
        at_most=1,
    )
    dataloader_num_workers: int = option(
        2, "Data worker processes per device; 0 loads in the main process.", at_least=0
    )


@dataclass
class ObjectiveOptions:
    objective: Literal["flow_matching", "ddpm"] | None = option(
        None,
        "What the transformer predicts: the velocity (SiT), or the noise (DiT). Default: what the fine-tuned pipeline "
        "predicts, or flow_matching.",
        resume="fixed",
        group="Objective",
    )
    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = option(
        "uniform", "Density of the training timesteps t in [0, 1].", resume="fixed"
    )
    logit_mean: float = option(
        0.0, "Mean of the logit-normal density, as in diffusers: above 0 prefers little noise.", resume="fixed"
    )
    logit_std: float = option(1.0, "Standard deviation of the logit-normal density.", resume="fixed", above=0)
    mode_scale: float = option(1.29, "Scale of the mode density (Stable Diffusion 3).", resume="fixed")
    timestep_shift: float | None = option(
        None,
        "Shift s of the timesteps, s t / (1 + (s - 1) t). Default: the fine-tuned pipeline's own, or 1.",
        resume="fixed",
        above=0,
    )
    snr_gamma: float | None = option(
        None, "Min-SNR weighting of the ddpm objective, 5.0 is its paper's value. Default: none.", resume="schedule"
    )
    label_dropout: float = option(
        0.1, "Share of labels dropped for classifier-free guidance.", resume="fixed", at_least=0, below=1
    )


@dataclass
class TrainingOptions:
    seed: int = option(
        0, "Everything random follows from it: weights, order, noise, timesteps.", resume="fixed", group="Training"
    )
    train_batch_size: int | None = option(
        None, "Batch size per device. Default: 16, or what --global_batch_size asks of one device.", above=0
    )
    gradient_accumulation_steps: int | None = option(
        None, "Number of micro-batches per step. Default: 1, or what --global_batch_size needs.", above=0
    )
    global_batch_size: int | None = option(
        None, "Images per step over all devices. Default: batch size x devices x accumulation.", resume="fixed", above=0
    )
    num_train_epochs: int = option(100, "Number of passes over the data, unless --max_train_steps is given.", above=0)
    max_train_steps: int | None = option(None, "Total number of training steps; overrides --num_train_epochs.", above=0)
    learning_rate: float = option(1e-4, "Learning rate after the warm-up.", resume="schedule", above=0)
    scale_lr: bool = option(False, "Multiply the learning rate by the global batch size.", resume="schedule")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant", "Learning rate schedule.", resume="schedule")
    lr_warmup_steps: int = option(
        0,
        "Warm-up steps of the schedule. The paper uses none (diffusers' scripts: 500).",
        resume="schedule",
        at_least=0,
    )
    lr_num_cycles: int = option(1, "Number of restarts of cosine_with_restarts.", resume="schedule", above=0)
    lr_power: float = option(1.0, "Power of the polynomial schedule.", resume="schedule")
    adam_beta1: float = option(0.9, "AdamW's beta1.", resume="schedule", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's beta2.", resume="schedule", at_least=0, below=1)
    adam_weight_decay: float = option(
        0.0, "AdamW's weight decay. The paper uses none (diffusers' scripts: 1e-2).", resume="schedule", at_least=0
    )
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", resume="schedule", above=0)
    max_grad_norm: float = option(
        1.0, "Largest gradient norm; larger gradients are scaled down. 0: no limit.", resume="schedule", at_least=0
    )
    max_skipped_steps: int = option(
        20, "Stop after this many steps in a row whose gradients are not finite (each is skipped).", above=0
    )
    use_ema: bool = option(True, "Keep an exponential moving average of the weights, and export it.", resume="fixed")
    ema_decay: tuple[float, ...] | None = option(
        None,
        "Decay of the average; with several values the first is exported, all are kept and validated. Default: 0.9999; in "
        "fine-tuning 1 - 10 / steps, up to 0.9999, which averages over the last tenth of the run.",
        resume="fixed",
        at_least=0,
        below=1,
    )
    offload_ema: bool = option(False, "Keep the averages in CPU memory; every step then copies the weights there.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Precision of the forward pass. Default: what `accelerate config` says."
    )
    allow_tf32: bool = option(False, "Allow TF32 matrix products on Ampere GPUs and newer.", resume="schedule")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    compile: bool = option(False, "Compile each block with torch.compile.", resume="schedule")
    enable_xformers_memory_efficient_attention: bool = option(
        False, "Use xformers' attention instead of torch's own (SDPA).", resume="schedule"
    )
    use_8bit_adam: bool = option(
        False, "Use bitsandbytes' 8-bit AdamW: a quarter of the optimizer's memory.", resume="fixed"
    )


@dataclass
class ValidationOptions:
    validation_steps: int | None = option(
        None, "Validate every so many steps. Default: at the end only.", group="Validation", above=0
    )
    num_validation_images: int = option(
        16, "Pictures in a sample grid, at most a row of 10 before the first step; 0 draws none.", at_least=0
    )
    validation_prompts: tuple[str, ...] = option(
        (), "Prompts of the sample grids of a text-to-image model.", goes_with="text_conditioning"
    )
    negative_prompt: str = option("", "Negative prompt of the sample grids.")
    validation_guidance_scale: float = option(4.0, "Guidance scale of the sample grids.", at_least=0)
    validation_num_inference_steps: int = option(50, "Sampling steps of the sample grids.", above=0)
    num_validation_samples: int = option(512, "Held-out images of the validation loss.", at_least=0)


@dataclass
class EvaluationOptions:
    eval_steps: int | None = option(
        None,
        "Draw images and measure FID, KID, precision and recall every so many steps, and at the end; needs "
        "requirements-evaluation.txt. Default: never.",
        group="Evaluation",
        above=0,
    )
    num_eval_samples: int = option(1000, "Images to draw; FID of fewer is larger, so compare equal numbers only.")
    label_sampling: Literal["random", "equal"] = option(
        "random", "Classes of these images: at random, as REPA, SRA and SiT draw them, or all equally often."
    )
    eval_reference: str | None = option(
        None,
        "Statistics of real images (.npz, as `python -m vaerepa.evaluate` keeps or takes them). Default: of up to 10000 "
        "training images, measured once.",
        path=True,
    )
    eval_guidance_scale: float = option(1.0, "Guidance scale of these images; 1 is none.", at_least=0)
    eval_num_inference_steps: int = option(50, "Sampling steps of these images.", above=0)
    inception_weights: str | None = option(
        None, "File of the FID Inception's weights. Default: torch-fidelity downloads its own.", path=True
    )


@dataclass
class OutputOptions:
    output_dir: str = option(
        "outputs/vaerepa", "Folder for checkpoints, pictures and the final pipeline.", group="Output", path=True
    )
    logging_dir: str = option("logs", "Folder for the trackers' logs, inside the output folder.", path=True)
    logging_steps: int = option(50, "Log the mean of the losses and the throughput every so many steps.", above=0)
    report_to: str = option("tensorboard", "Tracker: tensorboard, any other that accelerate knows, or none.")
    dry_run: bool = option(False, "Print sizes, costs and schedule of this run, and exit.")
    profile: bool = option(False, "Profile ten steps into OUTPUT_DIR/profile, for chrome://tracing or Perfetto.")
    checkpointing_steps: int = option(500, "Save a checkpoint every so many steps.", above=0)
    checkpoint_failure: Literal["continue", "stop"] = option(
        "continue",
        "What to do when a checkpoint cannot be saved (a full disk, say): go on and try again at the next, or stop.",
    )
    checkpoints_total_limit: int | None = option(
        None, "Keep at most this many checkpoints; the oldest go first.", above=0
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Checkpoint to go on from: its folder, `latest` (starts afresh when there is none), or hub:user/name, "
        "hub:user/name@revision for one that --hub_strategy checkpoint pushed.",
        path=True,
    )


@dataclass
class HubOptions:
    push_to_hub: bool = option(
        False,
        "Push the model to the Hub, in the background. Exit code 3: the last push failed, the run did not.",
        group="Hub",
    )
    hub_model_id: str | None = option(
        None,
        "Repository to push to, user/name. Default: the name of --output_dir, in your own account.",
        goes_with="push_to_hub",
    )
    hub_token: str | None = option(
        None,
        "Token for the Hub. Better: log in with `hf auth login`, or set HF_TOKEN. It is saved nowhere.",
        secret=True,
    )
    hub_private_repo: bool = option(
        False, "Make the repository a private one, when it is not there yet.", goes_with="push_to_hub"
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = option(
        "every_save",
        "What is pushed when, as in transformers' Trainer: the model at the end; or at every save; or with it the newest "
        "training state, as last-checkpoint/; or every one, as checkpoint-N/. Each push is a commit with the tag step-N.",
    )
    hub_revision: str | None = option(
        None,
        "Branch to push to, made when it is not there; its tags are named REVISION-step-N. Default: main.",
        goes_with="push_to_hub",
    )
    hub_license: str = option("unknown", "Licence in the model card, as the Hub spells it, for example apache-2.0.")


@dataclass
class Options(
    ModelOptions,
    TextOptions,
    DataOptions,
    ObjectiveOptions,
    AlignmentOptions,
    TrainingOptions,
    ValidationOptions,
    EvaluationOptions,
    OutputOptions,
    HubOptions,
):
    """Every option, by the rooms that declare them; the order is that of --help."""


FIELDS: dict[str, Field] = cli.fields_of(Options)


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line, see `cli.parse`.

    Raises:
        OptionError: an unknown key or flag, or a value of the wrong type.
        SystemExit: after --help.
    """
    description = "Trains a latent diffusion transformer with VAE representation alignment."
    return cli.parse(Options, arguments, "train_vaerepa.py", description, ALIASES, FOREIGN)


def changed_options(before: dict[str, Any], now: Options, resume: Resume) -> list[str]:
    """Names the options of one `resume` class that differ between a saved run, in its public values, and this one."""
    current = public_values(as_plain(now))
    saved = {name: _listed(value, current[name]) for name, value in before.items() if name in current}
    idle = "alignment_" if now.alignment == ("none",) else None  # without a method its options say nothing
    return [
        f"--{name} was {saved[name]!r} and is {current[name]!r}"
        for name, spec in FIELDS.items()
        if spec.metadata["resume"] == resume
        and name in saved
        and saved[name] != current[name]
        and not (idle and name.startswith(idle))
    ]


def _listed(saved: Any, current: Any) -> Any:
    """A value that was saved before its option took several."""
    return [saved] if isinstance(current, list) and not isinstance(saved, list | types.NoneType) else saved


if __name__ == "__main__":
    print(
        f"# Options\n\nThis page is written by `python -m vaerepa.options > docs/options.md`.\n\n{cli.table(Options)}"
    )
