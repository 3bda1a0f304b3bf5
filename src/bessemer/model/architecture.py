"""The shape of a decoder, under Hugging Face's own names: layers, norms, attention, positions, experts, vocabulary."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from bessemer.core.config import Config, setting
from bessemer.model.attention import LayerType

#: Far above every model's: of layers; of heads, experts and channels of a head; of channels elsewhere; of a vocabulary.
#: A file that says more is damaged, and tensors of the largest sizes still have a number of elements that 64 bits hold.
MOST_LAYERS, MOST_HEADS, LARGEST_WIDTH, LARGEST_VOCAB = 1 << 14, 1 << 16, 1 << 20, 1 << 24


class RopeScaling(Config):
    """How rotary frequencies are changed so that a model reads further than it was trained (`model/layers/positions.py`)."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] = setting(
        "default", "way to scale the frequencies"
    )
    factor: float = setting(1.0, "how many times further than before the model shall read", ge=1)
    original_max_position_embeddings: int | None = setting(None, "context before scaling; none: max_position_embeddings", ge=1)
    low_freq_factor: float = setting(1.0, "llama3: wavelengths above the old context over this are scaled in full", gt=0)
    high_freq_factor: float = setting(4.0, "llama3: wavelengths below the old context over this are left alone", gt=0)
    beta_fast: float = setting(32.0, "yarn: channels that turn more often than this in the old context are left alone", gt=0)
    beta_slow: float = setting(1.0, "yarn: channels that turn less often than this in the old context are scaled in full", gt=0)
    attention_factor: float | None = setting(
        None, "yarn, longrope: factor on the rotated query and key; none: 0.1 ln(factor) + 1, with longrope 1", gt=0
    )
    mscale: float | None = setting(None, "yarn, DeepSeek: with mscale_all_dim decides the attention factor", ge=0)
    mscale_all_dim: float | None = setting(None, "yarn, DeepSeek: also scales the attention scores", ge=0)
    truncate: bool = setting(True, "yarn: whole channels as the ends of the ramp")
    short_factor: tuple[float, ...] | None = setting(None, "longrope: divisor of each frequency up to the old context")
    long_factor: tuple[float, ...] | None = setting(None, "longrope: divisor of each frequency in a longer context")

    @model_validator(mode="after")
    def _has_its_factors(self) -> Self:
        if self.rope_type == "longrope" and not (self.short_factor and self.long_factor):
            raise ValueError("rope_type longrope needs short_factor and long_factor, a number for each frequency")
        return self


