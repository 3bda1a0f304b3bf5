"""Does a real model learn what people prefer? SmolLM2-135M-Instruct on pairs of a polite and a rude answer.

    python benchmarks/tone.py [--data FOLDER] [--seeds 1 2 3] [--out FOLDER]    # an hour on two cores
    python benchmarks/tone.py --harmless                                         # pairs that people judged, one seed
    python benchmarks/tone.py --variants                                         # other ways to DPO, two hours more

1,100 instructions with a polite and a rude answer (`instructions_polite_1100.json`), of which one in five is held out by its
prompt, another fifth with each seed. Trained on the others:

- a reward model, by the stage `reward`: the share of held-out pairs whose polite answer has the higher reward;
- DPO, by the stage `preference`: the same of the implicit reward, in float32, and bits per byte of held-out plain answers
  before and after, so that nothing is forgotten for it.

`--variants` are tried beside DPO on the same splits, each measured by the reward that it trains:

- `chosen_first`: the stage `sft` on the chosen answers, from which DPO then starts (as in Rafailov et al. 2023, section 6);
- `norm`: the loss `sigmoid_norm`, in which length does not count: the mean log-ratio of a token (Lambert et al. 2024, Tülu 3);
- `margin`: the loss `simpo`, of mean log-probabilities and a margin, without a reference (Meng et al. 2024);
- `averaged`: an average of the weights over the run in place of the last ones;
- `chosen_first_norm_averaged`: three of these together.

Beside them on the same split a classifier that needs no model: naive Bayes over the words and pairs of words of an answer; and
the longer answer. `--harmless` measures the reward model on dialogues that people judged, beside chance and length. Nothing is
timed, so other work does no harm, and two of these may run beside each other (`--methods`, `--threads 1`): what is finished in
the folder is not done again. Result: `tone.json`, `tone_variants.json`, or `tone_harmless.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.core.progress import progress_for_terminal  # noqa: E402
from bessemer.core.store import read_json, write_json  # noqa: E402
from bessemer.model.storage.folder import load_model  # noqa: E402
from bessemer.posttraining.data.examples import (  # noqa: E402
    Conversation,
    prompt_key,
    read_examples,
)
from bessemer.posttraining.data.formats import Answered, Pair, as_pair  # noqa: E402
from bessemer.posttraining.data.packing import (  # noqa: E402
    pack_conversations,
    pack_pairs,
)
from bessemer.posttraining.data.splitting import opening, split_examples  # noqa: E402
from bessemer.posttraining.preference.config import PAIR_LOSSES, PreferenceConfig  # noqa: E402
from bessemer.posttraining.preference.stage import preference  # noqa: E402
from bessemer.posttraining.rewards.config import RewardConfig  # noqa: E402
from bessemer.posttraining.rewards.stage import reward  # noqa: E402
from bessemer.posttraining.sft.config import SFTConfig  # noqa: E402
from bessemer.posttraining.sft.stage import sft  # noqa: E402
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from bessemer.training.head import target_log_probs  # noqa: E402
from bessemer.training.objectives import token_losses  # noqa: E402
from evaluation_agreement import WORK  # noqa: E402
from evaluation_tasks import float32_folder  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/posttraining", "src/bessemer/training", "src/bessemer/model", "src/bessemer/inference")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "preference"
SHARE, PLAIN = 0.2, 200
#: What all seeds, and both methods, train with.
SETTINGS: dict[str, Any] = {
    "validation_share": SHARE,
    "context_length": 512,
    "dtype": "bfloat16",
    "compile": True,
    "diagnostics_every": 0,
    "evaluate_every": 1000,
}
REWARD = SETTINGS | {"epochs": 3, "batch_size": 1, "learning_rate": 3e-4, "adapter": {"rank": 16}}
DPO = SETTINGS | {
    "epochs": 2,
    "batch_size": 2,
    "learning_rate": 1e-5,
    "beta": 1.0,
    "label_smoothing": 0.05,
    "next_token_weight": 0.1,
}
#: What is tuned on the chosen answers before DPO.
CHOSEN = SETTINGS | {"epochs": 1, "batch_size": 2, "learning_rate": 1e-5}
#: The average forgets a weight in some forty of a run's hundreds of steps.
_NORM, _AVERAGED = {"loss": "sigmoid_norm", "beta": 10.0}, {"ema": 0.975, "save": "ema"}


@dataclass(frozen=True)
class Variant:
    """Another way to DPO: whether the chosen answers are learnt first, and settings in place of DPO's."""

    label: str
    chosen_first: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def preference(self) -> dict[str, Any]:
        """The settings of the stage `preference`."""
        settings = DPO | dict(self.settings)
        return {name: value for name, value in settings.items() if value is not None}


