"""Prompts: from captions to the condition of a text-to-image transformer, by the text encoders or from a cache."""

import logging
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from vaerepa.data.batch import to_device
from vaerepa.data.source import all_captions
from vaerepa.errors import OptionError
from vaerepa.families import TextFamily
from vaerepa.files import digest_of, digest_of_weights, replacing
from vaerepa.processes import check_shared, on_main_process
from vaerepa.randomness import draw_uniform

logger = logging.getLogger(__name__)

Embedding = dict[str, torch.Tensor]  # of one prompt
MAX_RECENT = 512
PROMPTS_PER_FILE = 256


class Prompts:
    """Encodes prompts by the text encoders of a stock pipeline, and keeps recent embeddings in memory.

    Args:
        pipeline: the stock pipeline; its text encoders leave it with `replace_encoders`.
        max_sequence_length: in tokens.
        trained: those of the text encoders that train, by name; prompts are then encoded anew each time.
    """

    def __init__(
        self,
        family: TextFamily,
        pipeline: DiffusionPipeline,
        max_sequence_length: int,
        device: torch.device,
        trained: dict[str, nn.Module] | None = None,
    ):
        self.family = family
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.device = device
        self.trained = trained or {}
        self.cache: EmbeddingsCache | None = None
        self._recent: OrderedDict[str, Embedding] = OrderedDict()
        self._cuts = _CountOfCuts()

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """Text encoders by name; empty after `replace_encoders`."""
        parts = {name: getattr(self.pipeline, name) for name in self.family.text_components}
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    def condition(self, prompts: Sequence[str]) -> Any:
        """The condition that the transformer takes, on the device, one sample for each prompt.

        Where torch records gradients, it has those of text encoders that train, and these drop out.
        """
        if not self.trained:
            return self.family.collate([self.embed(prompt) for prompt in prompts])
        for encoder in self.trained.values():
            encoder.train(torch.is_grad_enabled())
        embeddings = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
        return self.family.collate([embeddings[prompt] for prompt in prompts])

    def embed(self, prompt: str) -> Embedding:
        """Embedding of one prompt, on the device; it does not depend on other prompts."""
        if prompt not in self._recent:
            with torch.no_grad():
                embedding = self.cache.read(prompt) if self.cache else self._encode(prompt)
            self._recent[prompt] = {name: to_device(tensor, self.device) for name, tensor in embedding.items()}
            if len(self._recent) > MAX_RECENT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(prompt)
        return self._recent[prompt]

    def replace_encoders(self, folder: Path, prompts: Iterable[str], accelerator: Accelerator) -> None:
        """Encodes all prompts into a cache, on all processes, and removes the text encoders from the pipeline.

        Raises:
            OptionError: the folder cannot be written, or prompts are missing and not all processes see what the first one writes.
        """
        cache = EmbeddingsCache(folder / f"text-{self._key()}")
        wanted = set(prompts)
        # of one process: the next may see what another run has written meanwhile
        missing = on_main_process(accelerator, lambda: sorted(prompt for prompt in wanted if prompt not in cache))
        if any(gather_object([any(prompt not in cache for prompt in wanted)])):
            check_shared(cache.folder, accelerator)
        if missing and accelerator.is_main_process:
            logger.info(f"encoding {len(missing)} prompts into {cache.folder}")
        own = missing[accelerator.process_index :: accelerator.num_processes]
        for start in tqdm(
            range(0, len(own), PROMPTS_PER_FILE),
            desc="prompts",
            disable=not accelerator.is_local_main_process or not own,
        ):
            batch = own[start : start + PROMPTS_PER_FILE]
            with torch.no_grad():
                cache.write({prompt: self._encode(prompt) for prompt in batch})
        self.report_cuts()
        accelerator.wait_for_everyone()
        cache.reload()
        self.cache = cache
        self.pipeline.register_modules(**dict.fromkeys(self.encoders))

    def report_cuts(self) -> None:
        """Logs how many of the prompts encoded so far were too long, instead of a warning for each."""
        if self._cuts.prompts:
            logger.warning(
                f"{self._cuts.prompts} of {self._cuts.encoded} prompts that were encoded are longer than a text encoder takes, "
                "and were cut for it"
            )
        self._cuts.prompts = self._cuts.encoded = 0

    def _encode(self, prompt: str) -> Embedding:
        with self._cuts.watch(type(self.pipeline).__module__, "transformers.tokenization_utils_base"):
            embedding = self.family.encode_prompts(self.pipeline, [prompt], self.max_sequence_length)[0]
        return {name: tensor.clone() for name, tensor in embedding.items()}

    def _key(self) -> str:
        parts = [digest_of_weights(encoder) for encoder in self.encoders.values()]
        parts += [type(self.pipeline).__name__, str(self.max_sequence_length)]
        parts += [str(encoder.dtype) for encoder in self.encoders.values()]
        return digest_of(" ".join(parts).encode(), size=8)


