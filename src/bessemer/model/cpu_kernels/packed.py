"""A linear layer's weight packed for the compiled CPU kernels (see docs/kernels.md)."""

from __future__ import annotations

import ctypes
from enum import IntEnum

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.cpu_kernels import library, packed_linear
from bessemer.model.cpu_kernels.weight_memory import passing_memory, weight_memory
from bessemer.model.quantisation.base import BlockWeight, CodedWeight, Codes, FloatWeight, KernelWeight, NarrowFloatWeight
from bessemer.model.quantisation.blocks import BLOCK_FORMS, INTEGER_FORMS, GgufBlocks
from bessemer.model.quantisation.integers import MIDDLE, pack
from bessemer.model.quantisation.quantised_layers import PACKED_TENSORS, Keeper, QuantisedLinear

# Shapes: N outputs, K inputs, M rows, G groups along the inputs.

# as in matrices.h
WIDTH, GROUP = 16, 32


class Kind(IntEnum):
    """Storage types of a packed matrix."""

    F32 = 0
    BF16 = 1
    Q8 = 2
    Q4 = 3
    Q5 = 4
    Q6 = 5
    F8 = 6
    MX4 = 7
    IQ4 = 8
    F16 = 9


#: What can be packed.
Layer = nn.Linear | QuantisedLinear | CodedWeight | FloatWeight
#: The tensor that a decoded weight stands for: scales stay, and are small.
_CODES = frozenset({"codes"})