VARIANTS = {
    "chosen_first": Variant("DPO after the chosen answers", chosen_first=True),
    "norm": Variant("DPO by the mean log-ratio of a token", settings=(*_NORM.items(),)),
    "margin": Variant(
        "SimPO: mean log-probabilities and a margin",
        settings=(("loss", "simpo"), ("beta", 4.0), ("margin", 2.0), ("next_token_weight", 0.1)),
    ),
    "averaged": Variant("DPO, averaged weights", settings=(*_AVERAGED.items(),)),
    "chosen_first_norm_averaged": Variant("all three", chosen_first=True, settings=(*_NORM.items(), *_AVERAGED.items())),
}
HARMLESS = REWARD | {"epochs": 1, "context_length": 512, "batch_size": 2}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The instructions with their answers as rows of pairs, each with its plain answer."""
    rows = []
    for given in json.loads(path.read_text(encoding="utf-8")):
        asked = "\n\n".join(part for part in (given["instruction"], given["input"]) if part)
        answers = {key: [{"role": "assistant", "content": given[key]}] for key in ("chosen", "rejected", "output")}
        rows.append({"prompt": [{"role": "user", "content": asked}], **answers})
    return rows


# --- what needs no model ------------------------------------------------------------------------------------------


def features(pair: Pair, side: str) -> list[str]:
    """Words and pairs of words of an answer."""
    words = ["^", *re.findall(r"\w+|[^\w\s]", getattr(pair, side)[0]["content"].lower()), "$"]
    return [*words[1:-1], *(f"{first} {second}" for first, second in pairwise(words))]


def bigram_accuracy(training: Sequence[Pair], held_out: Sequence[Pair]) -> float:
    """Share of held-out pairs whose chosen answer naive Bayes finds likelier to be a chosen one; counts are smoothed by one."""
    counts = {side: Counter(word for pair in training for word in features(pair, side)) for side in ("chosen", "rejected")}
    vocabulary = len(counts["chosen"] | counts["rejected"])
    totals = {side: sum(of_side.values()) + vocabulary for side, of_side in counts.items()}

    def score(words: Iterable[str]) -> float:
        each = (
            math.log((counts["chosen"][word] + 1) / totals["chosen"] / (counts["rejected"][word] + 1) * totals["rejected"])
            for word in words
        )
        return sum(each)

    return _share(score(features(pair, "chosen")) - score(features(pair, "rejected")) for pair in held_out)


def longer_accuracy(held_out: Sequence[Pair]) -> float:
    """Share of pairs whose chosen answer is the longer one."""
    return _share(len(pair.chosen[0]["content"]) - len(pair.rejected[0]["content"]) for pair in held_out)


def _share(differences: Iterable[float]) -> float:
    """Share of differences above 0; one of exactly 0 is right half of the time."""
    each = [0.5 + 0.5 * ((value > 0) - (value < 0)) for value in differences]
    return sum(each) / len(each)


# --- the model ----------------------------------------------------------------------------------------------------


def bits_per_byte(folder: Path, rows: Sequence[dict[str, Any]]) -> float:
    """Bits per byte of the plain answers of rows, given their prompts."""
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    asked = [Conversation(Answered(tuple(row["prompt"]), tuple(row["output"])), "plain") for row in rows]
    packed = pack_conversations(asked, tokenizer, 512)
    nats = sum(float(token_losses(model, packed.batch.rows(slice(row, row + 1))).sum()) for row in range(packed.rows))
    return nats / math.log(2) / sum(len(row["output"][0]["content"].encode()) for row in rows)


@torch.no_grad()
def implicit_accuracy(policy: Path, reference: Path | None, pairs: Sequence[Pair], *, per_token: bool = False) -> float:
    """Share of pairs whose chosen answer has the higher implicit reward, log π − log π_ref, in float32; without a reference
    log π. per_token: the mean over an answer's tokens in place of the sum."""
    tokenizer = load_tokenizer(policy)
    packed = pack_pairs(pairs, tokenizer, SETTINGS["context_length"], shares_prompts=True)
    rewards_BS = torch.zeros(packed.rows, packed.batch.sequences)
    for folder, sign in ((policy, 1), (reference, -1)):
        if folder is None:
            continue
        model = load_model(folder).eval()
        for row in range(packed.rows):
            batch = packed.batch.rows(slice(row, row + 1))
            log_probs_BT, _ = target_log_probs(model, model.hidden(**batch.inputs), batch.targets_BT)
            tokens_S = batch.sequence_sums((batch.targets_BT >= 0).float())[0].clamp(min=1) if per_token else 1.0
            rewards_BS[row] += sign * batch.sequence_sums(log_probs_BT)[0] / tokens_S
    is_pair_BP = packed.batch.per_sequence["pair_weight"][:, 0::2] > 0
    return _share((rewards_BS[:, 0::2] - rewards_BS[:, 1::2])[is_pair_BP].tolist())


