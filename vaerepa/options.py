"""Every option once: a field is the flag, the YAML key, the line of run_config.yaml and the row of the README's table."""

import argparse
import difflib
import types
import typing
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from vaerepa import families
from vaerepa.errors import OptionError
from vaerepa.privacy import public_values

Resume = Literal["fixed", "content", "schedule", "free"]


def option(default: Any, help: str, *, resume: Resume = "free", group: str = "", secret: bool = False) -> Any:
    """A dataclass field with its help text and with what a restart may do to it.

    `resume` is "fixed" where another value would change the steps already taken (refused), "content" where it names data
    or models that are compared by what they hold, "schedule" where it changes the steps to come (allowed, and said), "free"
    where it changes no step at all. What is `secret` is never shown or saved.
    """
    return field(
        default=default, repr=not secret, metadata={"help": help, "resume": resume, "group": group, "secret": secret}
    )


@dataclass
class Options:
    # --- Model ---------------------------------------------------------------------------------------------------
    model: str = option(
        "SiT-B/2",
        f"Transformer to train: {families.SIZES_HELP}, or `custom` with the four options below; with --text_conditioning "
        f"{families.TEXT_SIZES_HELP}, `custom-MMDiT` or `custom-PixArt`.",
        resume="fixed",
        group="Model",
    )
    num_layers: int | None = option(None, "Number of transformer blocks of a `custom` model.", resume="fixed")
    hidden_size: int | None = option(None, "Width of a `custom` model.", resume="fixed")
    num_attention_heads: int | None = option(None, "Number of attention heads of a `custom` model.", resume="fixed")
    patch_size: int | None = option(None, "Patch size, in latent pixels, of a `custom` model.", resume="fixed")
    pretrained_model_name_or_path: str | None = option(
        None,
        "Hub id or folder of a DiTPipeline to fine-tune, instead of training --model from scratch; with --text_conditioning of "
        f"a {families.SUPPORTED}.",
        resume="content",
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None,
        "Hub id or folder of the frozen VAE (AutoencoderKL or AutoencoderTiny); a pipeline's `vae` subfolder is found. "
        "Default: the fine-tuned pipeline's own, or stabilityai/sd-vae-ft-mse.",
        resume="content",
    )
    revision: str | None = option(
        None, "Revision on the Hub of the pipeline to fine-tune, or else of the VAE.", resume="content"
    )
    variant: str | None = option(
        None,
        "Variant of the files of the pipeline to fine-tune, or else of the VAE, for example fp16.",
        resume="content",
    )

    # --- Text ----------------------------------------------------------------------------------------------------
    text_conditioning: bool = option(
        False, "Train a text-to-image transformer on captions, not on classes.", resume="fixed", group="Text"
    )
    pretrained_text_encoder_model_name_or_path: str | None = option(
        None,
        "Hub id or folder of the pipeline whose tokenizers and text encoders a --model from scratch is given; for PixArt "
        "also of a text encoder of transformers.",
        resume="content",
    )
    max_sequence_length: int | None = option(
        None, "Tokens of a prompt; longer ones are cut. Default: the stock pipeline's.", resume="fixed"
    )
    proportion_empty_prompts: float = option(
        0.1, "Share of captions replaced by the empty prompt, for classifier-free guidance.", resume="fixed"
    )
    cache_text_embeddings: bool = option(
        False,
        "Encode all captions before training, into --latents_cache or else into the output folder, so that no text encoder "
        "stays in memory.",
    )
    rank: int | None = option(
        None,
        "Fine-tune a LoRA of this rank instead of all weights (diffusers' scripts: 4); it keeps no average.",
        resume="fixed",
    )
    lora_alpha: int | None = option(None, "Alpha of the LoRA. Default: its rank.", resume="fixed")
    lora_dropout: float = option(0.0, "Dropout in the LoRA layers.", resume="schedule")
    lora_layers: tuple[str, ...] = option(
        (),
        "Layers that the LoRA is laid over, by the ends of their names, with commas or spaces between. Default: those of the "
        "attention.",
        resume="fixed",
    )

    # --- Data ----------------------------------------------------------------------------------------------------
    dataset_name: str | None = option(
        None,
        "Data set: a Hub id, or a local folder in the Hub's layout. It is streamed.",
        resume="content",
        group="Data",
    )
    train_data_dir: str | None = option(
        None,
        "Local data instead of --dataset_name: a folder of images in folders by class, of parquet files, of webdataset tar "
        "shards, what save_to_disk wrote, the vae-sd layout of REPA and SRA, or one such file.",
        resume="content",
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
        "Column with the class labels (ClassLabel or integers). Default: found from the features.",
        resume="content",
    )
    caption_column: str | None = option(
        None,
        "Column with captions; of several captions of an image one is drawn per epoch. Default: "
        "found from the features.",
        resume="content",
    )
    max_train_samples: int | None = option(
        None, "Train on so many images, drawn at random by --seed. Default: on all.", resume="fixed"
    )
    cache_dir: str | None = option(None, "Where downloaded models and data sets are kept.")
    resolution: int = option(256, "Images are resized and cropped to this many pixels square.", resume="fixed")
    center_crop: bool = option(
        True, "Crop the centre, as ADM, DiT and SiT do; otherwise a random square.", resume="fixed"
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "Cut each image to the nearest of these sizes instead of to a square: 'height,width;height,width;...' in pixels, or auto "
        "for the usual ratios from 1:2 to 2:1 at the area of --resolution. With --text_conditioning.",
        resume="fixed",
    )
    random_flip: bool = option(False, "Flip images horizontally at random. The paper does not.", resume="fixed")
    num_streams: int = option(
        16,
        "Places of the data set that are read at once. Each belongs to one data worker, if this is a multiple of devices x "
        "workers. The order depends on it, not on those.",
        resume="fixed",
    )
    shuffle_buffer_size: int = option(
        1000, "Images are shuffled within so many, over all streams; shards are shuffled too.", resume="fixed"
    )
    latents_cache: str | None = option(
        None,
        "Folder where the latents' moments, and what --alignment repa aligns to, are kept in half precision: written in the "
        "first epoch, read in the others. Not with a random crop.",
        resume="schedule",
    )
    precompute_latents_only: bool = option(False, "Fill --latents_cache with all processes, and exit.")
    max_bad_fraction: float = option(
        0.05,
        "Stop when more than this share of the images cannot be read. Those are skipped, and counted in the metrics.",
    )
    dataloader_num_workers: int = option(2, "Data worker processes per device; 0 loads in the main process.")

    # --- Objective -----------------------------------------------------------------------------------------------
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
    logit_mean: float = option(0.0, "Mean of the logit-normal density.", resume="fixed")
    logit_std: float = option(1.0, "Standard deviation of the logit-normal density.", resume="fixed")
    mode_scale: float = option(1.29, "Scale of the mode density (Stable Diffusion 3).", resume="fixed")
    timestep_shift: float | None = option(
        None,
        "Shift s of the timesteps, s t / (1 + (s - 1) t). Default: the fine-tuned pipeline's own, or 1.",
        resume="fixed",
    )
    snr_gamma: float | None = option(
        None, "Min-SNR weighting of the ddpm objective, 5.0 is its paper's value. Default: none.", resume="schedule"
    )
    label_dropout: float = option(0.1, "Share of labels dropped for classifier-free guidance.", resume="fixed")

    # --- Alignment -----------------------------------------------------------------------------------------------
    alignment: tuple[Literal["none", "vae", "repa", "sra"], ...] = option(
        ("vae",),
        "Representation alignment, one method or several: `vae` is VAE-REPA, `repa` aligns to a vision encoder (REPA), `sra` "
        "to the average of the weights (SRA), `none` is the plain transformer. The options below that differ by method take one "
        "value for all, or one per method, in order; there `none` leaves a method its default.",
        resume="fixed",
        group="Alignment",
    )
    alignment_block: tuple[int | None, ...] | None = option(
        None,
        "Block whose output is aligned, counted from 1. Default of vae: 2 up to 12 blocks, 8 above; of repa: 4 up to 12, 8 "
        "above; of sra: 3 of 12, 6 of 24, 8 of 28, else after a quarter of the blocks.",
        resume="fixed",
    )
    alignment_weight: tuple[float | None, ...] | None = option(
        None,
        "Weight of the alignment loss (lambda). Default of vae: 1.0; of repa: 0.5; of sra: 0.5 with cosine, else 0.2. Where a "
        "text-to-image model is fine-tuned 0.2, falling to 0 by cosine until step 500.",
        resume="schedule",
    )
    alignment_loss: tuple[Literal["smooth_l1", "l1", "l2", "cosine"] | None, ...] | None = option(
        None,
        "Distance of head output and target; cosine is taken over the values of a token. Default of vae: smooth_l1; of repa "
        "and sra: cosine.",
        resume="schedule",
    )
    alignment_beta: tuple[float, ...] = option(
        (0.05,), "Where smooth_l1 turns from quadratic to linear.", resume="schedule"
    )
    alignment_layers: tuple[int | None, ...] | None = option(
        None, "Linear layers of the head. Default of vae: 5; of repa: 3; of sra: 2.", resume="fixed"
    )
    alignment_width: tuple[int | None, ...] | None = option(
        None,
        "Width of the head's inner layers. Default of vae and sra: twice the transformer's width; of repa: 2048.",
        resume="fixed",
    )
    alignment_t_range: tuple[float, ...] = option(
        (0.0, 1.0), "Only samples whose t lies in this range, two numbers, are aligned.", resume="schedule"
    )
    alignment_weight_schedule: tuple[Literal["constant", "linear", "cosine"], ...] = option(
        ("constant",), "How the weight falls to 0 at --alignment_stop_step.", resume="schedule"
    )
    alignment_stop_step: tuple[int | None, ...] | None = option(
        None, "After this step the head is dropped and training goes on without it. Default: never.", resume="schedule"
    )
    alignment_target: Literal[
        "latent",
        "velocity",
        "vae_mid_block",
        "vae_down_block_1",
        "vae_down_block_2",
        "vae_down_block_3",
        "vae_down_block_4",
    ] = option(
        "latent",
        "What `vae` aligns to: the latents, their velocity, or features of the VAE's encoder, which then runs twice.",
        resume="fixed",
    )
    alignment_encoder: str = option(
        "facebook/dinov2-base",
        "Vision transformer of transformers that `repa` aligns to: a Hub id or a folder of a DINOv2, DINOv3, CLIP, SigLIP or "
        "their like, with its image processor.",
        resume="content",
    )
    alignment_irepa: bool = option(
        False,
        "iREPA: a 3x3 convolution as head of `repa`, and its target normalised per channel over the tokens of each image.",
        resume="fixed",
    )
    alignment_teacher_block: int | None = option(
        None,
        "Block of the average that `sra` aligns to. Default: 8 of 12, 16 of 24, 20 of 28, else after two thirds of the blocks.",
        resume="fixed",
    )
    alignment_normalize: bool = option(
        False,
        "Normalise the target of `vae` per channel, with statistics measured on the data. For VAEs whose latents are not near "
        "unit scale; with --text_conditioning there always.",
        resume="fixed",
    )

    # --- Training ------------------------------------------------------------------------------------------------
    seed: int = option(
        0, "Everything random follows from it: weights, order, noise, timesteps.", resume="fixed", group="Training"
    )
    train_batch_size: int | None = option(
        None, "Batch size per device. Default: 16, or what --global_batch_size asks of one device."
    )
    gradient_accumulation_steps: int | None = option(
        None, "Number of micro-batches per step. Default: 1, or what --global_batch_size needs."
    )
    global_batch_size: int | None = option(
        None, "Images per step over all devices. Default: batch size x devices x accumulation.", resume="fixed"
    )
    num_train_epochs: int = option(100, "Number of passes over the data, unless --max_train_steps is given.")
    max_train_steps: int | None = option(None, "Total number of training steps; overrides --num_train_epochs.")
    learning_rate: float = option(1e-4, "Learning rate after the warm-up.", resume="schedule")
    scale_lr: bool = option(False, "Multiply the learning rate by the global batch size.", resume="schedule")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant", "Learning rate schedule.", resume="schedule")
    lr_warmup_steps: int = option(
        0, "Warm-up steps of the schedule. The paper uses none (diffusers' scripts: 500).", resume="schedule"
    )
    lr_num_cycles: int = option(1, "Number of restarts of cosine_with_restarts.", resume="schedule")
    lr_power: float = option(1.0, "Power of the polynomial schedule.", resume="schedule")
    adam_beta1: float = option(0.9, "AdamW's beta1.", resume="schedule")
    adam_beta2: float = option(0.999, "AdamW's beta2.", resume="schedule")
    adam_weight_decay: float = option(
        0.0, "AdamW's weight decay. The paper uses none (diffusers' scripts: 1e-2).", resume="schedule"
    )
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", resume="schedule")
    max_grad_norm: float = option(
        1.0, "Largest gradient norm; larger gradients are scaled down. 0: no limit.", resume="schedule"
    )
    max_skipped_steps: int = option(
        20, "Stop after this many steps in a row whose gradients are not finite (each is skipped)."
    )
    use_ema: bool = option(True, "Keep an exponential moving average of the weights, and export it.", resume="fixed")
    ema_decay: tuple[float, ...] = option(
        (0.9999,),
        "Decay of the average; with several values the first is exported, all are kept and validated.",
        resume="fixed",
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

    # --- Validation ----------------------------------------------------------------------------------------------
    validation_steps: int | None = option(
        None, "Validate every so many steps. Default: at the end only.", group="Validation"
    )
    num_validation_images: int = option(16, "Pictures in a sample grid; 0 draws none.")
    validation_prompts: tuple[str, ...] = option((), "Prompts of the sample grids of a text-to-image model.")
    negative_prompt: str = option("", "Negative prompt of the sample grids.")
    validation_guidance_scale: float = option(4.0, "Guidance scale of the sample grids.")
    validation_num_inference_steps: int = option(50, "Sampling steps of the sample grids.")
    num_validation_samples: int = option(512, "Held-out images of the validation loss.")

    # --- Evaluation ----------------------------------------------------------------------------------------------
    eval_steps: int | None = option(
        None,
        "Draw images and measure FID, KID, precision and recall every so many steps, and at the end; needs "
        "requirements-evaluation.txt. Default: never.",
        group="Evaluation",
    )
    num_eval_samples: int = option(1000, "Images to draw; FID of fewer is larger, so compare equal numbers only.")
    eval_reference: str | None = option(
        None,
        "Statistics of real images (.npz, as `python -m vaerepa.evaluate` keeps or takes them). Default: of up to 10000 "
        "training images, measured once.",
    )
    eval_guidance_scale: float = option(1.0, "Guidance scale of these images; 1 is none.")
    eval_num_inference_steps: int = option(50, "Sampling steps of these images.")
    inception_weights: str | None = option(
        None, "File of the FID Inception's weights. Default: torch-fidelity downloads its own."
    )

    # --- Output --------------------------------------------------------------------------------------------------
    output_dir: str = option(
        "outputs/vaerepa", "Folder for checkpoints, pictures and the final pipeline.", group="Output"
    )
    logging_dir: str = option("logs", "Folder for the trackers' logs, inside the output folder.")
    logging_steps: int = option(50, "Log the mean of the losses and the throughput every so many steps.")
    report_to: str = option("tensorboard", "Tracker: tensorboard, any other that accelerate knows, or none.")
    dry_run: bool = option(False, "Print sizes, costs and schedule of this run, and exit.")
    profile: bool = option(False, "Profile ten steps into OUTPUT_DIR/profile, for chrome://tracing or Perfetto.")
    checkpointing_steps: int = option(500, "Save a checkpoint every so many steps.")
    checkpoint_failure: Literal["continue", "stop"] = option(
        "continue",
        "What to do when a checkpoint cannot be saved (a full disk, say): go on and try again at the next, or stop.",
    )
    checkpoints_total_limit: int | None = option(None, "Keep at most this many checkpoints; the oldest go first.")
    resume_from_checkpoint: str | None = option(
        None,
        "Checkpoint to go on from: its folder, `latest` (starts afresh when there is none), or hub:user/name, "
        "hub:user/name@revision for one that --hub_strategy checkpoint pushed.",
    )

    # --- Hub -----------------------------------------------------------------------------------------------------
    push_to_hub: bool = option(False, "Push the model to the Hub, in the background.", group="Hub")
    hub_model_id: str | None = option(
        None, "Repository to push to, user/name. Default: the name of --output_dir, in your own account."
    )
    hub_token: str | None = option(
        None,
        "Token for the Hub. Better: log in with `hf auth login`, or set HF_TOKEN. It is saved nowhere.",
        secret=True,
    )
    hub_private_repo: bool = option(False, "Make the repository a private one, when it is not there yet.")
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = option(
        "every_save",
        "What is pushed when, as in transformers' Trainer: the model at the end; or at every save; or with it the newest "
        "training state, as last-checkpoint/; or every one, as checkpoint-N/. Each push is a commit with the tag step-N.",
    )
    hub_revision: str | None = option(
        None, "Branch to push to, made when it is not there; its tags are named REVISION-step-N. Default: main."
    )
    hub_license: str = option("unknown", "Licence in the model card, as the Hub spells it, for example apache-2.0.")


FIELDS: dict[str, Field] = {f.name: f for f in fields(Options)}


def parse_options(arguments: list[str] | None = None) -> Options:
    """Reads the command line over the YAML file of --config over the defaults.

    Raises:
        OptionError: an unknown key or flag (the nearest one is named), or a value of the wrong type.
        SystemExit: after --help.
    """
    parser = _build_parser()
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise OptionError(_unknown_message("argument", unknown[0], [f"--{name}" for name in FIELDS]))
    given = vars(parsed)
    config = given.pop("config")
    values = read_config(config) if config else {}
    values.update((name, convert(name, value)) for name, value in given.items())
    return Options(**values)


def read_config(path: str) -> dict[str, Any]:
    """Reads a YAML file of options; each value takes its field's type.

    Raises:
        OptionError: no such file, no mapping, an unknown key or a value of the wrong type.
    """
    if not Path(path).is_file():
        raise OptionError(f"--config {path}: there is no such file.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise OptionError(f"--config {path} must hold lines of the form `option: value`.")
    for name in values:
        if name not in FIELDS:
            raise OptionError(f"--config {path}: {_unknown_message('option', str(name), list(FIELDS))}")
    return {name: convert(name, value) for name, value in values.items()}


def convert(name: str, value: Any) -> Any:
    """Turns what YAML or the command line gave into the type of the option `name`.

    Raises:
        OptionError: it cannot be.
    """
    kind = FIELDS[name].type
    try:
        return _convert(kind, value)
    except (TypeError, ValueError) as error:
        got = "something else" if FIELDS[name].metadata["secret"] else repr(value)
        raise OptionError(f"--{name}: expected {_describe(kind)}, got {got}.") from error


def write_config(options: Options, path: Path) -> None:
    """Writes the options as YAML that --config reads."""
    path.write_text(yaml.safe_dump(as_plain(options), sort_keys=False), encoding="utf-8")


def as_plain(options: Options) -> dict[str, Any]:
    """The options as a dictionary that JSON and YAML can hold, but for secrets."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(options).items()
        if not FIELDS[name].metadata["secret"]
    }


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


def options_table() -> str:
    """The README's table of options, in Markdown."""
    lines = []
    for spec in FIELDS.values():
        if spec.metadata["group"]:
            lines += ["", f"**{spec.metadata['group']}**", "", "| option | default | meaning |", "|---|---|---|"]
        flag = f"`--{spec.name}`" + (f", `--no_{spec.name}`" if spec.type is bool else "")
        default = spec.default
        if isinstance(default, tuple):
            default = " ".join(map(str, default))
        meaning = spec.metadata["help"] + _choices(spec.type)
        lines.append(f"| {flag} | {'' if default is None else f'`{default}`'} | {meaning.replace('|', '/')} |")
    return "\n".join(lines).strip()


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_vaerepa.py",
        description="Trains a latent diffusion transformer with VAE representation alignment.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=None, help="YAML file with options; the command line comes over it.")
    group = parser
    for spec in FIELDS.values():
        if spec.metadata["group"]:
            group = parser.add_argument_group(spec.metadata["group"])
        default = "" if spec.default is None else f" (default: {spec.default})"
        help_text = (spec.metadata["help"] + _choices(spec.type) + default).replace("%", "%%")
        if spec.type is bool:
            group.add_argument(f"--{spec.name}", action="store_true", help=help_text)
            group.add_argument(f"--no_{spec.name}", dest=spec.name, action="store_false", help=argparse.SUPPRESS)
        elif any(typing.get_origin(kind) is tuple for kind in _alternatives(spec.type)):
            group.add_argument(f"--{spec.name}", nargs="+", metavar="VALUE", help=help_text)
        else:
            group.add_argument(f"--{spec.name}", metavar="VALUE", help=help_text)
    return parser


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )


def _convert(kind: Any, value: Any) -> Any:
    kinds = _alternatives(kind)
    alone = value[0] if isinstance(value, list) and len(value) == 1 else value  # as the command line gives it
    if value is None or (type(None) in kinds and str(alone).lower() in ("none", "null")):
        if type(None) not in kinds:
            raise ValueError
        return None
    kind = next(k for k in kinds if k is not type(None))
    if typing.get_origin(kind) is Literal:
        value = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value  # YAML reads `no`
        if str(value) not in typing.get_args(kind):
            raise ValueError
        return str(value)
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(typing.get_args(kind), value)
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    if isinstance(value, bool | list | dict):
        raise ValueError
    if kind is int and not isinstance(value, int):
        if not float(value).is_integer():
            raise ValueError
        return int(float(value))  # 4e5, which YAML and shells hand over as text
    return kind(value)


def _convert_tuple(kinds: tuple[Any, ...], value: Any) -> tuple:
    several, may_be_empty = isinstance(value, list | tuple), kinds[0] is str
    values = value if several else [str(value)] if kinds[0] is str else str(value).split()
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(values)
    if len(values) != len(kinds) or not (values or may_be_empty):
        raise ValueError
    return tuple(_convert(kind, item) for kind, item in zip(kinds, values, strict=True))


def _describe(kind: Any) -> str:
    names = []
    for alternative in _alternatives(kind):
        if typing.get_origin(alternative) is Literal:
            names.append("one of " + ", ".join(typing.get_args(alternative)))
        elif typing.get_origin(alternative) is tuple:
            inner = typing.get_args(alternative)
            count = "one or more" if inner[-1] is Ellipsis else str(len(inner))
            each = f" of type {inner[0].__name__}" if isinstance(inner[0], type) else f", each {_describe(inner[0])}"
            names.append(f"{count} values{each}")
        elif alternative is not type(None):
            names.append({bool: "true or false", int: "a whole number", float: "a number", str: "text"}[alternative])
    return " or ".join(names)


def _choices(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f" One of {', '.join(typing.get_args(kind))}."
    return "".join(dict.fromkeys(map(_choices, typing.get_args(kind))))


def _unknown_message(what: str, name: str, known: list[str]) -> str:
    name = name.split("=")[0]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"there is no {what} `{name}`; did you mean `{nearest}`? `--help` lists them all."