class MatrixFields(ctypes.Structure):
    """`struct Matrix` of matrices.h."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class PackedMatrix:
    """The weight of a linear layer, or of several that read the same input, laid out for the compiled kernels.

    `fields` is what C++ is given; its pointers are good while this object lives. `kind`, `shape` (N, K), `nbytes`.
    """

    def __init__(
        self,
        kind: Kind,
        shape: tuple[int, int],
        group: int,
        codes: Tensor,
        scales: Tensor | None,
        zeros: Tensor | None,
        offsets: Tensor | None,
        parts: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        self.kind = kind
        self.shape = shape
        self.group = group
        assert library() is not None, "ask library() before a matrix is packed"
        self._tensors = (codes, scales, zeros, offsets, parts, bias)
        self.fields = MatrixFields(
            *shape, kind, group, *(None if tensor is None else tensor.data_ptr() for tensor in self._tensors)
        )

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return sum(tensor.nbytes for tensor in self._tensors if tensor is not None)

    @classmethod
    def of(cls, *layers: Layer) -> PackedMatrix:
        """Pack a layer; several (query, key and value, say) are packed as one whose outputs follow each other.

        Codes that the kernels do not know are decoded. Raises ValueError for layers that differ in kind, inputs or groups, and
        for codes of a group that the kernels do not know: they know groups of 32, 64, 128 and the whole row.
        """
        for reason in filter(None, map(refusal, layers)):
            raise ValueError(f"a layer cannot be packed: {reason}")
        weights = [layer if isinstance(layer, nn.Linear) else kernel_weight(layer) for layer in layers]
        blocks = [weight for weight in weights if isinstance(weight, BlockWeight)]
        if blocks and len(blocks) == len(layers) and len({weight.kind for weight in blocks}) == 1:
            return cls._of_blocks(blocks)
        kinds = {_kind(weight) for weight in weights}
        if len(kinds) != 1:
            raise ValueError(f"layers of one kind can be packed together, not {', '.join(sorted(k.name for k in kinds))}")
        kind = kinds.pop()
        if kind in _FLOATS.values():
            floats = [weight for weight in weights if isinstance(weight, nn.Linear | FloatWeight)]
            parts = [weight.weight.detach() for weight in floats]
            weight_NK = parts[0] if len(parts) == 1 else torch.cat(parts)
            size, inputs = weight_NK.shape
            bias = _bias([(weight.bias, weight.weight.shape[0]) for weight in floats])
            return cls(kind, (size, inputs), GROUP, _pack_floats(weight_NK, kind), None, None, None, None, bias)
        if blocks:
            raise ValueError("blocks of GGUF files cannot be packed together with codes")
        if kind is Kind.F8:
            return cls._of_narrow_floats([weight for weight in weights if isinstance(weight, NarrowFloatWeight)])
        return cls._quantised(kind, [weight for weight in weights if isinstance(weight, KernelWeight)])

    @classmethod
    def _of_blocks(cls, weights: list[BlockWeight]) -> PackedMatrix:
        kernels, kind, inputs = library(), weights[0].kind, weights[0].inputs
        assert kernels is not None, "ask library() before a matrix is packed"
        form, outputs = _FORMS[kind], sum(len(weight.blocks) for weight in weights)
        blocks_NB = weights[0].blocks
        if len(weights) > 1:
            blocks_NB = passing_memory((outputs, blocks_NB.shape[1]), torch.uint8)
            torch.cat([weight.blocks for weight in weights], out=blocks_NB)
        # zeros, so that outputs that fill up the last sixteen are no noise
        lanes, parts = -(-outputs // WIDTH), inputs // GROUP
        codes = weight_memory((lanes, parts * form.bits, WIDTH, GROUP // 8), torch.uint8)
        kind_of_codes, of_groups = _kind(weights[0]), (lanes, inputs // form.values, WIDTH)
        scales = exponents = None
        if kind_of_codes is Kind.MX4:
            exponents = weight_memory(of_groups, torch.uint8)
        else:
            scales = weight_memory(of_groups, torch.float16)
        offsets = weight_memory(of_groups, torch.float16) if form.has_offsets else None
        of_parts = weight_memory((lanes, parts, 2, WIDTH), torch.uint8) if form.has_parts else None
        bias = _bias([(weight.bias, len(weight.blocks)) for weight in weights])
        matrix = cls(
            kind_of_codes,
            (outputs, inputs),
            form.values,
            codes,
            scales,
            exponents,
            offsets,
            of_parts,
            bias,
        )
        given, threads = blocks_NB.contiguous(), torch.get_num_threads()
        done = kernels.bessemer_pack_blocks(form.number, given.data_ptr(), ctypes.byref(matrix.fields), threads)
        assert done, f"the kernels do not know {kind}"
        return matrix

    @classmethod
    def _of_narrow_floats(cls, weights: list[NarrowFloatWeight]) -> PackedMatrix:
        groups = {weight.group_size for weight in weights}
        if len(groups) != 1:
            raise ValueError(f"layers with one size of groups can be packed together, not {sorted(groups)}")
        codes_NK = torch.cat([weight.codes.view(torch.uint8) for weight in weights])
        scales = _pack_groups(torch.cat([weight.scales for weight in weights]))
        bias = _bias([(weight.bias, len(weight.codes)) for weight in weights])
        shape = (codes_NK.shape[0], codes_NK.shape[1])
        return cls(Kind.F8, shape, groups.pop(), _pack_codes(codes_NK, Kind.F8), scales, None, None, None, bias)

    @classmethod
    def _quantised(cls, kind: Kind, weights: list[KernelWeight]) -> PackedMatrix:
        codes_NP = weights[0].codes if len(weights) == 1 else torch.cat([weight.codes for weight in weights])
        size, inputs = codes_NP.shape[0], codes_NP.shape[1] * (1 if kind is Kind.Q8 else 2)
        padded = -(-inputs // GROUP) * GROUP
        groups = {padded if weight.group_size == inputs else weight.group_size for weight in weights}
        if len(groups) != 1:
            raise ValueError(f"layers with one size of groups can be packed together, not {sorted(groups)}")
        group = groups.pop()
        if padded % group:
            raise ValueError(f"groups of {group} do not divide {padded} inputs")
        scales_NG = torch.cat([weight.scales for weight in weights]).half()
        offsets_NG = [weight.offsets for weight in weights if weight.offsets is not None]
        if len(offsets_NG) not in (0, len(weights)):
            raise ValueError("layers whose groups have offsets cannot be packed together with others")
        zeros_NG = None
        if any(weight.zeros is not None for weight in weights):
            assert kind is Kind.Q4, "codes of 8 bits are symmetric"
            zeros_NG = torch.cat(
                [torch.full_like(weight.scales, MIDDLE) if weight.zeros is None else weight.zeros for weight in weights]
            )
            zeros_NG = zeros_NG.to(torch.uint8)
        zeros = None if zeros_NG is None else _pack_groups(zeros_NG)
        offsets = _pack_groups(torch.cat(offsets_NG).half()) if offsets_NG else None
        bias = _bias([(weight.bias, len(weight.codes)) for weight in weights])
        return cls(
            kind, (size, inputs), group, _pack_codes(codes_NP, kind), _pack_groups(scales_NG), zeros, offsets, None, bias
        )

    def part(self, first: int, last: int) -> PackedMatrix:
        """The outputs first … last - 1 as a matrix of their own, in the same memory. first: a multiple of 16."""
        assert first % WIDTH == 0 and first < last <= self.shape[0], (first, last, self.shape)
        codes, *of_groups, bias = self._tensors
        blocks = slice(first // WIDTH, -(-last // WIDTH))
        scales, zeros, offsets, parts = (None if tensor is None else tensor[blocks] for tensor in of_groups)
        bias = None if bias is None else bias[first:last]
        shape = (last - first, self.shape[1])
        return PackedMatrix(self.kind, shape, self.group, codes[blocks], scales, zeros, offsets, parts, bias)

    def multiply(self, x: Tensor, threads: int | None = None, activation_bits: int = 8) -> Tensor:
        """x (…, K) in float32, float16 or bfloat16, on a CPU: x Wᵀ plus the bias, (…, N), in x's type.

        Outputs are split between `threads` (PyTorch's number of them when None). Quantised weights meet activations of
        `activation_bits`, 8 or 16, in groups of 32. With 16 it is the float product but for rounding, and takes twice the
        arithmetic. A row's result does not depend on the rows beside it, nor on the number of threads. Raises ValueError for
        rows of another width or on another device, and for other bits.
        """
        outputs, inputs = self.shape
        if x.shape[-1] != inputs or x.device.type != "cpu":
            raise ValueError(f"rows {tuple(x.shape)} on {x.device} do not fit a matrix {self.shape} on the processor")
        return packed_linear(
            x.detach() if x.requires_grad else x,
            *self._tensors,
            self.kind,
            outputs,
            inputs,
            self.group,
            threads or torch.get_num_threads(),
            activation_bits,
        )

    def unpacked(self, outputs_N: Tensor) -> dict[str, Tensor]:
        """The codes, scales, zeros and offsets that were packed, of some outputs (…,)."""
        codes, scales, zeros, offsets, *_ = self._tensors
        assert scales is not None, "a matrix of codes"
        block, lane = outputs_N // WIDTH, outputs_N % WIDTH
        inputs = self.shape[1]
        # (…, K / 4, 4), or (…, K / 8, 4) with low and high halves
        lanes = codes[block, :, lane]
        if self.kind is Kind.F8:
            whole = lanes.flatten(-2)[..., :inputs].contiguous().view(torch.float8_e4m3fn)
        elif self.kind is Kind.Q8:
            whole = (lanes ^ 128).view(torch.int8).flatten(-2)[..., :inputs].contiguous()
        else:
            whole = pack(torch.stack((lanes & 15, lanes >> 4), dim=-2).flatten(-3)[..., :inputs])
        found = {"codes": whole, "scales": scales[block, :, lane].float()}
        if zeros is not None:
            found["zeros"] = zeros[block, :, lane]
        if offsets is not None:
            found["offsets"] = offsets[block, :, lane].float()
        return found

    def unpacked_blocks(self, outputs_N: Tensor, kind: str) -> Tensor:
        """The blocks of a type of GGUF files that were packed, of some outputs (…,): uint8 (…, bytes of a row)."""
        kernels, form = library(), BLOCK_FORMS[kind]
        assert kernels is not None, "ask library() before a matrix is packed"
        places = outputs_N.to(torch.int64).contiguous()
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < self.shape[0]:
            raise IndexError(f"outputs {int(places.min())} to {int(places.max())} of {self.shape[0]}")
        blocks = torch.empty(*places.shape, self.shape[1] // form.values * form.bytes, dtype=torch.uint8)
        matrix = ctypes.byref(self.fields)
        kernels.bessemer_unpack_blocks(form.number, matrix, places.data_ptr(), places.numel(), blocks.data_ptr())
        return blocks

    def unpacked_floats(self, outputs_N: Tensor) -> Tensor:
        """The weights that were packed as floats, of some outputs (…,): (…, K)."""
        # (…, K), or (…, K / 2, 2)
        lanes = self._tensors[0][outputs_N // WIDTH, :, outputs_N % WIDTH]
        return lanes.flatten(-2)[..., : self.shape[1]] if self.kind is Kind.BF16 else lanes

    @property
    def is_coded(self) -> bool:
        """Whether it holds codes, and not floats."""
        return self.kind not in _FLOATS.values()

    def replaced_tensors(self, layer: QuantisedLinear) -> frozenset[str]:
        """The tensors of a layer that is packed here which this can give back; none where its codes were decoded and are not
        to be read out of the decoded weights."""
        return PACKED_TENSORS if self.is_coded else _CODES if layer.scheme.is_recoverable else frozenset()

    def take_codes(self, layer: QuantisedLinear, first: int = 0) -> None:
        """Let a layer that is packed here, its first output at the place `first`, give up what this can give back."""
        if names := self.replaced_tensors(layer):
            layer.release(self.keeper(layer, first), names)

    def keeper(self, layer: QuantisedLinear, first: int = 0) -> Keeper:
        """Gives back the codes of a layer that was packed here, its first output at the place `first`."""
        scheme, count, replaced = layer.scheme, layer.out_features, self.replaced_tensors(layer)
        names = scheme.tensors(*layer.shape).keys()
        others = {name: tensor for name, tensor in layer.tensors.items() if name not in replaced}

        def stored(rows: Tensor | None) -> Codes:
            places = first + (torch.arange(count) if rows is None else rows)
            if not self.is_coded:
                kept = others if rows is None else {name: tensor[rows] for name, tensor in others.items()}
                return Codes(scheme, {"codes": scheme.recoded(self.unpacked_floats(places), kept), **kept})
            if isinstance(scheme, GgufBlocks):
                return Codes(scheme, {"codes": self.unpacked_blocks(places, scheme.kind)})
            packed = self.unpacked(places)
            found = {name: packed[name] for name in names if name in packed}
            return Codes(scheme, found | {name: tensor if rows is None else tensor[rows] for name, tensor in others.items()})

        return stored

    def row(self, output: int) -> Tensor:
        """The weights of one output, float32 (K,): what an embedding that shares this matrix looks up."""
        kernels = library()
        assert kernels is not None, "ask library() before a matrix is packed"
        if not 0 <= output < self.shape[0]:
            raise IndexError(f"output {output} of {self.shape[0]}")
        out_K = torch.empty(self.shape[1])
        kernels.bessemer_read_row(ctypes.byref(self.fields), output, out_K.data_ptr())
        return out_K


def kernel_weight(layer: QuantisedLinear | CodedWeight | FloatWeight) -> CodedWeight | FloatWeight:
    """A layer as the kernels multiply it, with its bias: decoded where they do not know its codes. No layer of a `refusal`."""
    if not isinstance(layer, QuantisedLinear):
        return layer
    if layer.deferred is not None:
        return layer.deferred.block_weight()._replace(bias=layer.bias)
    stored = layer.stored
    weight = layer.scheme.kernel_weight(stored.tensors) if layer.scheme.has_kernel(layer.in_features) else None
    if weight is None:
        return FloatWeight(stored.dequantised().to(decoded_type(layer.dtype)), layer.bias)
    return weight._replace(bias=layer.bias)


def decoded_type(dtype: torch.dtype) -> torch.dtype:
    """The type of codes that are decoded for the kernels, in a model of some type: float32, or bfloat16 where that has 16
    bits."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def refusal(layer: Layer) -> str | None:
    """Why the kernels do not know a layer, as the end of "because …"; None when they do."""
    if isinstance(layer, nn.Linear):
        kind = layer.weight.dtype
        return None if kind in _FLOATS else f"its weights are {str(kind).removeprefix('torch.')}"
    if isinstance(layer, QuantisedLinear):
        knows = layer.scheme.is_weight_only or layer.scheme.has_kernel(layer.in_features)
        return None if knows else "the kernels do not know its scheme"
    if not isinstance(layer, KernelWeight):
        return None
    inputs = layer.codes.shape[-1] * (1 if layer.codes.dtype == torch.int8 else 2)
    if layer.group_size not in (32, 64, 128, inputs):
        return f"its groups have {layer.group_size} weights, and the kernels know 32, 64, 128 and the whole row"
    return None


#: Types of GGUF whose codes are places in a table.
_OF_TABLES = {"MXFP4": Kind.MX4, "IQ4_NL": Kind.IQ4, "IQ4_XS": Kind.IQ4}
#: What the kernels pack as it lies in a file.
_FORMS = BLOCK_FORMS | INTEGER_FORMS
_FLOATS = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}


