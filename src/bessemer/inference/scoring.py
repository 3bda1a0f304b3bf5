"""Logits of every next token of whole texts, by the engine's own runner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.build import new_runner, page_layout
from bessemer.inference.execution.kv_cache import PagedMemory, layer_groups
from bessemer.inference.execution.kv_memory import page_type
from bessemer.model.decoder import Decoder

# Shapes: N tokens of a chunk, V vocabulary.


class TextScorer:
    """The engine's runner of a model that was opened to be served, over KV blocks for one text, in chunks."""

    def __init__(self, model: Decoder, longest: int, config: EngineConfig | None = None) -> None:
        """longest: tokens of the longest text. Raises ConfigError where the model cannot be served as the settings say."""
        config = config or EngineConfig()
        self._model = model
        self._longest = longest
        self._chunk = config.max_num_batched_tokens
        groups, pages = layer_groups(model.config), -(-longest // config.block_size)
        dtype = page_type(model, config)
        by_head, spare = page_layout(model, config, dtype)
        memory = PagedMemory(
            model.config,
            [pages] * len(groups),
            config.block_size,
            dtype,
            model.device,
            state_slots=1,
            by_head=by_head,
            spare=spare,
            longest=longest,
        )
        self._tables = [list(range(pages)) for _ in groups]
        self._slot = 0 if "linear_attention" in model.config.types else None
        self._runner = new_runner(model, memory, config, opened=True)

    @property
    def arithmetic(self) -> str:
        """How the logits are computed, in words."""
        return self._runner.arithmetic

    def logits(self, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Logits after each token of a text, chunk after chunk, (N, V) float32 each; take all before the next text."""
        assert len(tokens) <= self._longest, "the KV blocks hold no longer text"
        for start in range(0, len(tokens), self._chunk):
            chunk = list(tokens[start : start + self._chunk])
            count = len(chunk)
            batch = Batch.empty(len(self._tables))
            batch.append(chunk, start, self._tables, wanted=range(count), prompt_length=len(tokens), slot=self._slot)
            yield self._runner.forward(batch)
