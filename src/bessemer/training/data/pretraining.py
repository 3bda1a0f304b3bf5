"""Pretraining batches of the settings: packing of rows, fill-in-the-middle, and the second mixture of the decay."""

from __future__ import annotations

from pathlib import Path

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_value
from bessemer.core.seeds import derive_seed
from bessemer.data.corpus.reader import TRAIN
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.tokenization.infill import fim_tokens
from bessemer.tokenization.shards import ANNEAL, TokenShards
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import Batch, StatelessBatches, TokenBatches, concatenated
from bessemer.training.data.document_batches import DocumentBatches
from bessemer.training.data.document_sources import DocumentSources
from bessemer.training.data.fim import FillInTheMiddle
from bessemer.training.data.warmed_up import read_rows
from bessemer.training.pretrain_config import PretrainConfig

#: Folder of memory-mapped arrays computed once from the shards: row plans, sources of documents.
SCRATCH = ".checkpoints"


class AnnealedBatches(StatelessBatches):
    """One mixture of documents, and from a row on another, which starts at its own first row."""

    def __init__(self, first: TokenBatches | DocumentBatches, second: TokenBatches | DocumentBatches, start: int) -> None:
        """start: rows of the first mixture that are read before the second one."""
        assert first.batch_size == second.batch_size
        self.batch_size = first.batch_size
        self._first = first
        self._second = second
        self._start = start
        self.fingerprint = hash_value([first.fingerprint, second.fingerprint, start])

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0."""
        chosen = range(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        switch = min(max(self._start, chosen.start), chosen.stop)
        of_first, of_second = range(chosen.start, switch), range(switch - self._start, chosen.stop - self._start)
        return concatenated(
            [read_rows(source, part) for source, part in ((self._first, of_first), (self._second, of_second)) if part]
        )


class PretrainingData:
    """The splits of a folder of tokens that a run trains on, checked before training."""

    def __init__(self, config: PretrainConfig, tokens: Path, tokenizer: Tokenizer) -> None:
        """Open `train` and, where the folder has it and the settings use it, `anneal`.

        Raises ArtefactError for tokens of another tokenizer, ConfigError for fill-in-the-middle without its control tokens or
        with an unknown source, and for a second mixture when no setting says which steps read it.
        """
        self._config = config
        self._begin_id = tokenizer.bos_id
        annealed = config.anneal_fraction != 0 and (tokens / ANNEAL).exists()
        if annealed and config.anneal_fraction is None and config.schedule != "wsd":
            raise ConfigError(
                f"anneal_fraction: the corpus has a second mixture, and schedule: {config.schedule} no decay to read it in; "
                "set the fraction of the steps that read it, or 0"
            )
        splits = [TRAIN, ANNEAL] if annealed else [TRAIN]
        self._shards = {split: TokenShards(tokens / split) for split in splits}
        for shards in self._shards.values():
            shards.check_tokenizer(tokenizer.hash, "the model")
        self._fim_tokens = fim_tokens(tokenizer) if config.fim_rate else None
        sources = sorted({name for shards in self._shards.values() for name in shards.sources} if config.fim_sources else [])
        for name in config.fim_sources:
            if name not in sources:
                raise ConfigError(f"fim_sources: no document has the source {name!r}{nearest(name, sources)}")

    @property
    def training_bytes(self) -> int:
        """UTF-8 bytes of the text of the split `train`."""
        return self._shards[TRAIN].bytes

    def batches(
        self, steps: int, seed: int, scratch: Path | None = None
    ) -> tuple[TokenBatches | DocumentBatches | AnnealedBatches, dict[str, float]]:
        """The batches of a run of `steps`, and their summary: epochs of each split, and the fraction of its rows that is
        filled.

        scratch: a folder for memory-mapped arrays that are computed once; None: they are in memory. Raises ArtefactError when
        there are too few tokens.
        """
        annealed = round(self._anneal_steps(steps)) if ANNEAL in self._shards else 0
        sizes = self._config.batch_sizes
        before, rows = sizes.rows_before(steps - annealed), sizes.rows_before(steps)
        first = self._of_split(TRAIN, seed, scratch)
        summary = _summary(first, before)
        if not annealed:
            return first, summary
        second = self._of_split(ANNEAL, derive_seed(seed, ANNEAL), scratch)
        summary |= {f"{ANNEAL}_{name}": value for name, value in _summary(second, rows - before).items()}
        return AnnealedBatches(first, second, before), summary

    def _anneal_steps(self, steps: int) -> float:
        fraction = self._config.anneal_fraction
        return self._config.decay_length(steps) if fraction is None else fraction * steps

    def _of_split(self, split: str, seed: int, scratch: Path | None) -> TokenBatches | DocumentBatches:
        config, shards = self._config, self._shards[split]
        rearranged = self._fill_in_the_middle(shards, seed)
        if config.packing == "documents":
            return DocumentBatches(
                shards,
                batch_size=config.batch_size,
                context_length=config.context_length,
                seed=seed,
                scratch=scratch,
                fill_in_the_middle=rearranged,
            )
        return TokenBatches(
            shards,
            batch_size=config.batch_size,
            context_length=config.context_length,
            seed=seed,
            sources=DocumentSources(shards, scratch) if len(shards.sources) > 1 else None,
            fill_in_the_middle=rearranged,
        )

    def _fill_in_the_middle(self, shards: TokenShards, seed: int) -> FillInTheMiddle | None:
        if self._fim_tokens is None:
            return None
        named = self._config.fim_sources
        return FillInTheMiddle(
            tokens=self._fim_tokens,
            begin_id=self._begin_id,
            rate=self._config.fim_rate,
            spm_rate=self._config.fim_spm_rate,
            seed=seed,
            sources=frozenset(place for place, name in enumerate(shards.sources) if name in named) if named else None,
        )


def _summary(batches: TokenBatches | DocumentBatches, rows: int) -> dict[str, float]:
    epochs = {"epochs": round(rows / batches.rows, 2)}
    return epochs | ({"filled": round(batches.filled, 4)} if isinstance(batches, DocumentBatches) else {})