def _kind(weight: nn.Linear | CodedWeight | FloatWeight) -> Kind:
    if isinstance(weight, nn.Linear | FloatWeight):
        return _FLOATS[weight.weight.dtype]
    if isinstance(weight, NarrowFloatWeight):
        return Kind.F8
    if isinstance(weight, BlockWeight):
        return _OF_TABLES.get(weight.kind) or {4: Kind.Q4, 5: Kind.Q5, 6: Kind.Q6, 8: Kind.Q8}[_FORMS[weight.kind].bits]
    return Kind.Q8 if weight.codes.dtype == torch.int8 else Kind.Q4


def _bias(parts: list[tuple[Tensor | None, int]]) -> Tensor | None:
    """The biases of layers, by their numbers of outputs, one after the other."""
    if all(bias is None for bias, _ in parts):
        return None
    return torch.cat([torch.zeros(count) if bias is None else bias.detach().float() for bias, count in parts])


def _blocks(values_NK: Tensor, multiple: int) -> Tensor:
    """(N / 16, 16, K) with N and K padded by zeros, K to `multiple`."""
    size, inputs = values_NK.shape
    lacking = (0, -inputs % multiple, 0, -size % WIDTH)
    # padding by nothing would copy them
    padded = functional.pad(values_NK, lacking) if any(lacking) else values_NK
    return padded.reshape(-1, WIDTH, padded.shape[1])


