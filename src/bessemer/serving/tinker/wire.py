"""Tinker's messages in protocol buffers: examples and their tensors come in, tensors of losses and samples go out.

The rest of the API is JSON. The messages are declared here by their field numbers, and the package `protobuf` reads and writes
them; a test compares each with the client's own classes. Tensors are bytes, little-endian, as numpy has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from bessemer.core.errors import RequestError

# Shapes: T tokens of an example, K targets of a token, N samples, D examples.

#: Content type of these messages.
PROTOBUF = "application/x-protobuf"

#: Fields of each message: number, name, type. A type may be another message; `[]` means repeated, `{}` a map with text keys.
_MESSAGES: dict[str, tuple[tuple[int, str, str], ...]] = {
    "Tensor": ((1, "dense", "bytes"), (2, "sparse_csr", "SparseCsr"), (3, "dtype", "int32"), (4, "shape", "int64[]")),
    "SparseCsr": ((1, "values", "bytes"), (2, "crow_indices", "bytes"), (3, "col_indices", "bytes")),
    "EncodedTextChunk": ((1, "tokens", "bytes"),),
    "OtherChunk": (),
    "Chunk": ((1, "encoded_text", "EncodedTextChunk"), (2, "image", "OtherChunk"), (3, "dmel", "OtherChunk")),
    "Datum": ((1, "model_input", "Chunk[]"), (2, "loss_fn_inputs", "Tensor{}")),
    "LossConfigValue": ((1, "number", "double"), (2, "text", "string")),
    "ForwardBackwardRequest": (
        (1, "model_id", "string"),
        (2, "seq_id", "int32"),
        (3, "data", "Datum[]"),
        (4, "loss_fn", "string"),
        (5, "loss_fn_config", "double{}"),
        (6, "forward_only", "bool"),
        (7, "loss_fn_config_v2", "LossConfigValue{}"),
    ),
    "BatchedTensor": ((1, "data", "bytes"), (2, "offsets", "bytes"), (3, "dtype", "int32"), (4, "trailing_shape", "int64[]")),
    "ArrayRecord": ((1, "type_tag", "string"), (2, "fields", "BatchedTensor{}"), (3, "num_datums", "int64")),
    "ForwardBackwardOutput": (
        (1, "loss_fn_output_type", "string"),
        (2, "loss_fn_outputs", "ArrayRecord[]"),
        (3, "metrics", "double{}"),
    ),
    "TopkLogprobs": ((1, "token_ids", "bytes"), (2, "logprobs", "bytes"), (3, "k", "uint32"), (4, "length", "uint32")),
    "SampledSequence": (
        (1, "stop_reason", "int32"),
        (2, "tokens", "bytes"),
        (3, "logprobs", "bytes"),
        (4, "topk_sampled_logprobs", "TopkLogprobs"),
    ),
    "SampleResponse": (
        (1, "sequences", "SampledSequence[]"),
        (2, "prompt_logprobs", "bytes"),
        (3, "topk_prompt_logprobs", "TopkLogprobs"),
        (4, "prompt_cache_hit_tokens", "int32"),
    ),
}
#: Types of numbers in a tensor, by their number in a message.
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 2: np.dtype("<i8"), 3: np.dtype("<i4")}
#: Numbers of field types and labels in protocol buffers.
_TYPES = {"double": 1, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "uint32": 13}
_MESSAGE, _OPTIONAL, _REPEATED = 11, 1, 3
_PACKAGE = "bessemer_tinker"
#: Log-probability that the client expects as filling where fewer than k likeliest tokens are known.
_NO_LOG_PROB = -99999.0


@dataclass(frozen=True)
class Datum:
    """An example: its tokens (T,) int64, and the tensors of its loss by name, (T,) or (T, K)."""

    tokens_T: np.ndarray
    inputs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ForwardBackward:
    """A request for a loss and, unless `forward_only`, its gradients. config: of the loss."""

    model_id: str
    seq_id: int
    loss: str
    config: Mapping[str, float | str]
    forward_only: bool
    _data: Sequence[Any]

    def data(self) -> list[Datum]:
        """The examples. Raises RequestError for one that is not text, or whose numbers do not fit its shape."""
        return [_datum(number, each) for number, each in enumerate(self._data)]


class SampledTokens(NamedTuple):
    """A sample: its tokens and their log-probabilities. top: of each token the likeliest ones with theirs; None: not asked."""

    tokens: Sequence[int]
    log_probs: Sequence[float]
    is_cut: bool
    top: Sequence[Sequence[tuple[int, float]]] | None = None


@cache
def messages() -> Mapping[str, Any]:
    """The classes of the messages by name, in a pool of their own: the client's may live in the same process."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, field, kind in fields:
            _add_field(message, number, field, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = (pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in _MESSAGES)
    return {descriptor.name: message_factory.GetMessageClass(descriptor) for descriptor in found}


def _add_field(message: Any, number: int, name: str, kind: str) -> None:
    base, label = kind.removesuffix("[]").removesuffix("{}"), _REPEATED if kind.endswith(("[]", "{}")) else _OPTIONAL
    if kind.endswith("{}"):
        entry = "".join(part.capitalize() for part in name.split("_")) + "Entry"
        of_entry = message.nested_type.add(name=entry)
        of_entry.options.map_entry = True
        _add_field(of_entry, 1, "key", "string")
        _add_field(of_entry, 2, "value", base)
        base = f"{message.name}.{entry}"
    field = message.field.add(name=name, number=number, label=label, type=_TYPES.get(base, _MESSAGE))
    if base not in _TYPES:
        field.type_name = f".{_PACKAGE}.{base}"


def read_forward_backward(body: bytes) -> ForwardBackward:
    """A request for a loss, from the bytes of its message. Raises RequestError for other bytes; `data` reads the examples."""
    message = messages()["ForwardBackwardRequest"]()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise RequestError(f"the body is no ForwardBackwardRequest ({error}); this server speaks to tinker 0.38") from None
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text or value.number
    return ForwardBackward(message.model_id, message.seq_id, message.loss_fn, config, message.forward_only, message.data)


def _datum(number: int, message: Any) -> Datum:
    chunks = []
    for chunk in message.model_input:
        if not chunk.HasField("encoded_text"):
            raise RequestError(f"data[{number}]: this server reads text, and the input has a picture or sound; leave it out")
        chunks.append(_numbers(chunk.encoded_text.tokens, _DTYPES[3], f"data[{number}]: model_input"))
    tokens_T = np.concatenate(chunks).astype(np.int64) if chunks else np.zeros(0, np.int64)
    names = sorted(message.loss_fn_inputs)
    return Datum(tokens_T, {name: _tensor(message.loss_fn_inputs[name], f"data[{number}]: {name}") for name in names})


def _tensor(message: Any, where: str) -> np.ndarray:
    """A dense tensor; a sparse one (compressed rows) is filled with 0."""
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise RequestError(f"{where}: numbers of the unknown type {message.dtype}")
    shape = tuple(message.shape)
    if not message.HasField("sparse_csr"):
        values = _numbers(message.dense, dtype, where)
        shape = shape or values.shape
        if any(size < 0 for size in shape) or int(np.prod(shape, dtype=object)) != values.size:
            raise RequestError(f"{where}: {values.size:,} numbers for the shape {shape}")
        return values.reshape(shape)
    values = _numbers(message.sparse_csr.values, dtype, where)
    rows = _numbers(message.sparse_csr.crow_indices, _DTYPES[2], where)
    columns = _numbers(message.sparse_csr.col_indices, _DTYPES[2], where)
    counts = np.diff(rows)
    fits = len(shape) == 2 and len(counts) == shape[0] and rows[0] == 0 and (counts >= 0).all() and rows[-1] == len(values)
    if not fits or len(columns) != len(values) or ((columns < 0) | (columns >= shape[1])).any():
        raise RequestError(f"{where}: this sparse tensor does not fit its shape {shape}")
    if shape[0] * shape[1] > _MOST_NUMBERS:
        raise RequestError(f"{where}: a tensor of {shape[0] * shape[1]:,} numbers; at most {_MOST_NUMBERS:,} are read")
    dense = np.zeros(shape, dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense


#: Most numbers of a sparse tensor when dense, which the few bytes of its body do not limit.
_MOST_NUMBERS = 1 << 24


def _numbers(data: bytes, dtype: np.dtype[Any], where: str) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise RequestError(f"{where}: {len(data):,} bytes are not whole numbers of {dtype.itemsize} bytes")
    return np.frombuffer(data, dtype)


def write_forward_backward_output(outputs: Mapping[str, Sequence[np.ndarray]], metrics: Mapping[str, float]) -> bytes:
    """Tensors of a loss by name, one for each of D examples, (T,) or (T, K) float32, and figures of the whole.

    Neighbouring examples with the same number of targets share a record.
    """
    message = messages()["ForwardBackwardOutput"](loss_fn_output_type="ArrayRecord", metrics=metrics)
    count = len(next(iter(outputs.values()), ()))
    widths = [tuple(arrays[place].shape[1:] for arrays in outputs.values()) for place in range(count)]
    start = 0
    while start < count:
        end = next((place for place in range(start, count) if widths[place] != widths[start]), count)
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=end - start)
        for name, arrays in outputs.items():
            parts = [np.ascontiguousarray(array, "<f4") for array in arrays[start:end]]
            field = record.fields[name]
            field.data = b"".join(part.tobytes() for part in parts)
            field.offsets = np.cumsum([0, *(part.nbytes for part in parts)], dtype="<i8").tobytes()
            field.dtype = 1
            field.trailing_shape.extend(parts[0].shape[1:])
        start = end
    return bytes(message.SerializeToString())


def write_sample_response(
    samples: Sequence[SampledTokens],
    prompt_log_probs: Sequence[float] | None = None,
    prompt_top: Sequence[Sequence[tuple[int, float]]] | None = None,
    cached_tokens: int = 0,
) -> bytes:
    """Samples of a prompt. prompt_log_probs: of its tokens, NaN where there is none."""
    message = messages()["SampleResponse"](prompt_cache_hit_tokens=cached_tokens)
    for sample in samples:
        sequence = message.sequences.add(
            stop_reason=int(sample.is_cut),
            tokens=np.asarray(sample.tokens, "<i4").tobytes(),
            logprobs=np.asarray(sample.log_probs, "<f4").tobytes(),
        )
        if sample.top is not None:
            _fill_top(sequence.topk_sampled_logprobs, sample.top)
    if prompt_log_probs is not None:
        message.prompt_logprobs = np.asarray(prompt_log_probs, "<f4").tobytes()
    if prompt_top is not None:
        _fill_top(message.topk_prompt_logprobs, prompt_top)
    return bytes(message.SerializeToString())


def _fill_top(message: Any, top: Sequence[Sequence[tuple[int, float]]]) -> None:
    most = max(map(len, top), default=0)
    filled = [[*tokens, *[(0, _NO_LOG_PROB)] * (most - len(tokens))] for tokens in top]
    message.k, message.length = most, len(top)
    message.token_ids = np.array([[token for token, _ in row] for row in filled], "<i4").tobytes()
    message.logprobs = np.array([[value for _, value in row] for row in filled], "<f4").tobytes()
