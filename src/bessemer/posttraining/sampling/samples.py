"""Prompts, samples of a policy, their batches, and their exchange between processes.

Of several processes, each tensor group completes its share of the prompts, and every process gets all groups.

Shapes: R samples, B rows, T tokens of a row, S sequences of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.core.errors import BessemerError
from bessemer.distributed.layout import Layout
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.inference.images import PicturePrompt
from bessemer.posttraining.data.encoding import RowCounts, Unrendered, encode_prompt
from bessemer.posttraining.data.formats import Answered, Message, Turns
from bessemer.posttraining.data.picture_encoding import READS_NONE, PictureEncoder, PromptPictures
from bessemer.posttraining.data.picture_rows import has_pictures, sources_in, text_of
from bessemer.posttraining.data.turns import RowError
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.data.packing import best_fit, pack_rows
from bessemer.training.model_roles import ModelRoles

#: Keys of a batch's values per token: the sampler's log-probabilities; advantages.
SAMPLER, ADVANTAGES = "sampler_log_probs", "advantages"


@dataclass(frozen=True)
class Prompt:
    """A prompt: messages to answer, or a text to continue.

    columns: passed to the rewards. stop: texts at which an answer ends. begin: whether a text gets the begin token even if the
    tokenizer does not add one. tools: those that may be called. folder: where the paths of its pictures begin; pictures: these,
    once they were read (`seen_by`).
    """

    turns: Turns
    columns: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    begin: bool = False
    tools: tuple[Message, ...] = ()
    folder: Path | None = field(default=None, compare=False)
    pictures: PromptPictures | None = field(default=None, compare=False, repr=False)

    def seen_by(self, tokenizer: Tokenizer, pictures: PictureEncoder | None) -> Prompt:
        """The prompt with its pictures read; as it is where it has none. pictures: of a model that reads them. Raises RowError
        for a picture that cannot be read, and for a model that reads none."""
        if isinstance(self.turns, str) or not has_pictures(self.turns):
            return self
        asked = encode_prompt(self.turns, tokenizer, self.tools, pictures=True)
        if pictures is None:
            raise RowError(READS_NONE)
        return replace(self, pictures=pictures.of_prompt(self.turns, self.folder, asked))

    def request(self, ids: list[int]) -> list[int] | PicturePrompt:
        """What an engine is asked. ids: of `encoded`."""
        return ids if self.pictures is None else PicturePrompt(self.pictures.asked, self.pictures.pictures)

    def encoded(self, tokenizer: Tokenizer) -> list[int]:
        """Its token ids, up to where the answer begins; of pictures, as many as these have vectors."""
        if self.pictures is not None:
            return list(self.pictures.ids)
        ids = encode_prompt(self.turns, tokenizer, self.tools)
        missing = self.begin and isinstance(self.turns, str) and not tokenizer.begin_ids
        return [tokenizer.bos_id, *ids] if missing or not ids else ids

    def answered(self, text: str) -> Answered:
        """This prompt with an answer."""
        answer = text if isinstance(self.turns, str) else ({"role": "assistant", "content": text},)
        return Answered(self.turns, answer, self.tools)

    @property
    def text(self) -> str:
        """Readable form: the text, or every message with its role."""
        if isinstance(self.turns, str):
            return self.turns
        return "\n\n".join(f"{one['role']}: {_readable(one)}" for one in self.turns)


def _readable(message: Message) -> str:
    """The text of a message, behind a mark for each of its pictures."""
    return "[picture] " * len(sources_in([message])) + text_of(message.get("content"))


def fitting_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, longest: int, pictures: PictureEncoder | None = None
) -> list[tuple[Prompt, list[int]]]:
    """The prompts of at most `longest` tokens, with their tokens. Prompts that the model's chat template refuses, or whose
    pictures cannot be read, are left out; raises SourceError where these are many. pictures: as in `Prompt.seen_by`."""
    fitting: list[tuple[Prompt, list[int]]] = []
    unrendered: list[Unrendered] = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            seen = prompt.seen_by(tokenizer, pictures)
            ids = seen.encoded(tokenizer)
        except RowError as error:
            unrendered.append(Unrendered(f"prompt {number:,}", str(error)))
            continue
        if len(ids) <= longest:
            fitting.append((seen, ids))
    RowCounts(longest, unrendered=tuple(unrendered), total=len(prompts)).check("prompts")
    return fitting


@dataclass(frozen=True)
class Sample:
    """A completion. ids: of prompt and completion; log_probs: of the completion's tokens, as sampled, an end token among them.
    is_cut: whether it was stopped at the most tokens. is_own: for each id, whether the policy wrote it; None: it wrote the
    whole completion. Tokens of others, for example of tools' results, are no targets. versions: for each token of the
    completion, the version of the weights that sampled it; None: that of the rollout."""

    prompt: Prompt
    ids: Sequence[int]
    prompt_length: int
    log_probs: Sequence[float]
    text: str
    is_cut: bool
    is_own: Sequence[bool] | None = None
    versions: Sequence[int] | None = None

    @property
    def places(self) -> np.ndarray:
        """Positions of the completion's tokens among the ids."""
        return np.arange(self.prompt_length, len(self.ids)) if self.is_own is None else np.flatnonzero(self.is_own)

    @property
    def completion_ids(self) -> Sequence[int]:
        """The completion's tokens."""
        return [self.ids[place] for place in self.places]

    def example(self, *, is_kept: bool = True, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Inputs from position `start` of the prompt on, and targets: the completion's tokens if it is kept."""
        ids = np.asarray(self.ids, np.int64)
        targets = np.full(len(ids) - 1, IGNORE_INDEX, np.int64)
        if is_kept:
            targets[self.places - 1] = ids[self.places]
        return self._with_pictures(ids)[start:-1], targets[start:]

    def _with_pictures(self, ids: np.ndarray) -> np.ndarray:
        """The ids with the tokens of pictures as `PictureEncoder` writes them."""
        pictures = self.prompt.pictures
        if pictures is None:
            return ids
        vectors = np.concatenate([pictures.vectors, np.full(len(ids) - len(pictures.vectors), -1)])
        return np.where(vectors < 0, ids, -1 - vectors)

    def continues(self, other: Sample) -> bool:
        """Whether both complete the same tokens."""
        first = self.prompt_length
        if first != other.prompt_length or self.ids[:first] != other.ids[:first]:
            return False
        # pictures of one size have the same tokens
        own, others = (one.prompt.pictures for one in (self, other))
        if own is None or others is None:
            return own is others
        return own is others or np.array_equal(own.vectors, others.vectors)


@dataclass(frozen=True)
class Packed:
    """A batch, and where each sample is in it. rows_R, columns_R: its place in `per_sequence`. ends_R: the position in its row
    of its last token that can have a target."""

    batch: Batch
    rows_R: np.ndarray
    columns_R: np.ndarray
    ends_R: np.ndarray

    @property
    def samples(self) -> int:
        """R."""
        return len(self.rows_R)

    def of_sequences(self, values_R: Tensor) -> Tensor:
        """Values of samples, (R,), arranged by sequences, (B, S); zero for sequences without a sample."""
        values_BS = values_R.new_zeros(self.batch.tokens_BT.shape[0], self.batch.sequences)
        values_BS[self.rows_R, self.columns_R] = values_R
        return values_BS

    def of_samples(self, values_BS: Tensor) -> Tensor:
        """Values of sequences, (B, S), arranged by samples, (R,)."""
        return values_BS[self.rows_R, self.columns_R]

    def with_values(self, per_token: Mapping[str, Tensor]) -> Packed:
        """Add values of tokens, (B, T) by name."""
        return replace(self, batch=self.batch.with_values(per_token=per_token))

    def with_advantages(self, advantages_R: Tensor) -> Packed:
        """Add one advantage for all tokens of a sample."""
        return self.with_values({ADVANTAGES: self.batch.of_tokens(self.of_sequences(advantages_R))})

    def target_values(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """The batch's values per token by name: for each sample, those at its completion's targets."""
        return [
            {name: values_BT[place] for name, values_BT in self.batch.per_token.items()} for place in self._targets(samples)
        ]

    def with_target_values(self, samples: Sequence[Sample], values: Sequence[Mapping[str, Tensor]]) -> Packed:
        """Add values that `target_values` returned for the same samples in another packing; zero elsewhere."""
        per_token = {
            name: values_N.new_zeros(self.batch.tokens_BT.shape) for name, values_N in (values[0] if values else {}).items()
        }
        for place, of_sample in zip(self._targets(samples), values, strict=True):
            for name, values_N in of_sample.items():
                per_token[name][place] = values_N
        return self.with_values(per_token)

    def _targets(self, samples: Sequence[Sample]) -> list[tuple[int, Tensor]]:
        """For each sample its row, and the columns at which the completion's tokens are targets."""
        return [
            (int(row), torch.from_numpy(end - sample.places[-1] + sample.places))
            for sample, row, end in zip(samples, self.rows_R, self.ends_R, strict=True)
        ]

    def at_ends(self, values_R: Tensor) -> Tensor:
        """Values of samples at their last tokens, (B, T); zero elsewhere."""
        values_BT = values_R.new_zeros(self.batch.tokens_BT.shape)
        values_BT[self.rows_R, self.ends_R] = values_R
        return values_BT

    @property
    def target_counts(self) -> Tensor:
        """The number of targets of each sample, (R,)."""
        return self.of_samples(self.batch.sequence_sums((self.batch.targets_BT != IGNORE_INDEX).float()))

    def means(self, values_BT: Tensor) -> Tensor:
        """Means of values of tokens, which must be zero outside targets, over each sample's targets; 0 for a sample without
        targets."""
        return self.of_samples(self.batch.sequence_sums(values_BT)) / self.target_counts.clamp(min=1)


#: Where completions share a prompt in a row, the longest row: this many tokens, or twice the longest sample if that is more. In
#: longer rows most of the attention is masked, which costs time.
_SHARED_ROW = 256


class _Together(NamedTuple):
    """Neighbouring samples of one prompt, which stands once in their row. first, number: their place among all samples and how
    many they are. size: tokens of the prompt and of all completions."""

    first: int
    number: int
    size: int


def pack_samples(
    samples: Sequence[Sample],
    is_kept: Sequence[bool],
    padding_id: int,
    layout: Layout = ALONE.layout,
    *,
    shared_row: int | None = None,
) -> Packed:
    """Samples in rows as long as the longest; as many rows as best-fit decreasing finds, and empty ones until a layout's ranks
    have equally many.

    Targets are the completions' tokens; samples that are not kept have none. With the sampler's log-probabilities by token.
    shared_row: neighbouring completions of the same tokens see one copy of them, in rows of at most this many tokens where
    no sample is longer; values and gradients are those of samples by themselves. A completion after the first begins at the
    prompt's last token, since a token has one target. None: each sample has its prompt.
    """
    capacity, together = _arranged(samples, layout, shared_row)
    row_of = best_fit([one.size for one in together], capacity)
    count = layout.row_count(int(row_of.max()) + 1)
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(count)]
    shared: list[list[int]] = [[] for _ in range(count)]
    rows_R, columns_R, ends_R = (np.zeros(len(samples), np.int64) for _ in range(3))
    filled = [0] * count
    sampled_BT = torch.zeros(count, capacity)
    for one, row in zip(together, row_of.tolist(), strict=True):
        prompt = samples[one.first].prompt_length - 1
        for place in range(one.first, one.first + one.number):
            sample, skipped = samples[place], 0 if place == one.first else prompt
            begin = filled[row] - skipped
            if is_kept[place]:
                sampled_BT[row, begin + sample.places - 1] = torch.tensor(sample.log_probs)
            rows_R[place], columns_R[place] = row, len(rows[row])
            rows[row].append(sample.example(is_kept=is_kept[place], start=skipped))
            shared[row].append(skipped)
            ends_R[place] = begin + sample.places[-1] - 1
            filled[row] = begin + len(sample.ids) - 1
    batch = pack_rows(rows, capacity, padding_id, shared)
    batch = replace(batch, per_token={SAMPLER: sampled_BT}, sequences=max(map(len, rows)))
    if batch.sequences == 1:
        # a row of one sample needs only the causal mask, which costs less than a document mask
        batch = replace(batch, positions_BT=None, document_ids_BT=None)
    return Packed(batch, rows_R, columns_R, ends_R)


def _arranged(samples: Sequence[Sample], layout: Layout, shared_row: int | None) -> tuple[int, list[_Together]]:
    """The length of a row in tokens, and the samples in groups that stay together in a row."""
    longest = max(len(sample.ids) - 1 for sample in samples)
    if shared_row is None:
        return layout.row_length(longest), [_Together(place, 1, len(sample.ids) - 1) for place, sample in enumerate(samples)]
    capacity = max(longest, min(shared_row, max(_SHARED_ROW, 2 * longest)))
    groups: list[_Together] = []
    for place, sample in enumerate(samples):
        added = len(sample.ids) - sample.prompt_length
        if groups and sample.continues(samples[groups[-1].first]) and groups[-1].size + added <= capacity:
            groups[-1] = _Together(groups[-1].first, groups[-1].number + 1, groups[-1].size + added)
        else:
            groups.append(_Together(place, 1, len(sample.ids) - 1))
    return layout.row_length(max(one.size for one in groups)), groups


Value = TypeVar("Value")


@dataclass(frozen=True)
class Share:
    """This process's share of a rollout: the ranks that share every matrix form one group, which samples together.

    of_first: whether the first rank makes the whole share, since only it talks to servers.
    """

    mesh: Mesh
    of_first: bool = False

    @property
    def _ranks(self) -> int:
        """Ranks of a group."""
        return self.mesh.layout.world_size if self.of_first else self.mesh.layout.tensor

    @property
    def groups(self) -> int:
        """Groups of the job, each with a share."""
        return self.mesh.layout.world_size // self._ranks

    @property
    def places(self) -> slice:
        """The prompts of this group: of n groups, each takes every n-th prompt."""
        return slice(self.mesh.rank // self._ranks, None, self.groups)

    @property
    def leads(self) -> bool:
        """Whether this process judges for its group."""
        return self.mesh.rank % self._ranks == 0

    def gathered(self, make: Callable[[], list[Value]]) -> list[Value]:
        """Results of `make` on each group's first rank, for all places in order, on every process.

        Every process calls this. An error of one is raised on all.
        """
        if self.mesh.alone:
            return make()
        report: tuple[list[Value], BessemerError | None] = ([], None)
        if self.leads:
            try:
                report = (make(), None)
            except BessemerError as error:
                report = ([], error)
        everyone: list[Any] = [None] * self.mesh.layout.world_size
        dist.all_gather_object(everyone, report)
        parts = everyone[:: self._ranks]
        for _, failure in parts:
            if failure is not None:
                raise failure
        whole: list[Value] = [None] * sum(len(values) for values, _ in parts)  # type: ignore[list-item]
        for number, (values, _) in enumerate(parts):
            whole[number :: self.groups] = values
        return whole


def of_all_rows(models: ModelRoles, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
    """Values of the tokens of all rows, (B, T), on every process. compute: gives the values of the rows that this process
    trains on, (b, T), as `ModelRoles.per_token` does. Every process calls this.
    """
    mesh = models.mesh
    if mesh.alone:
        return compute(batch)
    layout = mesh.layout
    own_bT = compute(batch.rows(models.rows(batch.tokens_BT.shape[0])))
    everyone: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everyone, own_bT.cpu())
    by_data_rank = {layout.data_rank(rank): values_bT for rank, values_bT in enumerate(everyone)}
    return torch.cat([by_data_rank[rank] for rank in range(layout.data_ranks)])