@dataclass(frozen=True)
class Split:
    """Pairs to learn from and those held out, and rows with plain answers to held-out prompts; `data` is the file of all."""

    data: Path
    training: Sequence[Pair]
    held_out: Sequence[Pair]
    plain: Sequence[dict[str, Any]]


def split_of(seed: int, rows: Sequence[dict[str, Any]], folder: Path) -> Split:
    """The split of a seed."""
    data = folder / "pairs.jsonl"
    written = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in written if row["chosen"] != row["rejected"]), encoding="utf-8")
    pairs = read_examples(data, as_pair)
    training, held_out = split_examples(pairs, lambda pair: opening(pair.prompt), SHARE, seed)
    kept = {prompt_key(pair.prompt) for pair in held_out}
    return Split(data, training, held_out, [row for row in rows if prompt_key(tuple(row["prompt"])) in kept][:PLAIN])


def without_model(split: Split, tokenizer: Tokenizer) -> dict[str, Any]:
    """What needs no model, and the rows that DPO trains on, with prompts shared and without."""
    return {
        "held_out": len(split.held_out),
        "bigrams": bigram_accuracy(split.training, split.held_out),
        "longer": longer_accuracy(split.held_out),
        "plain_answers": len(split.plain),
        **{
            name: pack_pairs(split.training, tokenizer, SETTINGS["context_length"], shares_prompts=shares).rows
            for name, shares in (("rows", False), ("rows_shared", True))
        },
    }


def by_reward_model(split: Split, model: Path, out: Path, common: dict[str, Any]) -> dict[str, Any]:
    """A reward model's ranks."""
    found = reward(RewardConfig.parse({"data": [split.data.name], **REWARD}, "reward"), model, out, **common)
    return {"reward_model": found["held_out_accuracy"]}


def by_dpo(split: Split, model: Path, out: Path, common: dict[str, Any]) -> dict[str, Any]:
    """The implicit reward's ranks, and what it costs elsewhere."""
    preference(PreferenceConfig.parse({"data": [split.data.name], **DPO}, "preference"), model, out, **common)
    before, after = (bits_per_byte(path, split.plain) for path in (model, out / "model"))
    return {
        "dpo": implicit_accuracy(out / "model", model, split.held_out),
        "bits_per_byte_before": before,
        "bits_per_byte_after": after,
        "bits_per_byte_rise": after / before - 1,
    }


def by_variant(name: str, split: Split, model: Path, out: Path, common: dict[str, Any]) -> dict[str, Any]:
    """Another way to DPO; its ranks by the reward that it trains, and what it costs elsewhere."""
    variant, reference = VARIANTS[name], model
    if variant.chosen_first:
        chosen = out.parent / "chosen.jsonl"
        rows = [{"prompt": list(pair.prompt), "completion": list(pair.chosen)} for pair in split.training]
        chosen.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        reference = out.parent / "chosen" / "model"
        if not (reference / "model.safetensors").exists():
            reference.parent.mkdir(exist_ok=True)
            # these are the pairs of the training side already
            config = SFTConfig.parse({"data": [chosen.name], **CHOSEN, "validation_share": 0}, "sft")
            sft(config, model, None, reference.parent, **common)
    config = PreferenceConfig.parse({"data": [split.data.name], **variant.preference}, "preference")
    preference(config, reference, out, **common)
    loss = PAIR_LOSSES.find(config.loss).load()
    ranked = implicit_accuracy(
        out / "model", reference if loss.needs_reference else None, split.held_out, per_token=loss.per_token
    )
    before, after = (bits_per_byte(path, split.plain) for path in (model, out / "model"))
    return {name: ranked, f"{name}_bits_per_byte_rise": after / before - 1}


METHODS = {"reward": by_reward_model, "dpo": by_dpo}
METHODS_AND_VARIANTS = METHODS | {name: partial(by_variant, name) for name in VARIANTS}


