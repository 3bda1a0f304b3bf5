"""Quantisation of a model folder: calibration text, and quality against the original in bits per byte, KL divergence and size.

    KL = mean over tokens of Σ p log (p / q), p the original's distribution of the next token and q the quantised one's

Bits per byte measure the loss on the text; the divergence does not depend on the text's tokens and is the more sensitive
measure.

Text comes from a run's folder or its tokens, a folder of documents, or a text file; the last two are encoded here. Without a
source there is a small text that travels with Bessemer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.core.environment import free_memory_bytes
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.core.progress import Progress
from bessemer.core.store import follow, read_json, write_json
from bessemer.data.corpus.reader import holds_documents, iterate_documents
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.offline import TextScorer
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device, in_float64
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.storage.folder import load_model, save_model
from bessemer.tokenization.folder import TOKENIZER_FILE
from bessemer.tokenization.measure import sample_text
from bessemer.tokenization.shards import SHARDS_FILE, EncodedDocuments, ShardWriter, TokenShards
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.validation import whole_documents

# Shapes: R rows, T time.

#: Every tenth chunk of a text file is held out.
_HELD_OUT = 10
_CHUNK_CHARACTERS = 4_000
#: Most characters that are encoded: calibration reads some tens of thousands of tokens.
_MOST_CHARACTERS = 20_000_000
_MOST_DOCUMENTS = 20_000


#: Of the texts of `sample_text`, those of the small text; the first ones suffice for a large model.
_SAMPLES = ("english", "prose", "python", "maths")


class Tokens(NamedTuple):
    """Two streams of a source without a common document; None where it has no such split."""

    train: TokenShards | None
    held_out: TokenShards | None


@contextmanager
def opened_tokens(source: Path, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """While entered, a source as token streams.

    Every tenth chunk of about 4,000 characters of a text file is held out. Raises ArtefactError for a source without text, and
    for tokens of another tokenizer.
    """
    place = follow(source)
    for folder in (place, follow(place / "tokens")):
        if (folder / SHARDS_FILE).exists():
            yield Tokens(_checked(folder, tokenizer), None)
            return
        if (folder / "train" / SHARDS_FILE).exists():
            held_out = folder / "validation"
            has_held_out = (held_out / SHARDS_FILE).exists()
            yield Tokens(_checked(folder / "train", tokenizer), _checked(held_out, tokenizer) if has_held_out else None)
            return
    with TemporaryDirectory() as scratch:
        texts = _texts(source, place)
        train = _encoded(texts["train"], tokenizer, Path(scratch) / "train")
        yield Tokens(train, _encoded(texts["validation"], tokenizer, Path(scratch) / "validation"))


@contextmanager
def sample_tokens(tokenizer: Tokenizer) -> Iterator[TokenShards]:
    """While entered, four documents of a kilobyte each: English twice, Python, mathematics."""
    with TemporaryDirectory() as scratch:
        encoded = _encoded([sample_text(name) for name in _SAMPLES], tokenizer, Path(scratch))
        assert encoded is not None, "the samples are not empty"
        yield encoded


def _checked(folder: Path, tokenizer: Tokenizer) -> TokenShards:
    shards = TokenShards(folder)
    shards.check_tokenizer(tokenizer.hash, "the model")
    return shards


def _texts(source: Path, place: Path) -> dict[str, list[str]]:
    documents = next(
        (folder for folder in (place, follow(place / "documents")) if folder.is_dir() and holds_documents(folder)), None
    )
    if documents is not None:
        return {split: _documents(documents, split) for split in ("train", "validation")}
    if not place.is_file():
        raise ArtefactError(f"{source}: no text to read: name a run, its tokens, a folder of documents or a text file")
    try:
        with place.open(encoding="utf-8") as stream:
            text = stream.read(_MOST_CHARACTERS)
    except UnicodeDecodeError:
        raise ArtefactError(f"{source}: this is not a text file in UTF-8") from None
    chunks = _chunks(text)
    held_out = chunks[_HELD_OUT - 1 :: _HELD_OUT]
    return {"train": [chunk for number, chunk in enumerate(chunks, 1) if number % _HELD_OUT], "validation": held_out}


def _documents(folder: Path, split: str) -> list[str]:
    texts = (text for batch in iterate_documents(folder, ["text"], split=split) for text in batch.column("text").to_pylist())
    return list(islice(texts, _MOST_DOCUMENTS))


def _chunks(text: str) -> list[str]:
    """A text split at ends of paragraphs into chunks of 4,000 characters or a little more."""
    chunks, current = [], ""
    for paragraph in text.split("\n\n"):
        current += paragraph + "\n\n"
        if len(current) >= _CHUNK_CHARACTERS:
            chunks.append(current)
            current = ""
    return [chunk for chunk in [*chunks, current] if chunk.strip()]


def _encoded(texts: list[str], tokenizer: Tokenizer, folder: Path) -> TokenShards | None:
    if not texts:
        return None
    writer = ShardWriter(
        folder, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, shard_tokens=1 << 24
    )
    ids, offsets = tokenizer.encode_flat(texts)
    sizes = np.array([len(text.encode()) for text in texts])
    names = [str(number) for number in range(len(texts))]
    writer.add(EncodedDocuments(names, [""] * len(texts), sizes, ids, offsets))
    writer.finish()
    return TokenShards(folder)


def calibration_rows(shards: TokenShards, *, tokens: int, length: int, seed: int) -> Tensor:
    """Rows from random positions of the stream, (R, T): a function of the stream and the seed.

    Raises ArtefactError when the stream is shorter than a row.
    """
    last = shards.tokens - length
    if last < 0:
        raise ArtefactError(
            f"{shards.folder}: {shards.tokens:,} tokens are too few to calibrate on: one row has {length:,}; give more text"
        )
    generator = np.random.default_rng(derive_seed(seed, "calibration"))
    starts = generator.integers(0, last + 1, max(1, tokens // length))
    return torch.from_numpy(np.stack([shards.read(int(start), length).astype(np.int64) for start in starts]))


# Shapes: T tokens of a window, N of a chunk, V vocabulary.

#: File beside the weights.
QUALITY = "quality.json"
QUALITY_FORMAT = 1
#: `compared_on` in that file where no text was given.
SAMPLE = "sample"

_LONGEST_WINDOW = 1024
#: Most FLOPs for each model on the small text, 2 for a parameter and token: seconds on a slow processor.
_SAMPLE_FLOPS = 2e12


class QualityComparison(NamedTuple):
    """Two models on the same text. kl: nats per token. agreement: fraction of positions with the same most likely token.
    arithmetic: of each model's computation."""

    bits_per_byte: tuple[float, float]
    kl: float
    agreement: float
    tokens: int
    bytes: int
    arithmetic: tuple[str, str]


