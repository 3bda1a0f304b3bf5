"""What 8 and 4 bits cost a model that was trained here in bfloat16: bits per byte, divergence, agreement, size and time.

    python benchmarks/quantisation.py [--model FOLDER --tokens FOLDER] [--minutes 12] [--tokens-compared 100000]
        [--arms "int4 rtn" …] [--seed 0] [--out FOLDER] [--result NAME]

Without --model one is trained first, on the quickstart's corpus, for so many minutes of one thread: the quickstart's shape, or
with --wide one of 5.8M parameters. Int8 by output; int4 in groups of 128 rounded to nearest (plainly, and with a clip search),
by GPTQ and by AWQ. The embedding and the head stay as they are, so that what is compared is the blocks; a last line quantises
them too. Every arm begins with the same model and the same calibration text, and each is scored on the same held-out documents.

The loss of an arm over the loss of rounding to nearest is the figure asked for: at most 0.6 for GPTQ and AWQ. Of a small model
the loss of 4 bits is some tenths of a percent, so it is printed with its standard error over windows, and the ratio of the
divergences, which is far less noisy, beside it. Each arm prints one line of JSON, and the last line is all of them. A run of
every arm is kept in `benchmarks/results/`, as `quantisation_small` or `quantisation_wide`; of a model that is given, under the
name that --result gives.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

import bessemer.pipeline.api
import recording
from bessemer.core.progress import PlainLines
from bessemer.evaluation.quantisation import calibration_rows, weight_bytes
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.storage.folder import load_model, save_model
from bessemer.tokenization.shards import TokenShards
from bessemer.training.validation import whole_documents

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model/quantisation", "src/bessemer/evaluation", "src/bessemer/training")

ARMS: dict[str, dict[str, Any]] = {
    "int8": {"scheme": "int8"},
    "int4 rtn": {"scheme": "int4"},
    "int4 rtn, clip search": {"scheme": "int4", "search_clip": True},
    "int4 gptq": {"scheme": "int4", "method": "gptq"},
    "int4 awq": {"scheme": "int4", "method": "awq"},
    "int4 gptq, head int8": {"scheme": "int4", "method": "gptq", "head": "int8"},
}
BASELINE = "int4 rtn"
#: Of the wide model.
WIDE = {
    "preset": "qwen3-1m",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
}


class Scores(NamedTuple):
    """Of every window: nats of its tokens; and, beside the original, summed divergence and how often the likeliest agrees."""

    nats: np.ndarray
    divergence: float
    agreement: float


class Text(NamedTuple):
    """Held-out windows, (windows, context + 1), filled with −1; the tokens and the bytes in them."""

    windows: torch.Tensor
    tokens: int
    bytes: int


def text_of(shards: TokenShards, context: int, most: int) -> Text:
    scored = whole_documents(shards, most)
    stream = torch.from_numpy(shards.read(0, scored.tokens + 1).astype(np.int64))
    rows = [stream[start : start + context + 1] for start in range(0, scored.tokens, context)]
    windows = torch.full((len(rows), context + 1), -1)
    for row, part in zip(windows, rows, strict=True):
        row[: len(part)] = part
    return Text(windows, scored.tokens, scored.bytes)


@torch.no_grad()
def score(model: Decoder, original: Decoder, text: Text) -> Scores:
    nats, divergence, same = [], 0.0, 0
    for rows in text.windows.split(16):
        targets = rows[:, 1:]
        real = targets >= 0
        ours, theirs = (one(rows[:, :-1].clamp(min=0)).float().log_softmax(-1) for one in (model, original))
        nats.append((-ours.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * real).sum(1))
        divergence += float(((theirs.exp() * (theirs - ours)).sum(-1) * real).sum())
        same += int(((ours.argmax(-1) == theirs.argmax(-1)) & real).sum())
    return Scores(torch.cat(nats).double().numpy(), divergence / text.tokens, same / text.tokens)


def measured(model: Decoder, original: Decoder, text: Text, before: Scores) -> dict[str, Any]:
    found = score(model, original, text)
    difference = found.nats - before.nats
    total = float(before.nats.sum())
    return {
        "bits_per_byte": float(found.nats.sum()) / math.log(2) / text.bytes,
        "loss": float(difference.sum()) / total,
        "standard_error": float(difference.std(ddof=1)) * math.sqrt(len(difference)) / total,
        "kl_per_token": found.divergence,
        "top_agreement": found.agreement,
    }


def trained(out: Path, minutes: float, wide: bool) -> tuple[Path, Path]:
    """A model trained in bfloat16 on one thread, and its tokens."""
    model = {"max_position_embeddings": 256, **(WIDE if wide else {"preset": "qwen3-1m"})}
    rates = {"learning_rate": 8e-3, "matrix_learning_rate": 4e-3} if wide else {}
    pretrain = {"minutes": minutes, "dtype": "bfloat16", "optimizer": "muon", "learning_rate": 1e-2, "threads": 1, **rates}
    made = bessemer.pipeline.api.run(
        "quickstart",
        {"model": model, "pretrain": {"matrix_learning_rate": 5e-3, **pretrain}},
        name="wide" if wide else "small",
        runs=out / "runs",
        until="pretrain",
        progress=PlainLines(interval=30),
    )
    return made.folder / "stages" / "pretrain" / "model", made.folder / "tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model, in place of one that is trained here")
    parser.add_argument("--tokens", type=Path, help="its tokens: a folder with train and validation")
    parser.add_argument("--minutes", type=float, default=12, help="of training")
    parser.add_argument("--wide", action="store_true", help="train 5.8M parameters in place of 1.3M")
    parser.add_argument("--tokens-compared", type=int, default=100_000, help="held-out tokens")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration text")
    parser.add_argument("--out", type=Path, default=Path("runs/quantisation"), help="folder of the training")
    parser.add_argument("--result", help="name of the result, for a model that is given")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder, tokens = arguments.model, arguments.tokens
    if folder is None or tokens is None:
        folder, tokens = trained(arguments.out, arguments.minutes, arguments.wide)
    original = load_model(folder)
    context = min(original.config.max_position_embeddings, 512)
    text = text_of(TokenShards(tokens / "validation"), context, arguments.tokens_compared)
    rows = calibration_rows(TokenShards(tokens / "train"), tokens=65_536, length=context, seed=arguments.seed)
    before = score(original, original, text)
    record: dict[str, Any] = {
        "parameters": original.config.parameters(),
        "bytes": weight_bytes(folder),
        "bits_per_byte": float(before.nats.sum()) / math.log(2) / text.bytes,
        "tokens_compared": text.tokens,
        "arms": {},
    }
    print(json.dumps(record), flush=True)
    for name in arguments.arms:
        settings = ARMS[name]
        model = load_model(folder)
        start = time.perf_counter()
        quantise(model, QuantizeConfig.parse({"head": "none", **settings}), rows)
        seconds = time.perf_counter() - start
        with TemporaryDirectory() as place:
            save_model(model, Path(place), tokenizer=None)
            size = weight_bytes(Path(place))
        arm = measured(model, original, text, before) | {"bytes": size, "seconds": seconds}
        if BASELINE in record["arms"]:
            arm["loss_to_rtn"] = arm["loss"] / record["arms"][BASELINE]["loss"]
            arm["kl_to_rtn"] = arm["kl_per_token"] / record["arms"][BASELINE]["kl_per_token"]
        record["arms"][name] = arm
        print(json.dumps({"arm": name} | arm), flush=True)
    print(json.dumps(record))
    result = arguments.result or (None if arguments.model else f"quantisation_{'wide' if arguments.wide else 'small'}")
    if result is None or list(arguments.arms) != list(ARMS):
        print("no result is written: not every arm was measured, or --result does not name it")
        return
    arms = {name.replace(",", "").replace(" ", "_"): arm for name, arm in record["arms"].items()}
    recording.save(result, record | {"arms": arms}, tables={"arms": table_of(record)})


def table_of(record: dict[str, Any]) -> dict[str, Any]:
    """A row for the model as it is, and one for each arm."""
    rows: list[list[Any]] = [["as it is", "", "", None, record["bytes"] / 1e6]]
    rows += [
        [
            name,
            f"{100 * arm['loss']:.3f} % ± {100 * arm['standard_error']:.3f}",
            f"{arm['kl_per_token']:.{4 if arm['kl_per_token'] >= 1e-4 else 5}f}",
            arm["top_agreement"],
            arm["bytes"] / 1e6,
        ]
        for name, arm in record["arms"].items()
    ]
    columns = [("", ""), ("loss of bits per byte", ""), ("KL a token", ""), ("same token", ".1%"), ("file, MB", ",.1f")]
    return recording.table(columns, rows)


if __name__ == "__main__":
    main()