class Architecture(Config):
    """The shape of a decoder before it knows its tokenizer. The defaults are Qwen3's."""

    model_type: str | None = setting(
        None, "Hugging Face family whose form the folder has; none: the first that can hold these settings"
    )
    hidden_size: int = setting(128, "width of the residual stream", unit="channels", ge=1, le=LARGEST_WIDTH)
    num_hidden_layers: int = setting(4, "blocks of attention and feed-forward", ge=1, le=MOST_LAYERS)
    max_position_embeddings: int = setting(512, "context: the longest sequence that the model reads", unit="tokens", ge=1)
    tie_word_embeddings: bool = setting(True, "use the embedding table as the output head too")
    embedding_multiplier: float = setting(1.0, "factor on the embedded tokens (Gemma: the root of hidden_size)", gt=0)
    residual_multiplier: float = setting(1.0, "factor on what each part of a block adds to the residual stream (Granite)", gt=0)
    logits_scaling: float = setting(1.0, "logits are divided by it (Granite)", gt=0)
    final_logit_softcapping: float | None = setting(None, "logits become c·tanh(logits / c)", gt=0)
    initializer_range: float = setting(0.02, "standard deviation of the weights before training", gt=0)

    # norms
    norm_type: Literal["rms", "layer"] = setting("rms", "root-mean-square norm, or LayerNorm with a bias")
    norm_position: Literal["before", "after", "both"] = setting(
        "before", "norms before attention and feed-forward, after, or both"
    )
    norm_offset: bool = setting(False, "norms store their weight minus 1 (Gemma, Qwen3-Next)")
    rms_norm_eps: float = setting(1e-6, "added to the mean square in every norm", gt=0)

    # attention
    num_attention_heads: int = setting(4, "query heads of each block", ge=1, le=MOST_HEADS)
    num_key_value_heads: int = setting(2, "key and value heads, each shared by a group of query heads", ge=1, le=MOST_HEADS)
    head_dim: int = setting(
        32, "width of one head; even, because rotary positions turn pairs", unit="channels", ge=2, le=MOST_HEADS
    )
    qk_norm: Literal["none", "head", "full", "unit"] = setting(
        "head",
        "norm of queries and keys: of each head, over all heads, or of each head that is turned, without a weight (Llama 4)",
    )
    attention_bias: bool = setting(False, "biases of the query, key and value projections")
    attention_output_bias: bool = setting(False, "bias of the output projection")
    attention_output_gate: bool = setting(False, "a sigmoid gate on what attention returns (Qwen3-Next)")
    attention_sinks: bool = setting(False, "a learned score per head that takes attention away from the tokens (gpt-oss)")
    attn_logit_softcapping: float | None = setting(None, "attention scores become c·tanh(scores / c)", gt=0)
    query_pre_attn_scalar: float | None = setting(None, "scores are divided by its root; none: the width of a head", gt=0)
    layer_types: tuple[LayerType, ...] | None = setting(
        None, "full_attention, sliding_attention or linear_attention for each layer; none: full_attention"
    )
    sliding_window: int | None = setting(None, "tokens that sliding attention sees, itself included", unit="tokens", ge=1)

    # latent attention (DeepSeek-V2, section 2.1): on where kv_lora_rank is set
    kv_lora_rank: int | None = setting(
        None, "width of the latent that keys and values are made from", unit="channels", ge=1, le=LARGEST_WIDTH
    )
    q_lora_rank: int | None = setting(
        None, "width of the latent that queries are made from; none: made directly", ge=1, le=LARGEST_WIDTH
    )
    qk_nope_head_dim: int = setting(
        0, "latent attention: channels of a head without position", unit="channels", ge=0, le=MOST_HEADS
    )
    qk_rope_head_dim: int = setting(
        0, "latent attention: channels of a head with rotary position", unit="channels", ge=0, le=MOST_HEADS
    )
    v_head_dim: int = setting(0, "latent attention: width of a value head", unit="channels", ge=0, le=MOST_HEADS)

    # linear attention: gated DeltaNet (Yang et al. 2024), in layers of the type linear_attention
    linear_num_key_heads: int = setting(2, "DeltaNet: query and key heads", ge=1, le=MOST_HEADS)
    linear_num_value_heads: int = setting(4, "DeltaNet: value heads, a multiple of the key heads", ge=1, le=MOST_HEADS)
    linear_key_head_dim: int = setting(32, "DeltaNet: width of a query and key head", unit="channels", ge=1, le=MOST_HEADS)
    linear_value_head_dim: int = setting(32, "DeltaNet: width of a value head", unit="channels", ge=1, le=MOST_HEADS)
    linear_conv_kernel_dim: int = setting(
        4, "DeltaNet: length of the convolution before it", unit="tokens", ge=1, le=MOST_HEADS
    )

    # positions
    position_type: Literal["rotary", "learned", "sinusoidal", "alibi", "none"] = setting(
        "rotary", "how a token's position is encoded"
    )
    rope_theta: float = setting(10_000.0, "base of the rotary frequencies; larger turns slower", gt=1)
    rope_local_base_freq: float | None = setting(
        None, "base in sliding layers, which are then never scaled; none: rope_theta", gt=1
    )
    rope_scaling: RopeScaling = setting(default_factory=RopeScaling, description="how the frequencies are scaled")
    partial_rotary_factor: float = setting(1.0, "share of a head's channels that are turned", gt=0, le=1)
    rope_interleave: bool = setting(False, "pairs are neighbouring channels; else channel c goes with c + C/2")
    no_rope_layers: tuple[int, ...] | None = setting(None, "1 for a layer with rotary positions, 0 for one without; none: all")

    # feed-forward
    intermediate_size: int = setting(384, "width inside the feed-forward", unit="channels", ge=1, le=LARGEST_WIDTH)
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu"] = setting("silu", "activation function")
    gated_mlp: bool = setting(True, "down(act(gate(x)) · up(x)); else down(act(up(x)))")
    mlp_bias: bool = setting(False, "biases in the feed-forward")

    # experts: in the layers that `is_sparse` names
    num_experts: int = setting(0, "experts of a sparse layer; 0: every layer is dense", ge=0, le=MOST_HEADS)
    num_experts_per_tok: int = setting(2, "experts that each token visits", ge=1)
    moe_intermediate_size: int = setting(128, "width inside an expert", unit="channels", ge=1, le=LARGEST_WIDTH)
    shared_expert_intermediate_size: int = setting(
        0, "width inside the expert that every token visits; 0: none", ge=0, le=LARGEST_WIDTH
    )
    shared_expert_gate: bool = setting(False, "a sigmoid gate on the shared expert")
    first_k_dense_replace: int = setting(0, "the first layers that stay dense", ge=0)
    decoder_sparse_step: int = setting(1, "the last of this many layers is sparse", ge=1)
    mlp_only_layers: tuple[int, ...] = setting(default_factory=tuple, description="layers that stay dense, counted from 0")
    scoring_func: Literal["softmax", "sigmoid"] = setting("softmax", "what turns router logits into scores")
    norm_topk_prob: bool = setting(True, "the chosen experts' scores are divided by their sum")
    expert_input_scores: bool = setting(False, "a score multiplies what goes into its expert, not what comes out (Llama 4)")
    routed_scaling_factor: float = setting(1.0, "factor on the experts' weights", gt=0)
    n_group: int = setting(1, "groups of experts; a token chooses among the best groups' experts", ge=1)
    topk_group: int = setting(1, "groups that each token may choose from", ge=1)
    router_correction_bias: bool = setting(False, "a bias that steers which experts are chosen, not their weights")
    router_bias: bool = setting(False, "bias of the router")
    expert_bias: bool = setting(False, "biases inside the experts")
    swiglu_limit: float | None = setting(None, "gpt-oss's gate: (up + 1) · gate · σ(1.702 gate), within this limit", gt=0)
    router_aux_loss_coef: float = setting(0.0, "weight of the load-balancing loss in training", ge=0)
    router_z_loss_coef: float = setting(0.0, "weight of the router z-loss in training", ge=0)
    router_bias_update_rate: float = setting(0.0, "step of the correction bias towards an even load, per optimizer step", ge=0)

    # multi-token prediction (DeepSeek-V3, section 2.2)
    num_nextn_predict_layers: int = setting(0, "MTP modules that predict the tokens after the next", ge=0)

    @property
    def types(self) -> tuple[LayerType, ...]:
        """The type of every layer."""
        full: LayerType = "full_attention"
        return self.layer_types or (full,) * self.num_hidden_layers

    def window(self, layer_type: LayerType) -> int | None:
        """Tokens that layers of a type attend to, themselves included; None: all before them."""
        return self.sliding_window if layer_type == "sliding_attention" else None

    @property
    def is_latent(self) -> bool:
        """Whether attention is latent."""
        return self.kv_lora_rank is not None

    @property
    def shares_prefixes(self) -> bool:
        """Whether documents of a row may share what they begin with: where attention goes by positions, not by distances
        within the row, nor through a state."""
        return self.position_type != "alibi" and set(self.types) == {"full_attention"}

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotary positions turn."""
        return self.qk_rope_head_dim if self.is_latent else int(self.head_dim * self.partial_rotary_factor)

    def has_rope(self, layer: int) -> bool:
        """Whether a layer has rotary positions."""
        return self.position_type == "rotary" and (self.no_rope_layers is None or bool(self.no_rope_layers[layer]))

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts in place of one feed-forward."""
        return (
            self.num_experts > 0
            and layer >= self.first_k_dense_replace
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads}): each key-value head serves as many query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs of channels")
        if self.position_type == "rotary" and self.rotary_dim % 2:
            raise ValueError(f"partial_rotary_factor leaves {self.rotary_dim} channels to turn, which must be an even number")
        for name in ("layer_types", "no_rope_layers"):
            given = getattr(self, name)
            if given is not None and len(given) != self.num_hidden_layers:
                raise ValueError(f"{name} names {len(given)} layers and there are {self.num_hidden_layers}")
        if "sliding_attention" in self.types and self.sliding_window is None:
            raise ValueError("layer_types names sliding_attention: sliding_window must be given")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"linear_num_value_heads ({self.linear_num_value_heads}) must be a multiple of "
                f"linear_num_key_heads ({self.linear_num_key_heads})"
            )
        if self.is_latent and not (self.qk_rope_head_dim and self.qk_nope_head_dim and self.v_head_dim):
            raise ValueError("latent attention (kv_lora_rank) needs qk_nope_head_dim, qk_rope_head_dim and v_head_dim")
        if self.num_experts:
            self._check_experts()
        return self

    def _check_experts(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds num_experts ({self.num_experts})")
        if self.num_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be a multiple of n_group ({self.n_group}), "
                f"and topk_group ({self.topk_group}) at most n_group"
            )
        if self.router_bias_update_rate and not self.router_correction_bias:
            raise ValueError("router_bias_update_rate moves a bias that is not there: set router_correction_bias")


class DecoderShape(Architecture):
    """A whole decoder: its shape, its vocabulary, and the tokens at which a text begins and ends."""

    vocab_size: int = setting(..., "tokens in the vocabulary", unit="tokens", ge=1, le=LARGEST_VOCAB)
    bos_token_id: int | None = setting(None, "token that begins every text", ge=0)
    eos_token_id: int | None = setting(None, "token that ends a text", ge=0)
    num_scores: int = setting(
        0,
        "scores that the model gives at every token in place of logits, as a reward model does; 0: it is a language model",
        ge=0,
    )

    @model_validator(mode="after")
    def _tokens_exist(self) -> Self:
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"{name} ({token}) lies outside the vocabulary of {self.vocab_size} tokens")
        return self
