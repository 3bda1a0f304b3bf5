"""What a step on pictures takes of memory, said before anything is measured or trained.

The decoder's part is that of a fine-tuning (`sft.finetune_memory`), the encoder's and the projector's are counted from their
modules (`model.vision.costs`). Of a part that does not learn, neither gradients nor states of the optimizer are counted. States
are AdamW's: of an optimizer that keeps fewer it is less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from bessemer.core.environment import free_memory_bytes
from bessemer.core.metrics import size
from bessemer.model.device import choose_device
from bessemer.model.vision.config import VisionLanguageConfig
from bessemer.model.vision.costs import PicturesOfStep, training_memory
from bessemer.model.vision.folder import read_vision_language
from bessemer.model.vision.trained import VisionDecoder
from bessemer.posttraining.sft.finetune_memory import TuningMemory, TuningShape, tuning_memory
from bessemer.training.config import LoopConfig
from bessemer.training.data.batch import Batch
from bessemer.training.data.pictures import PictureTable

#: Bytes of a number in float32, and of one in training with its gradient and AdamW's two means.
_FLOAT32, _GRADIENT_AND_MEANS = 4.0, 12.0
#: Parts that a line names, at most.
_NAMED = 4


def pictures_of_rows(batch: Batch, rows: int, config: VisionLanguageConfig) -> PicturesOfStep:
    """The most that `rows` rows of a packed batch show. A picture that stands in a row twice is encoded once."""
    if batch.pictures is None or batch.vector_of_token_BT is None or not len(batch.tokens_BT):
        return PicturesOfStep()
    table, counts = batch.pictures, []
    for vectors_T in batch.vector_of_token_BT.numpy():
        seen = vectors_T[vectors_T >= 0]
        needed = np.unique(np.searchsorted(table.first_vectors, seen, side="right") - 1)
        counts.append((_patches(table, needed, config), float(len(seen))))
    patches, vectors = (sum(sorted(column, reverse=True)[:rows]) for column in zip(*counts, strict=True))
    return PicturesOfStep(patches, vectors)


def pictures_of_prompts(
    table: PictureTable, prompts: Sequence[np.ndarray], count: int, copies: int, config: VisionLanguageConfig
) -> PicturesOfStep:
    """The most that `count` prompts show, each of which stands in `copies` rows. prompts: the numbers of their tokens' vectors;
    -1 for text."""
    counts = []
    for vectors_T in prompts:
        seen = vectors_T[vectors_T >= 0]
        needed = np.unique(np.searchsorted(table.first_vectors, seen, side="right") - 1)
        counts.append((_patches(table, needed, config), float(len(seen))))
    if not counts:
        return PicturesOfStep()
    patches, vectors = (sum(sorted(column, reverse=True)[:count]) for column in zip(*counts, strict=True))
    return PicturesOfStep(patches, copies * vectors)


def _patches(table: PictureTable, needed: np.ndarray, config: VisionLanguageConfig) -> float:
    vision = config.vision
    if table.sizes is not None:
        return float(table.grids[needed].prod(1).sum() * vision.merge_size**2)
    return float(len(needed) * (vision.grid**2 + vision.has_class_token))


def step_memory(
    config: LoopConfig, vision: VisionLanguageConfig, pictures: PicturesOfStep, device: str = "cpu", *, models_beside: int = 0
) -> TuningMemory:
    """The memory of a step in one process. pictures: of a micro-batch. models_beside: whole models that are held besides, as a
    reference is."""
    rows = min(config.micro_batch_size or config.batch_size, config.batch_size)
    half = config.dtype in ("bfloat16", "float16")
    shape = TuningShape(
        rows,
        config.context_length,
        2 if half else 4,
        device,
        micro_batches=-(-config.batch_size // rows),
        recompute=config.activation_checkpointing,
        wide_base=True,
    )
    adapter = config.low_rank
    own = {name: parameter.numel() for name, parameter in VisionDecoder.empty(vision).named_parameters()}
    learnt = {
        name: count
        for name, count in own.items()
        if adapter is None and not any(fnmatchcase(name, pattern) for pattern in config.freeze)
    }
    of_decoder = {name: count for name, count in own.items() if not name.startswith("vision.")}
    frozen = sum(count for name, count in of_decoder.items() if name not in learnt)
    if adapter is not None:
        decoder = tuning_memory(vision.text, "lora", replace(shape, rank=adapter.rank, patterns=tuple(adapter.modules)))
    elif frozen == sum(of_decoder.values()):
        decoder = tuning_memory(vision.text, "lora", replace(shape, rank=0))
    else:
        decoder = _less(tuning_memory(vision.text, "full", shape), frozen)
    standing = sum(decoder.parts.get(part, 0.0) for part in ("weights", "adapter", "gradients", "optimizer states"))
    seeing = training_memory(
        vision,
        pictures,
        encoder=any(name.startswith("vision.encoder.") for name in learnt),
        projector=any(name.startswith("vision.projector.") for name in learnt),
        dtype_bytes=shape.dtype_bytes,
    )
    beside = models_beside * _FLOAT32 * sum(own.values())
    parts = {
        **decoder.parts,
        "encoder of pictures": seeing.standing + seeing.gradients,
        "activations of pictures": seeing.kept,
        "models beside": beside,
    }
    peak = seeing.peak_with(decoder.peak, standing, accumulates=shape.micro_batches > 1) + beside
    return TuningMemory({name: needed for name, needed in parts.items() if needed}, peak)


def _less(memory: TuningMemory, frozen: int) -> TuningMemory:
    """The memory without gradients and means of some weights."""
    parts = dict(memory.parts)
    parts["gradients"] -= _FLOAT32 * frozen
    parts["optimizer states"] = parts.get("optimizer states", 0.0) - 2 * _FLOAT32 * frozen
    return TuningMemory(parts, memory.peak - _GRADIENT_AND_MEANS * frozen)


def say_step_memory(
    say: Callable[[str], None],
    config: LoopConfig,
    model: Path,
    batch: Batch,
    device: str,
) -> None:
    """One line about the memory of a step on a batch's rows, in the units of a plan."""
    vision = read_vision_language(model)
    rows = min(config.micro_batch_size or config.batch_size, config.batch_size)
    say(memory_line(step_memory(config, vision, pictures_of_rows(batch, rows, vision), choose_device(device).type)))


def memory_line(memory: TuningMemory) -> str:
    """The memory of a step, its largest parts, and what is free of this machine's where that is less."""
    largest = sorted(memory.parts.items(), key=lambda part: -part[1])[:_NAMED]
    seeing = [(name, needed) for name, needed in memory.parts.items() if "pictures" in name and (name, needed) not in largest]
    named = ", ".join(f"{name} {size(needed)}" for name, needed in [*largest, *seeing])
    free = free_memory_bytes()
    less = ""
    if free is not None and memory.peak > free:
        less = f"; {size(free)} are free: take a smaller micro_batch_size, or activation_checkpointing: full"
    return f"  a step takes about {size(memory.peak)} of memory ({named}){less}"