def one_seed(seed: int, rows: Sequence[dict[str, Any]], model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of a seed's split, in a folder of its own."""
    folder = arguments.out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    split = split_of(seed, rows, folder)
    found = {"seed": seed, **without_model(split, load_tokenizer(model))}
    common = {"seed": seed, "progress": progress_for_terminal(), "folder": folder}
    for name in arguments.methods:
        done = folder / f"{name}.json"
        if not done.exists():
            (folder / name).mkdir(exist_ok=True)
            write_json(done, METHODS_AND_VARIANTS[name](split, model, folder / name, common))
        found |= read_json(done, "result of a method")
    return found


def tone(arguments: argparse.Namespace) -> Path:
    """The seeds, and their table; where methods are left out, only their part of the work."""
    rows = rows_of(arguments.data / "instructions_polite_1100.json")
    model = float32_folder(arguments.work)
    seeds = []
    for seed in arguments.seeds:
        seeds.append(one_seed(seed, rows, model, arguments))
        print(json.dumps(seeds[-1], indent=1), flush=True)
    if set(arguments.methods) != set(METHODS):
        print("nothing is recorded of some of the methods: run again with all")
        return arguments.out
    shown = {
        "reward model": "reward_model",
        "DPO, implicit reward": "dpo",
        "naive Bayes over words and pairs of words": "bigrams",
        "the longer answer": "longer",
    }
    table = recording.table(
        [("held-out pairs in the right order", ""), ("median", ".1%"), *((f"seed {one['seed']}", ".1%") for one in seeds)],
        [(label, median(one[key] for one in seeds), *(one[key] for one in seeds)) for label, key in shown.items()],
    )
    medians = {key: median(one[key] for one in seeds) for key in (*shown.values(), "bits_per_byte_rise", "rows", "rows_shared")}
    return recording.save(
        "tone", {"seeds": seeds, "median": medians, "settings": {"reward": REWARD, "dpo": DPO}}, tables={"pairs": table}
    )


def variants(arguments: argparse.Namespace) -> Path:
    """The other ways to DPO on the same splits, and their table."""
    rows = rows_of(arguments.data / "instructions_polite_1100.json")
    model = float32_folder(arguments.work)
    seeds = []
    for seed in arguments.seeds:
        seeds.append(one_seed(seed, rows, model, argparse.Namespace(**vars(arguments) | {"methods": arguments.variants})))
        print(json.dumps(seeds[-1], indent=1), flush=True)
    if set(arguments.variants) != set(VARIANTS):
        print("nothing is recorded of some of the variants: run again with all")
        return arguments.out
    shown = {variant.label: name for name, variant in VARIANTS.items()} | {"naive Bayes": "bigrams"}
    table = recording.table(
        [
            *[("held-out pairs in the right order", ""), ("median", ".1%"), *((f"seed {one['seed']}", ".1%") for one in seeds)],
            ("bits per byte of plain answers", "+.1%"),
        ],
        [
            (
                label,
                median(one[key] for one in seeds),
                *(one[key] for one in seeds),
                median(one[f"{key}_bits_per_byte_rise"] for one in seeds) if key in VARIANTS else None,
            )
            for label, key in shown.items()
        ],
    )
    settings = {name: variant.preference for name, variant in VARIANTS.items()} | {"chosen": CHOSEN}
    return recording.save("tone_variants", {"seeds": seeds, "settings": settings}, tables={"pairs": table})


def is_answered(row: dict[str, Any]) -> bool:
    """Whether both dialogues end with something that the assistant says; the stage refuses a file where one does not."""
    try:
        as_pair(row)
    except ValueError:
        return False
    return True


def harmless(arguments: argparse.Namespace) -> Path:
    """A reward model on pairs of dialogues that people judged."""
    model = float32_folder(arguments.work)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "pairs.jsonl"
        lines = (arguments.data / "hh_harmless_1800.jsonl").read_text(encoding="utf-8").splitlines()
        answered = [line for line in lines if is_answered(json.loads(line))]
        data.write_text("\n".join(answered), encoding="utf-8")
        config = RewardConfig.parse({"data": [data.name], **HARMLESS}, "reward")
        (folder / "reward").mkdir()
        found = reward(config, model, folder / "reward", seed=1, progress=progress_for_terminal(), folder=folder)
    figures = {
        key: found[key]
        for key in (
            "held_out_accuracy",
            "held_out_accuracy_low",
            "held_out_accuracy_high",
            "held_out",
            "longer_is_chosen",
            "too_long",
        )
        if key in found
    }
    figures |= {"pairs": found["pairs"], "unanswered": len(lines) - len(answered), "settings": HARMLESS}
    return recording.save("tone_harmless", figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="where the pairs lie")
    parser.add_argument("--work", type=Path, default=WORK, help="the model is kept here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), help="other ways to DPO; all where none is named")
    parser.add_argument("--threads", type=int, help="of this run, where another runs beside it")
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-tone", help="folder whose runs are used"
    )
    parser.add_argument("--harmless", action="store_true", help="the pairs that people judged instead")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        recording.not_run(f"there is no folder {arguments.data} with the pairs")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        for settings in (REWARD, DPO, CHOSEN, HARMLESS):
            settings["threads"] = arguments.threads
    if arguments.variants is not None:
        arguments.variants = arguments.variants or list(VARIANTS)
        print(variants(arguments))
        return
    print((harmless if arguments.harmless else tone)(arguments))


if __name__ == "__main__":
    main()
