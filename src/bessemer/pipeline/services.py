"""Functions of later packages that the pipeline passes to stages of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.core.errors import ConfigError
from bessemer.core.packages import install_extra
from bessemer.core.stage import Services, TaskScorer

if TYPE_CHECKING:
    from bessemer.data.filters.perplexity import BitsPerByte


def open_language_model(folder: Path, device: str = "auto") -> BitsPerByte:
    """From texts to bits per byte under the model of a folder.

    Raises ConfigError on a machine that lacks what models need, ArtefactError where the folder holds none.
    """
    try:
        from bessemer.evaluation.perplexity import open_document_scorer
    except ImportError as error:
        raise ConfigError(
            f"clean.perplexity: {folder} is a model for PyTorch, and the package {error.name} is missing on this machine: "
            f"{install_extra('train')}"
        ) from None
    return open_document_scorer(folder, device).bits_per_byte


def card_flops(device_name: str) -> float | None:
    """FLOP/s that a GPU of this name promises in bfloat16; None when it is unknown."""
    from bessemer.scaling.hardware import card_of_device

    card = card_of_device(device_name)
    return None if card is None else card.flops


def continuations(model: Any, tokenizer_folder: Path, prompts: list[str]) -> list[str]:
    """What a model in training writes after each prompt, the same whenever it is asked: shown in the report.

    It is sampled, since the likeliest tokens of a small model run in a circle.
    """
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.sampler import SamplingParams
    from bessemer.tokenization.tokenizer import load_tokenizer

    engine = Engine(model, load_tokenizer(tokenizer_folder))
    sampling = SamplingParams(max_tokens=96, temperature=0.7, top_p=0.9, seed=0)
    return [completion.text for completion in engine.generate(prompts, sampling)]


def open_tasks(names: Sequence[str], data: Path | None, limit: int) -> TaskScorer:
    """Tasks that a model answers while it is trained; raises as `OpenTasks`."""
    from bessemer.evaluation.in_training import open_tasks

    return open_tasks(names, data, limit)


#: What the pipeline passes to the stages.
SERVICES = Services(open_language_model, continuations, card_flops, open_tasks)
