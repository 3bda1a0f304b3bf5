"""A plain decoder packed for the compiled step: norms, attention with rotary positions, a dense feed-forward; see step.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bessemer.model.attention.base import variants, variants_in
from bessemer.model.config import ModelConfig
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.cpu_kernels.attention import PagesFields, ScoresFields, scores_fields
from bessemer.model.cpu_kernels.packed import WIDTH, MatrixFields, PackedMatrix, refusal
from bessemer.model.cpu_kernels.weight_memory import drop_mapped_pages
from bessemer.model.decoder import Decoder
from bessemer.model.layers.attention import Attention
from bessemer.model.layers.attention_backends import Scores
from bessemer.model.layers.block import Block
from bessemer.model.layers.feed_forward import FeedForward
from bessemer.model.layers.norms import LayerNorm, RMSNorm
from bessemer.model.layers.positions import RotaryPositions
from bessemer.model.quantisation.quantised_layers import QuantisedEmbedding, QuantisedLinear, restore_codes

# Shapes: V vocabulary, D hidden.

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3}
_TABLE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PACKED_TABLE = 3


#: Settings of which the step computes every value.
_COMPUTED = frozenset(
    {
        "hidden_size",
        "num_hidden_layers",
        "tie_word_embeddings",
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
        "final_logit_softcapping",
        "vocab_size",
        # norms
        "norm_type",
        "norm_position",
        "norm_offset",
        "rms_norm_eps",
        # attention
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "qk_norm",
        "attention_bias",
        "attention_output_bias",
        "attention_sinks",
        "attn_logit_softcapping",
        "query_pre_attn_scalar",
        "sliding_window",
        # positions, whose tables are the model's own
        "max_position_embeddings",
        "rope_theta",
        "rope_local_base_freq",
        "partial_rotary_factor",
        "rope_interleave",
        "no_rope_layers",
        # feed-forward
        "intermediate_size",
        "hidden_act",
        "gated_mlp",
        "mlp_bias",
    }
)
#: Settings that do not change what a plain decoder computes: of training, of its caller, and of parts that it lacks.
_WITHOUT_EFFECT = frozenset(
    {
        "model_type",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "num_nextn_predict_layers",
        # of attention variants, which `_unsupported_setting` refuses by name
        "layer_types",
        *(name for variant in variants() if not variant.in_compiled_step for name in variant.settings),
        # experts
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_expert_gate",
        "first_k_dense_replace",
        "decoder_sparse_step",
        "mlp_only_layers",
        "scoring_func",
        "norm_topk_prob",
        "expert_input_scores",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
        "router_correction_bias",
        "router_bias",
        "expert_bias",
        "swiglu_limit",
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "router_bias_update_rate",
    }
)


class NormFields(ctypes.Structure):
    """`struct Norm` of step.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("kind", ctypes.c_int32),
    )


class ProjectionFields(ctypes.Structure):
    """`struct Projection` of step.h."""

    _fields_ = (("matrices", ctypes.POINTER(MatrixFields) * 3), ("count", ctypes.c_int64))


class EmbeddingFields(ctypes.Structure):
    """`struct Embedding` of step.h."""

    _fields_ = (("table", ctypes.c_void_p), ("type", ctypes.c_int32), ("multiplier", ctypes.c_float))


