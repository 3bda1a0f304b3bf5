"""The stages that a recipe may name, and the functions of later packages that they get.

Stages are those of our packages in the order in which data flows, and those of other packages. `SERVICES` holds what a stage
needs from a package above its own, such as samples of the engine during training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.core.environment import install_extra
from bessemer.core.errors import ConfigError
from bessemer.core.registry import Plugin, Registry
from bessemer.core.stage import Services, StageSpec, TaskScorer
from bessemer.data import specs as data
from bessemer.evaluation import specs as evaluation
from bessemer.model import specs as model
from bessemer.posttraining import specs as posttraining
from bessemer.retrieval import specs as retrieval
from bessemer.safety.memorisation import specs as memorisation
from bessemer.safety.redteam import specs as redteam
from bessemer.tokenization import specs as tokenization
from bessemer.training import specs as training

if TYPE_CHECKING:
    from bessemer.data.filters.word_model import BitsPerByte


_PACKAGES = (data, tokenization, model, training, retrieval, memorisation, posttraining, evaluation, redteam)
_OWN = tuple(spec for package in _PACKAGES for spec in package.STAGES)

REGISTRY: Registry[StageSpec] = Registry(
    "stage", "bessemer.stages", (Plugin(spec.kind, spec.summary, spec, spec.config) for spec in _OWN)
)


class _Stages(MutableMapping[str, StageSpec]):
    """The registry's stages by kind; those of other packages are loaded on access."""

    def __init__(self, own: Iterable[StageSpec]) -> None:
        self._specs = {spec.kind: spec for spec in own}

    def __getitem__(self, kind: str) -> StageSpec:
        if kind in self._specs:
            return self._specs[kind]
        spec = REGISTRY[kind].load()
        if not isinstance(spec, StageSpec) or spec.kind != kind:
            raise ConfigError(f"the entry point {kind!r} of {REGISTRY.group} holds no stage of that kind")
        return spec

    def __setitem__(self, kind: str, spec: StageSpec) -> None:
        self._specs[kind] = spec

    def __delitem__(self, kind: str) -> None:
        del self._specs[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self._specs or kind in REGISTRY

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._specs, *REGISTRY]))

    def __len__(self) -> int:
        return len(list(iter(self)))


#: Every stage by its kind.
STAGES: MutableMapping[str, StageSpec] = _Stages(_OWN)


def example_of(kind: str) -> str:
    """A line that adds a stage which makes a kind of artefact to a recipe; empty where none is known."""
    return next((spec.example for spec in STAGES.values() if kind in spec.makes and spec.example), "")


def open_language_model(folder: Path, device: str = "auto") -> BitsPerByte:
    """A function from texts to their bits per byte under the model of a folder.

    Raises ConfigError where a package is missing, ArtefactError where the folder holds no model.
    """
    try:
        from bessemer.evaluation.bits_per_byte import open_document_scorer
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
    """A text of a model in training after each prompt, with a fixed seed, for the report.

    Sampled, since greedy decoding of a small model repeats itself.
    """
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.sampler import SamplingParams
    from bessemer.tokenization.tokenizer import load_tokenizer

    engine = Engine(model, load_tokenizer(tokenizer_folder))
    sampling = SamplingParams(max_tokens=96, temperature=0.7, top_p=0.9, seed=0)
    return [completion.text for completion in engine.generate(prompts, sampling)]


def open_tasks(names: Sequence[str], data: Path | None, limit: int) -> TaskScorer:
    """Tasks that a model answers while it is trained; raises as `OpenTasks`."""
    from bessemer.evaluation.tasks import open_tasks

    return open_tasks(names, data, limit)


#: What the pipeline passes to the stages.
SERVICES = Services(open_language_model, continuations, card_flops, open_tasks)