class _CountOfCuts(logging.Filter):
    """Suppresses the warnings of stock pipelines and tokenizers that a prompt is too long, and counts these prompts."""

    def __init__(self):
        super().__init__()
        self.encoded = self.prompts = 0
        self._is_cut = False

    @contextmanager
    def watch(self, *names: str) -> Iterator[None]:
        """Counts warnings of these loggers while one prompt is encoded."""
        loggers = [logging.getLogger(name) for name in names]
        self._is_cut = False
        for one in loggers:
            one.addFilter(self)
        try:
            yield
        finally:
            for one in loggers:
                one.removeFilter(self)
        self.encoded += 1
        self.prompts += self._is_cut

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "was truncated" not in message and "Token indices sequence length" not in message:
            return True
        self._is_cut = True
        return False


class EmbeddingsCache:
    """Embeddings by the hash of their prompt, in safetensors files that are mapped into memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"--cache_text_embeddings: {folder} cannot be used: {error.strerror}.") from error
        self.reload()

    def __contains__(self, prompt: str) -> bool:
        return _hash(prompt) in self._file_of

    def reload(self) -> None:
        """Loads what all processes have written so far."""
        self._file_of: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                logger.warning(f"{path} is damaged, and its prompts are encoded again: {error}")
                continue
            self._file_of |= {key.split("/")[0]: file for key in file.keys()}  # noqa: SIM118  a safe_open is no dictionary

    def read(self, prompt: str) -> Embedding:
        """Embedding of a prompt, which the cache must hold, on the CPU."""
        key = _hash(prompt)
        file = self._file_of[key]
        return {name.split("/")[1]: file.get_tensor(name) for name in file.keys() if name.startswith(key)}  # noqa: SIM118

    def write(self, embeddings: dict[str, Embedding]) -> None:
        """Writes embeddings into a new file.

        Raises:
            OptionError: the file cannot be written.
        """
        tensors = {
            f"{_hash(prompt)}/{name}": tensor.cpu().contiguous()
            for prompt, embedding in embeddings.items()
            for name, tensor in embedding.items()
        }
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            with replacing(path) as unfinished:
                save_file(tensors, unfinished)
        except (OSError, SafetensorError) as error:
            raise OptionError(f"--cache_text_embeddings: {path} cannot be written: {error}.") from error


def choose_prompt(caption: str | list[str] | None, drop: bool, seed: int | None, sample_index: int) -> str:
    """The prompt of a sample: the empty one where its caption is dropped, else one of its captions.

    Args:
        caption: as the data have it.
        seed: of the choice among several captions; None takes the first.
    """
    if drop:
        return ""
    captions = all_captions(caption)
    return captions[0] if seed is None else choose_caption(captions, seed, sample_index)


def choose_caption(captions: list[str], seed: int, sample_index: int) -> str:
    """One of the captions of a sample, at random: another one in each epoch."""
    return captions[int(draw_uniform(seed, "caption", sample_index) * len(captions))]


def _hash(prompt: str) -> str:
    return digest_of(prompt.encode())