class RotationFields(ctypes.Structure):
    """`struct Rotation` of step.h."""

    _fields_ = (
        ("cosines", ctypes.c_void_p),
        ("signed_sines", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
    )


class LayerFields(ctypes.Structure):
    """`struct Layer` of step.h."""

    _fields_ = (
        ("before_attention", NormFields),
        ("after_attention", NormFields),
        ("before_feed_forward", NormFields),
        ("after_feed_forward", NormFields),
        ("query", NormFields),
        ("key", NormFields),
        ("query_key_value", ProjectionFields),
        ("output", ProjectionFields),
        ("inner", ProjectionFields),
        ("down", ProjectionFields),
        ("rotation", RotationFields),
        ("scores", ScoresFields),
        ("pages", PagesFields),
        ("group", ctypes.c_int64),
    )


class ModelFields(ctypes.Structure):
    """`struct Model` of step.h."""

    _fields_ = (
        ("layers", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_width", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("layer", ctypes.POINTER(LayerFields)),
        ("embedding", EmbeddingFields),
        ("last", NormFields),
        ("head", ProjectionFields),
        ("residual_multiplier", ctypes.c_float),
        ("logit_softcap", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("norm_whole_width", ctypes.c_int32),
        ("codes_each", ctypes.c_int32),
    )


def unsupported(model: Decoder) -> str | None:
    """Why the compiled step cannot compute a model, in one line; None where it can."""
    if library() is None:
        return unavailable()
    if (reason := _unsupported_setting(model.config)) is not None:
        return reason
    for layer in _linear_layers(model):
        refusal_reason = _unsupported_layer(layer)
        if refusal_reason is not None:
            return refusal_reason
    return None


def _unsupported_setting(config: ModelConfig) -> str | None:
    """Which of a model's settings the step does not compute. One that is not known here must have its default, which asks for
    nothing: a new part of the architecture is refused until the step computes it."""
    reasons = {
        "num_experts": ("it has experts", any(config.is_sparse(layer) for layer in range(config.num_hidden_layers))),
        **{variant.noun: (f"it has {variant.noun}", not variant.in_compiled_step) for variant in variants_in(config)},
        "num_scores": ("it has a scalar head in place of the language head", bool(config.num_scores)),
        "qk_norm": ("its queries and keys have a norm without a weight", config.qk_norm == "unit"),
        "attention_output_gate": ("its attention has an output gate", config.attention_output_gate),
        "position_type": (
            f"its positions are {config.position_type}",
            config.position_type not in ("rotary", "none"),
        ),
        "rope_scaling": (
            "its rotary frequencies follow the length of the text",
            config.rope_scaling.rope_type not in ("default", "linear", "yarn", "llama3", "longrope"),
        ),
    }
    for reason, holds in reasons.values():
        if holds:
            return reason
    known = _COMPUTED | _WITHOUT_EFFECT | reasons.keys()
    for name, field in type(config).model_fields.items():
        if name not in known and getattr(config, name) != field.get_default(call_default_factory=True):
            return f"it sets {name}, which the compiled step does not know"
    return None


def _linear_layers(model: Decoder) -> list[nn.Module]:
    """Every layer that would be packed, the head among them."""
    layers: list[nn.Module] = [_head_layer(model)]
    for block in model.blocks:
        attention, feed_forward = cast(Attention, block.self_attn), cast(FeedForward, block.mlp)
        layers += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        layers += [feed_forward.up_proj, feed_forward.down_proj]
        layers += [] if feed_forward.gate_proj is None else [feed_forward.gate_proj]
    return layers


def _unsupported_layer(layer: Any) -> str | None:
    if not isinstance(layer, QuantisedLinear) and type(layer) is not nn.Linear:
        return f"it has layers of the type {type(layer).__name__}"
    device = (layer if isinstance(layer, QuantisedLinear) else layer.weight).device.type
    if device != "cpu":
        return f"its weights lie on {device}"
    # an adapter in training may be switched off
    if any(getattr(part, "is_on", True) for part in layer.children()):
        return "its layers have parts beside their weights, as an adapter in training"
    return None if isinstance(layer, QuantisedLinear) and layer.is_released else refusal(layer)


def _head_layer(model: Decoder) -> nn.Module:
    """The head as a linear layer, with the embedding's weights where they are tied."""
    if not isinstance(model.head, nn.Embedding):
        return model.head
    vocabulary, hidden = model.head_weight.shape
    layer = nn.Linear(hidden, vocabulary, bias=False, device="meta")
    layer.weight = model.head.weight
    return layer


class PlainDecoder:
    """A decoder's weights in the form that one call of C++ computes with. They are copies: a change of the model's shows in a
    new one."""

    def __init__(
        self,
        model: Decoder,
        pages: dict[int, PagesFields],
        group_of: dict[int, int],
        *,
        activation_bits: int = 8,
        release: bool = False,
    ) -> None:
        """pages: of each layer; group_of: the group of block tables that each layer goes by. activation_bits: 8 or 16, of those
        that meet codes. release: packed codes are the only ones from then on (`QuantisedWeight.release`)."""
        restore_codes(model)
        reason = unsupported(model)
        assert reason is None, reason
        self._releases = release
        self._kept: list[Any] = [model.embed_tokens]
        #: The packed matrix of each layer; layers that are packed as one matrix share its memory.
        self.packed: dict[nn.Module, PackedMatrix] = {}
        config, blocks = model.config, model.blocks
        head = self.packed[model.head] = PackedMatrix.of(cast(nn.Linear, _head_layer(model)))
        self._release(model.head, head)
        layers = (LayerFields * len(blocks))()
        for index, block in enumerate(blocks):
            layers[index] = self._layer(model, block, pages[block.layer], group_of[block.layer])
        self.fields = ModelFields(
            len(blocks),
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
            config.vocab_size,
            layers,
            self._embedding(model, head),
            self._norm(model.norm),
            self._matrices([head]),
            config.residual_multiplier,
            config.final_logit_softcapping or 0.0,
            _ACTIVATIONS[config.hidden_act],
            config.qk_norm == "full",
            activation_bits // 8,
        )
        self._kept.append(layers)

    def _layer(self, model: Decoder, block: Block, pages: PagesFields, group: int) -> LayerFields:
        attention, feed_forward = cast(Attention, block.self_attn), cast(FeedForward, block.mlp)
        config = model.config
        normed = config.qk_norm != "none"
        gate = [] if feed_forward.gate_proj is None else [feed_forward.gate_proj]
        sinks_H = None if attention.sinks is None else self._keep(attention.sinks.detach().float().contiguous().clone())
        scores = Scores(attention.scale, attention.softcap, sinks_H)
        return LayerFields(
            self._norm(block.input_layernorm),
            self._norm(block.attention_output_norm),
            self._norm(block.post_attention_layernorm),
            self._norm(block.feed_forward_output_norm),
            self._norm(attention.q_norm if normed else None),
            self._norm(attention.k_norm if normed else None),
            self._projection(attention.q_proj, attention.k_proj, attention.v_proj),
            self._projection(attention.o_proj),
            self._matrices([self._alone(layer) for layer in (feed_forward.up_proj, *gate)]),
            self._projection(feed_forward.down_proj),
            self._rotation(model, block.layer),
            scores_fields(scores, config.window(config.types[block.layer])),
            pages,
            group,
        )

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor

    def _norm(self, norm: nn.Module | None) -> NormFields:
        if isinstance(norm, RMSNorm):
            weight_D = (norm.weight.detach().float() + (1 if norm.offset else 0)) * norm.multiplier
            return NormFields(self._keep(weight_D.contiguous()).data_ptr(), None, norm.eps, 1)
        if isinstance(norm, LayerNorm):
            weight_D, bias_D = (self._keep(part.detach().float() * norm.multiplier) for part in (norm.weight, norm.bias))
            return NormFields(weight_D.data_ptr(), bias_D.data_ptr(), norm.eps, 2)
        assert norm is None or isinstance(norm, nn.Identity), type(norm)
        return NormFields(None, None, 0.0, 0)

    def _projection(self, *layers: nn.Module) -> ProjectionFields:
        """Layers of one input: as one matrix where they are alike."""
        try:
            matrix = PackedMatrix.of(*cast(Sequence[nn.Linear], layers))
        except ValueError:
            return self._matrices([self._alone(layer) for layer in layers])
        first = 0
        for layer in cast(Sequence[nn.Linear], layers):
            last = first + layer.out_features
            self.packed[layer] = PackedMatrix.of(layer) if first % WIDTH else matrix.part(first, last)
            self._release(layer, matrix, first)
            first = last
        return self._matrices([matrix])

    def _alone(self, layer: nn.Module) -> PackedMatrix:
        matrix = self.packed[layer] = PackedMatrix.of(cast(nn.Linear, layer))
        self._release(layer, matrix)
        return matrix

    def _release(self, layer: nn.Module, matrix: PackedMatrix, first: int = 0) -> None:
        if not self._releases:
            return
        if isinstance(layer, QuantisedLinear):
            matrix.take_codes(layer, first)
        elif isinstance(layer, nn.Linear | nn.Embedding):
            drop_mapped_pages(layer.weight)

    def _matrices(self, matrices: list[PackedMatrix]) -> ProjectionFields:
        self._kept += matrices
        pointers = [ctypes.pointer(matrix.fields) for matrix in matrices]
        return ProjectionFields((ctypes.POINTER(MatrixFields) * 3)(*pointers), len(matrices))

    def _embedding(self, model: Decoder, head: PackedMatrix) -> EmbeddingFields:
        multiplier = model.config.embedding_multiplier
        weight_VD = None if isinstance(model.embed_tokens, QuantisedEmbedding) else model.embed_tokens.weight.detach()
        if weight_VD is None and not model.config.tie_word_embeddings:
            head = PackedMatrix.of(cast(nn.Linear, model.embed_tokens))
            self._kept.append(head)
            self._release(model.embed_tokens, head)
        if weight_VD is None:
            return EmbeddingFields(ctypes.addressof(head.fields), _PACKED_TABLE, multiplier)
        return EmbeddingFields(self._keep(weight_VD.contiguous()).data_ptr(), _TABLE_TYPES[weight_VD.dtype], multiplier)

    def _rotation(self, model: Decoder, layer: int) -> RotationFields:
        config = model.config
        if not config.has_rope(layer):
            return RotationFields(None, None, 0, 0, 0)
        local = config.types[layer] == "sliding_attention" and hasattr(model, "rotary_local")
        rotary: RotaryPositions = model.rotary_local if local else model.rotary
        cosines, signed_sines = self._keep(rotary.cosines), self._keep(rotary.signed_sines)
        return RotationFields(cosines.data_ptr(), signed_sines.data_ptr(), rotary.dim, len(cosines), rotary.interleave)
