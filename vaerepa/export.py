"""Export: what a checkpoint holds for others, a whole stock pipeline or a LoRA alone."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from torch import nn

from vaerepa import frozen, lora
from vaerepa.families import Family
from vaerepa.files import link_tree
from vaerepa.layout import PIPELINE_INDEX
from vaerepa.model_card import LORA_TEMPLATE
from vaerepa.weights import Tensors, with_weights, without_weights


class Export(ABC):
    """Writes what is trained in the form that stock diffusers loads."""

    how_to_load: str
    ships_heads: ClassVar[bool]  # whether the alignment heads lie beside the result
    rank: int | None = None  # of a LoRA
    tags: tuple[str, ...] = ()  # of the model card

    @abstractmethod
    def write_frozen_parts(self, anew: bool) -> None:
        """Writes what does not train into the output folder, once or, for a new run, `anew`; each checkpoint links it."""

    def release_frozen_parts(self) -> None:
        """Forgets what does not train, so that text encoders may leave memory; every process must call it."""

    @abstractmethod
    def write(self, folder: Path, weights: Tensors) -> None:
        """Writes a checkpoint's files of the pipeline; a thread beside the training may call it.

        Args:
            weights: the trained ones on the CPU, by their names in training form.
        """

    def parameters(self, transformer: nn.Module) -> Iterable[nn.Parameter]:
        """Those of the transformer's parameters that `write` exports."""
        return transformer.parameters()


class StockExport(Export):
    """A whole stock pipeline.

    Args:
        pipeline: the stock pipeline around the transformer in training form; its text encoders may leave it later.
        frozen_parts: VAE, text encoders and tokenizers by their names in the pipeline; None where it has none.
        pipeline_file: code of the opt-in pipeline to lay beside it.
    """

    how_to_load, ships_heads = "loads with from_pretrained", True

    def __init__(
        self,
        output_dir: Path,
        family: Family,
        pipeline: DiffusionPipeline,
        frozen_parts: dict[str, Any],
        pipeline_file: Path | None = None,
    ):
        self.output_dir = output_dir
        self.family = family
        self.transformer = without_weights(pipeline.transformer)
        self.stock_transformer = family.stock_skeleton(pipeline.transformer)
        self.scheduler = pipeline.scheduler
        self.index = pipeline.to_json_string()
        self.frozen_parts = {name: part for name, part in frozen_parts.items() if part is not None}
        self.pipeline_file = pipeline_file

    def write_frozen_parts(self, anew: bool) -> None:
        frozen.write(self.output_dir, self.frozen_parts, anew)
        if self.pipeline_file:
            shutil.copyfile(self.pipeline_file, self.output_dir / self.pipeline_file.name)

    def release_frozen_parts(self) -> None:
        self.frozen_parts = dict.fromkeys(self.frozen_parts)

    def write(self, folder: Path, weights: Tensors) -> None:
        (folder / PIPELINE_INDEX).write_text(self.index, encoding="utf-8")
        stock_weights = self.family.stock_weights(with_weights(self.transformer, weights))
        with_weights(self.stock_transformer, stock_weights).save_pretrained(folder / "transformer")
        self.scheduler.save_pretrained(folder / "scheduler")
        for name in self.frozen_parts:
            link_tree(self.output_dir / name, folder / name)
        if self.pipeline_file:
            shutil.copyfile(self.pipeline_file, folder / self.pipeline_file.name)


class LoRAExport(Export):
    """The layers of an adapter alone, for load_lora_weights or for peft.

    Args:
        pipeline_class: the stock pipeline that loads them.
        parts: the modules with the layers, as `lora.add_lora` has them.
        options: its rank, kind and format.
    """

    ships_heads = False  # heads are larger than a LoRA

    def __init__(self, pipeline_class: type[DiffusionPipeline], parts: dict[str, nn.Module], options: lora.LoRAOptions):
        self.pipeline_class = pipeline_class
        self.parts = parts
        self.options = options
        self.rank = options.rank
        self.how_to_load = f"is a {lora.NAMES[options.adapter]}; its README.md shows how to load it"
        self.tags = (*(("lora",) if options.adapter == "dora" else ()), options.adapter, LORA_TEMPLATE)

    def write_frozen_parts(self, anew: bool) -> None:
        """Writes nothing: the base model is not ours."""

    def write(self, folder: Path, weights: Tensors) -> None:
        lora.save_lora(folder, self.parts, weights, self.pipeline_class, self.options)

    def parameters(self, transformer: nn.Module) -> Iterable[nn.Parameter]:
        parts = chain.from_iterable(part.parameters() for part in self.parts.values())
        return (parameter for parameter in parts if parameter.requires_grad)