@torch.no_grad()
def compare_quality(
    original: Decoder, quantised: Decoder, shards: TokenShards, *, max_tokens: int | None, progress: Progress
) -> QualityComparison:
    """Compare two models on the first documents of a stream, in the windows of `training.validation`.

    Both are computed as in inference: on a CPU with 8-bit activations for quantised weights, and the KV cache in its dtype.

    Raises ArtefactError when the stream holds no document.
    """
    scored = whole_documents(shards, max_tokens)
    length = min(original.config.max_position_embeddings, _LONGEST_WINDOW)
    scorers = [TextScorer(model, length) for model in (original, quantised)]
    nats, kl, same = torch.zeros(2, dtype=torch.float64), 0.0, 0
    with progress.task("compare", total=scored.tokens, unit="tokens") as task:
        for start in range(0, scored.tokens, length):
            stream = shards.read(start, min(length, scored.tokens - start) + 1).astype(np.int64)
            tokens = stream[:-1].tolist()
            targets_T = torch.from_numpy(stream[1:]).to(original.device)
            first = 0
            for chunks in zip(*(scorer.logits(tokens) for scorer in scorers), strict=True):
                logs = [logits_NV.log_softmax(-1) for logits_NV in chunks]
                targets_N = targets_T[first : first + len(logs[0])]
                first += len(targets_N)
                nats -= torch.stack([_of_targets(log_NV, targets_N) for log_NV in logs]).cpu()
                kl += float((logs[0].exp() * (logs[0] - logs[1])).sum())
                same += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
            task.advance(len(stream) - 1)
    before, after = (nats / math.log(2) / scored.bytes).tolist()
    arithmetic = (scorers[0].arithmetic, scorers[1].arithmetic)
    return QualityComparison((before, after), kl / scored.tokens, same / scored.tokens, scored.tokens, scored.bytes, arithmetic)


def _of_targets(log_NV: Tensor, targets_N: Tensor) -> Tensor:
    return in_float64(log_NV.gather(-1, targets_N[:, None])).sum()


