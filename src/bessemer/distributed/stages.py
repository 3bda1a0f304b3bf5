"""Pipeline stages: a decoder split into consecutive layers for the ranks of the pipeline axis (Huang et al. 2019)."""

# Shapes: B batch, T time, D hidden.

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from bessemer.core.errors import ConfigError
from bessemer.distributed.layout import Layout, balanced_stages
from bessemer.model.decoder import Decoder
from bessemer.model.layers.cache import Cache
from bessemer.model.layers.embedding import EmbeddedRows
from bessemer.model.vision.config import VisionLanguageConfig
from bessemer.model.vision.encoder import Pixels
from bessemer.model.vision.model import Vision
from bessemer.model.vision.trained import BatchPictures, SeenPictures, seen_pictures

#: Members of a decoder that only the first or the last stage has, and those without weights that every stage has.
_OF_THE_FIRST, _OF_THE_LAST = ("embed_tokens", "embed_positions", "vision"), ("norm", "lm_head", "score", "mtp")
_OF_ALL = ("rotary", "rotary_local")


class StageRows(Protocol):
    """A micro-batch as every stage reads it, besides the hidden states."""

    @property
    def tokens_BT(self) -> Tensor: ...  # noqa: N802

    @property
    def positions_BT(self) -> Tensor | None: ...  # noqa: N802

    @property
    def document_ids_BT(self) -> Tensor | None: ...  # noqa: N802

    @property
    def visible_to_BT(self) -> Tensor | None: ...  # noqa: N802

    @property
    def vector_of_token_BT(self) -> Tensor | None: ...  # noqa: N802

    @property
    def rope_BT3(self) -> Tensor | None: ...  # noqa: N802

    @property
    def shown(self) -> BatchPictures | None: ...


#: Forward computation of a stage: from the previous stage's output and the number of the micro-batch to the input of the next
#: stage; the last stage's output is the result of the micro-batch.
Compute = Callable[["DecoderStage", tuple[Tensor, ...], int], Any]


