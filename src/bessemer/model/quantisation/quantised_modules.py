"""Which weights of a decoder can be quantised, and the modules that hold them as codes.

Norms, biases, the router, DeltaNet's convolution and gates, and the gate of a shared expert stay as they are: they are small,
and much hangs on each of their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from bessemer.model.decoder import Decoder
from bessemer.model.experts import Experts
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.model.quantisation.schemes.base import Scheme
from bessemer.model.quantised_experts import QuantisedExperts
from bessemer.model.quantised_linear import QuantisedEmbedding, QuantisedLinear, is_quantised, quantised_parts

EMBEDDING, HEAD = "embed_tokens", "lm_head"
#: The scalar head of a reward model, which stays as it is: rewards are compared.
_SCORE = "score"
_KEPT = ("shared_expert_gate", "in_proj_ba")
_EXPERT_MATRICES = ("gate_up_proj", "down_proj")


def quantisable(decoder: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of the blocks that can be quantised, in the order of the network.

    A linear layer is named as its module; an expert's matrices, (E, N, K), as `experts.gate_up_proj` and `.down_proj`.
    """
    for name, module in decoder.named_modules():
        if isinstance(module, Experts):
            for matrix in _EXPERT_MATRICES:
                yield f"{name}.{matrix}", tuple(getattr(module, matrix).shape)
        elif isinstance(module, nn.Linear) and name not in (HEAD, _SCORE) and not name.endswith(_KEPT):
            yield name, tuple(module.weight.shape)


def weight_name(module: str) -> str:
    """The name of a quantised weight among the tensors of a decoder that is not quantised."""
    return module if module.endswith(tuple(f".experts.{matrix}" for matrix in _EXPERT_MATRICES)) else f"{module}.weight"


def replace_with_quantised_modules(decoder: Decoder, schemes: Mapping[str, Scheme]) -> Decoder:
    """Replace the modules whose weights are named in `schemes` by quantised ones, in place; biases stay.

    The codes are zeros until they are loaded or taken. A new module is on the device of the weight that it replaces.
    """
    for name, scheme in schemes.items():
        parent_name, _, last = name.rpartition(".")
        parent = decoder.get_submodule(parent_name)
        if isinstance(parent, Experts):
            if last == _EXPERT_MATRICES[0] and not isinstance(parent, QuantisedExperts):
                outer_name, _, own = parent_name.rpartition(".")
                with parent.gate_up_proj.device:
                    quantised = QuantisedExperts(parent, scheme, schemes[f"{parent_name}.{_EXPERT_MATRICES[1]}"])
                setattr(decoder.get_submodule(outer_name), own, quantised)
            continue
        setattr(parent, last, _quantised_module(cast(nn.Module, getattr(parent, last)), scheme))
    return decoder


def _quantised_module(module: nn.Module, scheme: Scheme) -> QuantisedLinear:
    assert isinstance(module, (nn.Linear, nn.Embedding)), module
    outputs, inputs = module.weight.shape
    made = QuantisedEmbedding if isinstance(module, nn.Embedding) else QuantisedLinear
    bias = module.bias if isinstance(module, nn.Linear) else None
    with module.weight.device:
        quantised = made(inputs, outputs, scheme, bias=bias is not None, dtype=module.weight.dtype)
    if bias is not None:
        quantised.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return quantised.train(module.training)


def set_dtype(decoder: Decoder, dtype: torch.dtype) -> None:
    """Set the type that codes are dequantised to: the rest of the model's."""
    for part in quantised_parts(decoder).values():
        part.dtype = dtype


def dequantised_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The tensors of a decoder by the names of one that is not quantised, dequantised."""
    parts = quantised_parts(decoder)
    buffers = {f"{name}.{buffer}" for name, part in parts.items() for buffer, _ in part.named_buffers()}
    tensors = {name: tensor for name, tensor in decoder.state_dict().items() if name not in buffers}
    return tensors | {weight_name(name): part.weight for name, part in parts.items()}


def dequantised(decoder: Decoder) -> Decoder:
    """The same model with ordinary weights; itself where it has no others."""
    if not is_quantised(decoder):
        return decoder
    return fill(empty_decoder(decoder.config), dequantised_tensors(decoder)).to(decoder.device)