def _pack_floats(weight_NK: Tensor, kind: Kind) -> Tensor:
    """(blocks, K, 16), and for bfloat16 (blocks, K / 2, 16, 2) with K padded."""
    kernels = library()
    assert kernels is not None, "ask library() before a matrix is packed"
    size, inputs = weight_NK.shape
    lanes = (-(-inputs // GROUP) * GROUP // 2, WIDTH, 2) if kind is Kind.BF16 else (inputs, WIDTH)
    packed = weight_memory((-(-size // WIDTH), *lanes), weight_NK.dtype)
    given = weight_NK.contiguous()
    kernels.bessemer_pack_floats(kind, given.data_ptr(), size, inputs, packed.data_ptr(), torch.get_num_threads())
    return packed


def _pack_codes(codes_NP: Tensor, kind: Kind) -> Tensor:
    """Codes (N, K) of 8 bits, or two of 4 bits to a byte."""
    kernels = library()
    assert kernels is not None, "ask library() before a matrix is packed"
    bits = 4 if kind is Kind.Q4 else 8
    size, inputs = codes_NP.shape[0], codes_NP.shape[1] * 8 // bits
    words = -(-inputs // GROUP) * GROUP * bits // 32
    packed = weight_memory((-(-size // WIDTH), words, WIDTH, 4), torch.uint8)
    # codes of 8 bits have 128 added
    given, flipped = codes_NP.contiguous(), 128 if kind is Kind.Q8 else 0
    kernels.bessemer_pack_codes(bits, given.data_ptr(), size, inputs, flipped, packed.data_ptr(), torch.get_num_threads())
    return packed


def _pack_groups(values_NG: Tensor) -> Tensor:
    return _laid_out(_blocks(values_NG, 1).transpose(1, 2))


def _laid_out(values: Tensor) -> Tensor:
    return weight_memory(tuple(values.shape), values.dtype).copy_(values)