class DecoderStage(Decoder):
    """Consecutive layers of a decoder under their names there; the first stage has the embedding besides, the last one norm and
    head. The modules are shared with the decoder.

    It computes as a decoder does, except that a stage after the first starts from the received hidden states. So an objective
    may treat the last stage as the model, as long as it asks for hidden states once, those of the batch's own tokens.
    """

    def __init__(self, whole: Decoder, number: int, count: int, layers: range) -> None:
        nn.Module.__init__(self)
        self.config = whole.config
        self.attention_backend = whole.attention_backend
        self.number = number
        self.is_first = number == 0
        self.is_last = number == count - 1
        self.layers = nn.ModuleDict({str(layer): whole.blocks[layer] for layer in layers})
        #: Of a model that reads pictures: its settings, and whose tokens' embeddings are computed here (`VisionDecoder`).
        self.vision_config: VisionLanguageConfig | None = getattr(whole, "vision_config", None)
        self.rope_sections = whole.rope_sections
        self.own_tokens: Callable[[Tensor], Tensor] | None = None
        for name in (*_OF_ALL, *(_OF_THE_FIRST * self.is_first), *(_OF_THE_LAST * self.is_last)):
            if hasattr(whole, name):
                setattr(self, name, getattr(whole, name))
        #: What `forward` computes; `Pipeline` sets it.
        self.compute: Compute | None = None
        #: Losses of the layers before this stage in the current micro-batch.
        self.earlier_losses: Tensor | float = 0.0
        #: Number of the current micro-batch.
        self.micro_batch = 0
        self._rows: StageRows | None = None
        self._received_BTD: Tensor | None = None

    def forward(self, *received: Tensor) -> Any:  # type: ignore[override]
        """Run `compute` on the current micro-batch; called by PyTorch's schedules."""
        assert self.compute is not None
        return self.compute(self, received, self.micro_batch)

    def begin(self, rows: StageRows, received: tuple[Tensor, ...]) -> None:
        """Start a micro-batch. received: hidden states (B, T, D) and, where layers have losses of their own, their sum so far;
        empty in the first stage."""
        self._rows = rows
        self._received_BTD = received[0] if received else None
        self.earlier_losses = received[1] if len(received) > 1 else 0.0

    def hidden_states(self) -> Tensor:
        """Hidden states after this stage's layers, (B, T, D), of the current micro-batch."""
        rows = self._rows
        assert rows is not None
        return self._pre_norm_hidden(
            rows.tokens_BT, rows.positions_BT, rows.document_ids_BT, None, None, visible_to_BT=rows.visible_to_BT
        )

    def hidden(self, tokens_BT: Tensor, *, pictures: object = None, **others: Any) -> Tensor:  # type: ignore[override]
        """As `Decoder.hidden`; the pictures are those of the micro-batch that was begun."""
        return super().hidden(tokens_BT, **others)

    def _seen(self, rows: StageRows) -> SeenPictures:
        """The micro-batch's pictures, in the first stage encoded."""
        if self.vision_config is None or rows.vector_of_token_BT is None:
            return SeenPictures(None, None, None)
        vision: Vision | None = getattr(self, "vision", None)
        if vision is None:
            rope_3BT = None if rows.rope_BT3 is None else rows.rope_BT3.permute(2, 0, 1)
            unread = BatchPictures(Pixels(rows.tokens_BT.new_empty(0)), rows.vector_of_token_BT, rope_3BT)
            return seen_pictures(self.vision_config, None, unread)
        shown = rows.shown
        assert shown is not None
        return seen_pictures(self.vision_config, vision, shown, self.own_tokens)

    def _pre_norm_hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        document_ids_BT: Tensor | None,
        cache: Cache | None,
        real: list[int] | None,
        keep: Callable[[int, Tensor], None] | None = None,
        visible_to_BT: Tensor | None = None,
        embedded: EmbeddedRows | None = None,
        seen_until_BT: Tensor | None = None,
        rope_3BT: Tensor | None = None,
    ) -> Tensor:
        assert embedded is None and seen_until_BT is None and rope_3BT is None, "pictures are the micro-batch's own"
        rows, self._rows = self._rows, None
        inputs = (tokens_BT, positions_BT, document_ids_BT, visible_to_BT)
        if rows is None or any(
            one is not other
            for one, other in zip(
                inputs, (rows.tokens_BT, rows.positions_BT, rows.document_ids_BT, rows.visible_to_BT), strict=True
            )
        ):
            raise ConfigError(
                "parallel.pipeline: the loss must ask the model for its states once a batch, and for those of the batch's own "
                "tokens_BT, positions_BT, document_ids_BT and visible_to_BT: the layers before the last stage have run by "
                "then. Change the loss, or set pipeline: 1"
            )
        return super()._pre_norm_hidden(
            tokens_BT, positions_BT, document_ids_BT, cache, real, keep, visible_to_BT, *self._seen(rows)
        )

    def _embedded(self, tokens_BT: Tensor, positions_BT: Tensor | None, embedded: EmbeddedRows | None = None) -> Tensor:
        received_BTD, self._received_BTD = self._received_BTD, None
        return super()._embedded(tokens_BT, positions_BT, embedded) if received_BTD is None else received_BTD


def stages_of_rank(layout: Layout, rank: int, *, in_a_v: bool = False) -> list[int]:
    """The stages of a rank of the pipeline axis, in their order: assigned round robin, or in a V."""
    if in_a_v:
        assert layout.stages_per_rank == 2
        return [rank, 2 * layout.pipeline - 1 - rank]
    return list(range(rank, layout.stages, layout.pipeline))


def split_into_stages(model: Decoder, layout: Layout, rank: int, *, in_a_v: bool = False) -> list[DecoderStage]:
    """Remove from a model, in place, what a rank of the pipeline axis does not train, and return that rank's stages.

    With a tied head or multi-token prediction, the last stage has a copy of the embedding, which is not part of the model;
    `Pipeline` keeps it up to date.
    """
    layers, numbers = balanced_stages(model.config, layout.stages), stages_of_rank(layout, rank, in_a_v=in_a_v)
    stages = [DecoderStage(model, number, layout.stages, layers[number]) for number in numbers]
    if stages[-1].is_last and needs_embedding(model):
        stages[-1].embed_tokens = copy.deepcopy(model.embed_tokens) if stages[0].is_first else model.embed_tokens
    for names, is_here in ((_OF_THE_FIRST, stages[0].is_first), (_OF_THE_LAST, stages[-1].is_last)):
        for name in names:
            if not is_here and hasattr(model, name):
                delattr(model, name)
    model.layers = nn.ModuleDict({str(block.layer): block for stage in stages for block in stage.blocks})
    return stages


def needs_embedding(model: Decoder) -> bool:
    """Whether the last stage needs the embedding too: for a tied head or multi-token prediction."""
    is_head = model.config.tie_word_embeddings and not model.config.num_scores
    return is_head or model.config.num_nextn_predict_layers > 0