def quantise_folder(
    config: QuantizeConfig,
    folder: Path,
    out: Path,
    *,
    calibration: TokenShards | None,
    held_out: TokenShards | None,
    seed: int,
    device: str,
    progress: Progress,
    sample: bool = False,
) -> dict[str, Any]:
    """Quantise the model in `folder` into the folder `out`, with `quality.json` in it; returns the content of that.

    calibration: text for the methods that need it. held_out: text to compare the two models on. sample: where there is none,
    compare them on the small text of `sample_tokens`, less of it the larger they are, if memory holds both. Raises ConfigError
    when calibration text is missing or the model is quantised already, ArtefactError for a folder without a model.
    """
    model = load_model(folder, choose_device(device))
    parameters = sum(weight.numel() for weight in model.parameters())
    rows_RT = None
    if config.is_calibrated:
        if calibration is None:
            raise ConfigError(f"{config.method} reads text to calibrate on: give some, or choose method rtn")
        length = min(config.calibration_length, model.config.max_position_embeddings)
        rows_RT = calibration_rows(calibration, tokens=config.calibration_tokens, length=length, seed=seed)
    notes = quantise(model, config, rows_RT, progress=progress)
    out.mkdir(parents=True, exist_ok=True)
    save_model(model, out, tokenizer=folder)
    quality: dict[str, Any] = {
        "format": QUALITY_FORMAT,
        "scheme": config.scheme,
        "method": config.method,
        "head": config.head,
        "original": {"bytes": weight_bytes(folder)},
        "quantised": {"bytes": weight_bytes(out)},
        "notes": notes,
    }
    if config.price_per_hour is not None:
        quality["price_per_hour"] = config.price_per_hour
    with ExitStack() as stack:
        most_tokens = config.quality_tokens
        if held_out is None and sample and most_tokens and (obstacle := _obstacle(folder, model.device)) is not None:
            progress.say(f"not compared with the original: {obstacle}")
        elif held_out is None and sample and most_tokens:
            held_out = stack.enter_context(sample_tokens(load_tokenizer(folder)))
            most_tokens = min(most_tokens, max(1, int(_SAMPLE_FLOPS / 2 / parameters)))
            quality["compared_on"] = SAMPLE
        if held_out is not None and most_tokens:
            original = load_model(folder, choose_device(device))
            compared = compare_quality(original, model, held_out, max_tokens=most_tokens, progress=progress)
            for name, score, how in zip(("original", "quantised"), compared.bits_per_byte, compared.arithmetic, strict=True):
                quality[name] |= {"bits_per_byte": score, "arithmetic": how}
            quality |= {
                "loss": compared.bits_per_byte[1] / compared.bits_per_byte[0] - 1,
                "kl_per_token": compared.kl,
                "top_agreement": compared.agreement,
                "compared_tokens": compared.tokens,
            }
    write_json(out / QUALITY, quality)
    return quality


def _obstacle(folder: Path, device: torch.device) -> str | None:
    """Why the two models cannot be compared here; None where they can."""
    if not (folder / TOKENIZER_FILE).exists():
        return "the folder holds no tokenizer"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()
    if free is not None and weight_bytes(folder) > free:
        return "memory does not hold both models at once"
    return None


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def add_speed(folder: Path, tokens_per_second: Mapping[str, float]) -> dict[str, Any]:
    """Add both models' throughput, and the cost of a million tokens, to a quantised folder's `quality.json`.

    tokens_per_second: of `original` and `quantised`. The cost needs the `price_per_hour` of the settings. Returns the content
    of the file. Raises ArtefactError when the folder has no `quality.json`.
    """
    quality: dict[str, Any] = read_json(folder / QUALITY, "report of a quantised model's quality")
    if not {"original", "quantised"} <= quality.keys():
        raise ArtefactError(f"{folder / QUALITY}: this is not a report of a quantised model's quality")
    for name, speed in tokens_per_second.items():
        quality[name]["tokens_per_second"] = speed
        if (price := quality.get("price_per_hour")) is not None:
            quality[name]["cost_per_million_tokens"] = price / 3600 / speed * 1e6
    write_json(folder / QUALITY, quality)
    return quality


#: Concurrent requests, as a small server has them, and the tokens of each prompt.
_STREAMS, _PROMPT = 8, 16
_ROUNDS = 3


def tokens_per_second(folder: Path, tokens: int, device: str = "auto") -> float:
    """Tokens a second of `_STREAMS` requests for `tokens` tokens each, prompts of 16 tokens included.

    The best of three rounds, because another process can only slow one down.
    """
    engine = Engine(folder, device=device, config=EngineConfig(max_num_seqs=_STREAMS, prefix_cache=False))
    most = max(1, min(tokens, engine.context_length - _PROMPT))
    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
    vocabulary = engine.model.config.vocab_size
    prompts = [[(7 * row + place) % vocabulary for place in range(_PROMPT)] for row in range(_STREAMS)]
    engine.generate(prompts[:1], params.with_changes(max_tokens=2))
    best = 0.0
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        engine.generate(prompts, params)
        best = max(best, _STREAMS * most / (time.perf_counter() - start))
    return best
