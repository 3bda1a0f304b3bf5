"""A decoder cut into stages of consecutive layers for the ranks of the pipeline axis (Huang et al. 2019)."""

# Shapes: B batch, T time, D hidden.

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from bessemer.core.errors import ConfigError
from bessemer.distributed.balance import balanced_stages
from bessemer.distributed.layout import Layout
from bessemer.model.cache import Cache
from bessemer.model.decoder import Decoder

#: Members of a decoder that one stage alone has, and those that every stage needs and that hold no weights.
_OF_THE_FIRST, _OF_THE_LAST = ("embed_tokens", "embed_positions"), ("norm", "lm_head", "mtp")
_OF_ALL = ("rotary", "rotary_local")


class Rows(Protocol):
    """What every stage reads of a micro-batch besides the hidden states."""

    @property
    def tokens_BT(self) -> Tensor: ...  # noqa: N802

    @property
    def positions_BT(self) -> Tensor | None: ...  # noqa: N802

    @property
    def document_ids_BT(self) -> Tensor | None: ...  # noqa: N802


#: What a stage computes: from what the stage before it sent, and the number of the micro-batch, what it sends on; the last
#: stage's is what it makes of the micro-batch.
Work = Callable[["Stage", tuple[Tensor, ...], int], Any]


class Stage(Decoder):
    """Consecutive layers of a decoder, under the names that they have there; the first stage has the embedding besides, the
    last one norm and head. It shares its modules with the decoder that it was cut from.

    It computes as a decoder does, except that a stage after the first begins with the states that it was given. So a loss
    finds in the last stage the model that it knows, as long as it asks once, for the states of the batch's own tokens.
    """

    def __init__(self, whole: Decoder, number: int, count: int, layers: range) -> None:
        nn.Module.__init__(self)
        self.config, self.attention_backend = whole.config, whole.attention_backend
        self.number, self.is_first, self.is_last = number, number == 0, number == count - 1
        self.layers = nn.ModuleDict({str(layer): whole.blocks[layer] for layer in layers})
        for name in (*_OF_ALL, *(_OF_THE_FIRST * self.is_first), *(_OF_THE_LAST * self.is_last)):
            if hasattr(whole, name):
                setattr(self, name, getattr(whole, name))
        #: What `forward` does; whoever runs the pipeline sets it.
        self.work: Work | None = None
        #: Losses of the layers before this stage's, in the micro-batch under way.
        self.earlier_losses: Tensor | float = 0.0
        #: The number of the micro-batch that `forward` is called for.
        self.micro_batch = 0
        self._rows: Rows | None = None
        self._received_BTD: Tensor | None = None

    def forward(self, *received: Tensor) -> Any:  # type: ignore[override]
        """Run `work` on a micro-batch; what the schedules of PyTorch call."""
        assert self.work is not None
        return self.work(self, received, self.micro_batch)

    def begin(self, rows: Rows, received: tuple[Tensor, ...]) -> None:
        """Take up a micro-batch. received: states (B, T, D) and, where layers have losses of their own, those so far; nothing
        in the first stage."""
        self._rows, self._received_BTD = rows, received[0] if received else None
        self.earlier_losses = received[1] if len(received) > 1 else 0.0

    def carry(self) -> Tensor:
        """States after this stage's layers, (B, T, D), of the micro-batch under way."""
        assert self._rows is not None
        return self._pre_norm_hidden(self._rows.tokens_BT, self._rows.positions_BT, self._rows.document_ids_BT, None, None)

    def _pre_norm_hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        document_ids_BT: Tensor | None,
        cache: Cache | None,
        real: list[int] | None,
    ) -> Tensor:
        rows, self._rows = self._rows, None
        asked = (tokens_BT, positions_BT, document_ids_BT)
        if rows is None or any(
            one is not other
            for one, other in zip(asked, (rows.tokens_BT, rows.positions_BT, rows.document_ids_BT), strict=True)
        ):
            raise ConfigError(
                "parallel.pipeline: the loss must ask the model for its states once a batch, and for those of the batch's own "
                "tokens_BT, positions_BT and document_ids_BT: the layers before the last stage have run by then. Change the "
                "loss, or set pipeline: 1"
            )
        return super()._pre_norm_hidden(tokens_BT, positions_BT, document_ids_BT, cache, real)

    def _embedded(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        received_BTD, self._received_BTD = self._received_BTD, None
        return super()._embedded(tokens_BT, positions_BT) if received_BTD is None else received_BTD


def stages_of_rank(layout: Layout, rank: int, *, in_a_v: bool = False) -> list[int]:
    """The stages that a rank of the pipeline axis holds, in their order: dealt out round the ranks, or forth and back."""
    if in_a_v:
        assert layout.stages_per_rank == 2
        return [rank, 2 * layout.pipeline - 1 - rank]
    return list(range(rank, layout.stages, layout.pipeline))


def cut(model: Decoder, layout: Layout, rank: int, *, in_a_v: bool = False) -> list[Stage]:
    """Leave in a model, in place, what a rank of the pipeline axis trains, and return the stages that it consists of.

    Where the embedding is also the head, or more tokens are predicted from, the last stage has a copy of it, which is not the
    model's: `Pipeline` keeps it up to date.
    """
    layers, numbers = balanced_stages(model.config, layout.stages), stages_of_rank(layout, rank, in_a_v=in_a_v)
    stages = [Stage(model, number, layout.stages, layers[number]) for number in numbers]
    if stages[-1].is_last and needs_embedding(model):
        stages[-1].embed_tokens = copy.deepcopy(model.embed_tokens) if stages[0].is_first else model.embed_tokens
    for names, held in ((_OF_THE_FIRST, stages[0].is_first), (_OF_THE_LAST, stages[-1].is_last)):
        for name in names:
            if not held and hasattr(model, name):
                delattr(model, name)
    model.layers = nn.ModuleDict({str(block.layer): block for stage in stages for block in stage.blocks})
    return stages


def needs_embedding(model: Decoder) -> bool:
    """Whether the last layers too need the embedding: as the head, or to predict further ahead."""
    return model.config.tie_word_embeddings or model.config.num_nextn_predict_layers > 0
