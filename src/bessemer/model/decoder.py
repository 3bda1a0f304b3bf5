"""The decoder: embedding, blocks of attention and feed-forward, norm, head, and modules for multi-token prediction.

The config decides what each part does, so one class is every architecture of `families`. The defaults are Qwen3's (arXiv
2505.09388), and modules then carry the names of the tensors in its Hugging Face folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.core.errors import ConfigError
from bessemer.model.batch_invariance import attention as batch_invariant_attention
from bessemer.model.batch_invariance import logits as batch_invariant_logits
from bessemer.model.batch_invariance import unsupported, within_batch_invariance
from bessemer.model.config import ModelConfig
from bessemer.model.decoder_inputs import attention_masks, rotations_of
from bessemer.model.layers.attention import AttentionLayer
from bessemer.model.layers.attention_backends import BACKENDS, capped
from bessemer.model.layers.attention_mask import AttentionMask, Rows, WholeRows
from bessemer.model.layers.block import Block, MtpModule
from bessemer.model.layers.cache import Cache
from bessemer.model.layers.embedding import EmbeddedRows, Embedding
from bessemer.model.layers.norms import make_last_norm
from bessemer.model.layers.positions import RotaryPositions, SinusoidalPositions
from bessemer.model.quantisation.quantised_layers import QuantisedLinear, is_quantised

# Shapes: B batch, T time, D hidden, V vocabulary, H query heads.


class Decoder(nn.Module):
    """A causal language model. A new one has torch's default weights; see `initialisation` and `folder` for better."""

    #: The blocks, named by their number in the whole network; `distributed.stages` leaves some of them to other processes.
    layers: nn.ModuleList | nn.ModuleDict
    #: Whether rows are whole or spread over processes; `distributed.context` changes it.
    rows: Rows = WholeRows()
    #: Pairs of a head's channels that each of three positions turns, of a decoder that reads pictures so; none of others.
    rope_sections: tuple[int, ...] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_backend = "sdpa"
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if config.position_type == "learned":
            self.embed_positions: nn.Module = Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_type == "sinusoidal":
            self.embed_positions = SinusoidalPositions(config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_last_norm(config)
        if config.num_scores:
            self.score = nn.Linear(config.hidden_size, config.num_scores, bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.position_type == "rotary":
            self.rotary = self._rotary(config.rope_theta, scaled=True)
            if config.rope_local_base_freq is not None and "sliding_attention" in config.types:
                self.rotary_local = self._rotary(config.rope_local_base_freq, scaled=False)
        if config.num_nextn_predict_layers:
            # their blocks have the settings of the last layer
            layers = config.num_hidden_layers
            extra = range(layers, layers + config.num_nextn_predict_layers)
            self.mtp = nn.ModuleList(MtpModule(config, Block(config, layers - 1, cached_as=layer)) for layer in extra)

    def _rotary(self, theta: float, scaled: bool) -> RotaryPositions:
        config = self.config
        scaling = config.rope_scaling if scaled else None
        return RotaryPositions(config.rotary_dim, theta, config.max_position_embeddings, scaling, config.rope_interleave)

    def reserve_positions(self, positions: int) -> None:
        """Extend the tables of rotary positions to `positions`, at most the context: none grows while such texts are read."""
        for name in ("rotary", "rotary_local"):
            if hasattr(self, name):
                cast(RotaryPositions, getattr(self, name)).reserve(positions)

    @property
    def blocks(self) -> list[Block]:
        """The layers in order, to be compiled one by one: `block.compile()`."""
        return [cast(Block, block) for block in self.layers.children()]

    @property
    def head_weight(self) -> Tensor:
        """Matrix from hidden states to logits, (V, D), the embedding table itself when they are tied; or to scores.

        A quantised head dequantises on every access: `logits` does without.
        """
        return cast(Tensor, self.head.weight)

    @property
    def head(self) -> nn.Module:
        """The module that holds `head_weight`: a linear layer, or the embedding that it is tied to; quantised or not."""
        if self.config.num_scores:
            return self.score
        return self.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @property
    def dtype(self) -> torch.dtype:
        """Type of the hidden states and the logits."""
        head = self.head
        kind = head.dtype if isinstance(head, QuantisedLinear) else self.head_weight.dtype
        assert isinstance(kind, torch.dtype)
        return kind

    @property
    def device(self) -> torch.device:
        """Where the tokens must lie that it reads."""
        head = self.head
        return head.device if isinstance(head, QuantisedLinear) else self.head_weight.device

    @property
    def logit_softcap(self) -> float | None:
        """The c of logits held within ±c by c·tanh(logits / c); None where they are not."""
        return None if self.config.num_scores else self.config.final_logit_softcapping

    def set_attention_backend(self, backend: str) -> None:
        """Compute attention with another of `BACKENDS`: sdpa (the default), explicit, blocked, tiled, flex."""
        assert backend in BACKENDS, backend
        self.attention_backend = backend
        for module in self.modules():
            if isinstance(module, AttentionLayer) and module.backend is not None:
                module.backend = BACKENDS[backend]

    def use_batch_invariant_kernels(self) -> None:
        """Compute by kernels that give a token the same bits whatever is beside it, here and in an engine that serves this
        model (`model/batch_invariance.py`), from now on.

        Raises ConfigError for a model that they cannot compute, and where they cannot be built.
        """
        if (reason := unsupported(self.config)) is not None:
            raise ConfigError(f"batch-invariant kernels cannot compute this model: {reason}")
        # without a device the weights are still to be loaded
        if self.dtype != torch.float32 or self.device.type not in ("cpu", "meta") or is_quantised(self):
            raise ConfigError("batch-invariant kernels compute models whose weights lie in float32 on a processor")
        # a table that grows would be computed again, in other parts
        self.reserve_positions(self.config.max_position_embeddings)
        self.attention_backend = "batch_invariant"
        for block in self.blocks:
            block.attention.backend = batch_invariant_attention
            # on the instance, so that recomputation wraps it
            block.forward = within_batch_invariance(block.forward)  # type: ignore[method-assign]

    @property
    def is_batch_invariant(self) -> bool:
        """Whether it computes by `use_batch_invariant_kernels`."""
        return self.attention_backend == "batch_invariant"

    def normed(self, pre_norm_BTD: Tensor) -> Tensor:
        """States after the last norm from those before it."""
        norm = within_batch_invariance(self.norm) if self.is_batch_invariant else self.norm
        normed_BTD: Tensor = norm(pre_norm_BTD)
        return normed_BTD

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        embedded: EmbeddedRows | None = None,
        seen_until_BT: Tensor | None = None,
        rope_3BT: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each, (B, T, V), or scores. Arguments as for `hidden`."""
        hidden_BTD = self.hidden(
            tokens_BT,
            positions_BT=positions_BT,
            document_ids_BT=document_ids_BT,
            cache=cache,
            embedded=embedded,
            seen_until_BT=seen_until_BT,
            rope_3BT=rope_3BT,
        )
        return self.logits(hidden_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """What `hidden` gives as logits, (…, V), or as scores, (…, num_scores)."""
        if self.config.num_scores:
            return self.scores(hidden_BTD)
        if self.is_batch_invariant:
            return batch_invariant_logits(hidden_BTD, self.head_weight, self.logit_softcap)
        head = self.head
        if isinstance(head, QuantisedLinear):
            return capped(head.product(hidden_BTD), self.logit_softcap)
        return capped(functional.linear(hidden_BTD, self.head_weight), self.logit_softcap)

    def scores(self, hidden_BTD: Tensor) -> Tensor:
        """States as scores of a model with `num_scores`, (B, T, num_scores), in its head's type: autocast would round them."""
        weight = self.score.weight
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            return functional.linear(hidden_BTD.to(weight.dtype), weight)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        visible_to_BT: Tensor | None = None,
        cache: Cache | None = None,
        real: list[int] | None = None,
        embedded: EmbeddedRows | None = None,
        seen_until_BT: Tensor | None = None,
        rope_3BT: Tensor | None = None,
        pictures: object = None,
    ) -> Tensor:
        """States after the last norm, (B, T, D), which `logits` turns into logits.

        positions_BT: 0, 1, 2, … when None; after the cached tokens when there is a cache.
        document_ids_BT: of packed documents; a token sees only its own document's. Their positions restart where positions_BT
        says so. Padding on the left is a document of its own.
        visible_to_BT: the last document that sees each token, where documents of a row share what they begin with: a model
        whose attention goes by distance, or is linear, cannot (`shares_prefixes`). None: each token is its own document's.
        cache: holds the tokens before these and is extended by them; not together with the other three.
        real: with a cache, how many of a row's new tokens are no padding on the right; all when None.
        embedded: tokens that are given as vectors. seen_until_BT: the last place in its row that each token sees, its own or
        one behind it; None: its own. A paged cache knows it itself. rope_3BT: positions by which channels are turned
        (`rope_sections`), where those are no places. pictures: of a model that has an encoder of them,
        `VisionDecoder`.
        """
        assert pictures is None, "this decoder has no encoder of pictures"
        hidden_BTD = self._pre_norm_hidden(
            tokens_BT,
            positions_BT,
            document_ids_BT,
            cache,
            real,
            visible_to_BT=visible_to_BT,
            embedded=embedded,
            seen_until_BT=seen_until_BT,
            rope_3BT=rope_3BT,
        )
        return self.normed(hidden_BTD)

    def pre_norm_hidden(
        self,
        tokens_BT: Tensor,
        *,
        cache: Cache,
        keep: Callable[[int, Tensor], None] | None = None,
        embedded: EmbeddedRows | None = None,
        rope_3BT: Tensor | None = None,
    ) -> Tensor:
        """States after the last block, before the last norm, (B, T, D): what the MTP modules read.

        keep: receives the states before each layer, (B, T, D), with the layer's number, and those after the last. embedded:
        tokens that are given as vectors. rope_3BT: as of `hidden`.
        """
        return self._pre_norm_hidden(tokens_BT, None, None, cache, None, keep, embedded=embedded, rope_3BT=rope_3BT)

    def attend(self, layer: int, hidden_BTD: Tensor, *, cache: Cache, rope_3BT: Tensor | None = None) -> None:
        """Let a layer's attention read the states before that layer of tokens that a cache makes room for.

        Nothing is returned: it is for caches that note what a query attends to. A layer with a state has no weights to note.
        rope_3BT: as of `hidden`.
        """
        block = self.blocks[layer]
        assert not block.variant.recurrent
        positions_BT = cache.extend(hidden_BTD.shape[1])
        rotations = rotations_of(self, positions_BT if rope_3BT is None else rope_3BT, cache.live, hidden_BTD.dtype)
        rotation = rotations[self.config.types[layer]] if self.config.has_rope(layer) else None
        block.attention(block.input_layernorm(hidden_BTD), rotation, AttentionMask(), cache)

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
        """States after the last block, before the last norm, (B, T, D)."""
        length = tokens_BT.shape[1]
        slots_BT, keys = None, length
        if cache is not None:
            assert positions_BT is None and document_ids_BT is None, "a cache keeps its own positions, one document a row"
            positions_BT = slots_BT = cache.extend(length, real)
            keys = cache.live
        hidden_BTD = self._embedded(tokens_BT, positions_BT, embedded)
        if cache is None or cache.masked:
            aligned = cache is None or cache.aligned
            masks = attention_masks(
                self, length, keys, hidden_BTD, slots_BT, document_ids_BT, aligned, visible_to_BT, seen_until_BT
            )
        else:
            masks = dict.fromkeys(self.config.types, AttentionMask())
        # given positions may lie anywhere in the context
        if positions_BT is not None and cache is None:
            self.reserve_positions(self.config.max_position_embeddings)
        # documents that share a prefix make rows longer than the context; each document fits it
        longest = keys if visible_to_BT is None else min(keys, self.config.max_position_embeddings)
        rotations = rotations_of(self, positions_BT if rope_3BT is None else rope_3BT, longest, hidden_BTD.dtype)
        for block in self.blocks:
            if keep is not None:
                keep(block.layer, hidden_BTD)
            # blocks are compiled for training's shapes; sampling with a cache must not recompile them
            run = block if cache is None else block.forward
            kind = self.config.types[block.layer]
            rotation = rotations[kind] if self.config.has_rope(block.layer) else None
            hidden_BTD = run(hidden_BTD, rotation, masks[kind], cache)
        if keep is not None:
            keep(self.config.num_hidden_layers, hidden_BTD)
        return hidden_BTD

    def hidden_and_mtp(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """`hidden`, and from each MTP module the states that predict one token further, each (B, T, D).

        State i of module k = 1, 2, … predicts token i + k + 1; its last k positions lack tokens that they need and mean
        nothing.
        """
        pre_norm_BTD = self._pre_norm_hidden(tokens_BT, positions_BT, document_ids_BT, None, None)
        length, mtp_hidden, hidden_BTD = tokens_BT.shape[1], [], pre_norm_BTD
        masks = attention_masks(self, length, length, pre_norm_BTD, None, document_ids_BT, True)
        rotations = rotations_of(self, positions_BT, length, pre_norm_BTD.dtype)
        last = self.config.num_hidden_layers - 1
        kind = self.config.types[last]
        rotation = rotations[kind] if self.config.has_rope(last) else None
        for step, module in enumerate(self.mtp, start=1):
            embedded_BTD = self.embed_tokens(tokens_BT.roll(-step, dims=1))
            module = cast(MtpModule, module)
            merged_BTD = module.merge(embedded_BTD, hidden_BTD)
            hidden_BTD = module.block(merged_BTD, rotation, masks[kind])
            mtp_hidden.append(module.norm(hidden_BTD))
        return self.norm(pre_norm_BTD), mtp_hidden

    def mtp_hidden(self, index: int, tokens_BT: Tensor, hidden_BTD: Tensor, cache: Cache) -> Tensor:
        """The states of MTP module 0, 1, 2, … from those of the one before it, or the model's pre-norm states, (B, T, D).

        tokens_BT: the token that each position takes: `index + 1` positions further on.
        """
        module = cast(MtpModule, self.mtp[index])
        last = self.config.num_hidden_layers - 1
        kind = self.config.types[last]
        positions_BT = cache.extend(tokens_BT.shape[1])
        merged_BTD = module.merge(self.embed_tokens(tokens_BT), hidden_BTD)
        assert not cache.masked, "MTP modules run over a paged KV cache"
        rotation = None
        if self.config.has_rope(last):
            rotation = rotations_of(self, positions_BT, cache.live, merged_BTD.dtype)[kind]
        return module.block(merged_BTD, rotation, AttentionMask(), cache)

    def _embedded(self, tokens_BT: Tensor, positions_BT: Tensor | None, embedded: EmbeddedRows | None = None) -> Tensor:
        """Embedded tokens, with what tells their places where that is added to them."""
        config, hidden_BTD = self.config, self.embed_tokens(tokens_BT)
        if config.embedding_multiplier != 1:
            hidden_BTD = hidden_BTD * torch.tensor(config.embedding_multiplier, dtype=hidden_BTD.dtype)
        if embedded is not None:
            hidden_BTD = embedded.put_into(hidden_BTD)
        if config.position_type in ("learned", "sinusoidal"):
            if positions_BT is None:
                positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
            return hidden_BTD + self.embed_positions(positions_BT).to(hidden_BTD.dtype)
        return hidden_BTD
