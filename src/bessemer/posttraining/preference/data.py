"""What the stage `preference` learns from: pairs, or single answers, packed and split by prompt, and the objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bessemer.core.errors import SourceError
from bessemer.posttraining.dataset import prompt_key, read_examples
from bessemer.posttraining.formats import as_labelled_answers
from bessemer.posttraining.made import data_path
from bessemer.posttraining.pairs import gather_pairs
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.kto import KTOObjective
from bessemer.posttraining.preference.labelled import pack_answers
from bessemer.posttraining.preference.losses import PairLossSettings
from bessemer.posttraining.preference.objective import PreferenceObjective
from bessemer.posttraining.preference.packing import can_share_prompts, pack_pairs
from bessemer.posttraining.preference.registry import PAIR_LOSSES
from bessemer.posttraining.splits import opening_of, split_examples
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.data.batches import Batch
from bessemer.training.objectives import Objective


@dataclass(frozen=True)
class PreferenceData:
    """Packed examples of a run, and the objective that learns from them.

    name: of an example, in the plural. longest: tokens within which an answer must end. left_out: a sentence on each kind of
    examples to train on that are not, or not whole. figures: their numbers.
    """

    name: str
    objective: Objective
    needs_reference: bool
    longest: int
    training: Batch
    training_examples: int
    validation: Batch
    validation_examples: int
    left_out: list[str]
    figures: dict[str, int]

    @property
    def rows(self) -> int:
        """Rows to train on."""
        return self.training.tokens_BT.shape[0]


def paired_data(config: PreferenceConfig, model: Path, folder: Path, made: Mapping[str, Path], seed: int) -> PreferenceData:
    """The pairs that the settings name, packed for the model of a folder, with the objective of their loss. Raises
    SourceError."""
    loss = PAIR_LOSSES.find(config.loss).load()
    training, held_out = gather_pairs(config.data, folder, made, config.validation_share, seed)
    if not loss.soft_labels and any(pair.confidence < 1 for pair in (*training, *held_out)):
        raise SourceError(
            f"the pairs have a confidence, which the loss {config.loss} cannot use; take sigmoid, sigmoid_norm or simpo, or "
            "leave the column out"
        )
    tokenizer, shares = load_tokenizer(model), can_share_prompts(config, model)
    packed, validation = (
        pack_pairs(some, tokenizer, config.context_length, config.truncate, shares_prompts=shares)
        for some in (training, held_out)
    )
    settings = PairLossSettings(config.beta, config.label_smoothing, config.margin)
    return PreferenceData(
        name="pairs",
        objective=PreferenceObjective(loss, settings, config.next_token_weight),
        needs_reference=loss.needs_reference,
        longest=config.context_length // 2,
        training=packed.batch,
        training_examples=packed.pairs,
        validation=validation.batch,
        validation_examples=validation.pairs,
        left_out=packed.sentences(f"{len(training):,} pairs"),
        figures=packed.figures,
    )


def labelled_data(config: PreferenceConfig, model: Path, folder: Path, made: Mapping[str, Path], seed: int) -> PreferenceData:
    """The single answers that the settings name, those of pairs among them, packed for KTO. Raises SourceError."""
    rows = [row for name in config.data for row in read_examples(data_path(name, folder, made), as_labelled_answers)]
    answers = [answer for row in rows for answer in row]
    training, held_out = split_examples(answers, lambda one: opening_of(one.answered), config.validation_share, seed)
    if len({prompt_key(one.answered.prompt) for one in held_out}) == 1:
        # with a single prompt there is nothing to compare its answers with
        training, held_out = answers, []
    tokenizer = load_tokenizer(model)
    packed, validation = (pack_answers(some, tokenizer, config.context_length) for some in (training, held_out))
    return PreferenceData(
        name="answers",
        objective=KTOObjective(config.beta, config.desirable_weight, config.undesirable_weight),
        needs_reference=True,
        longest=config.context_length,
        training=packed.batch,
        training_examples=packed.answers,
        validation=validation.batch,
        validation_examples=validation.answers,
        left_out=packed.counts.sentences(f"{len(training):,} answers"),
        figures=packed.counts.figures,
    )
