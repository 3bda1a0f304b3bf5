"""What both sides of `posttraining.py` are given: a model that both open, examples and pairs as tokens, and prompts.

Models: `1m`, the quickstart's shape, after a short training on Python's own sources; `135m`, SmolLM2-135M-Instruct. Text is
documented functions of Python's library: the line that begins a function is the prompt, what its documentation says the answer;
of a pair the rejected answer is what the next one's documentation says.
"""

from __future__ import annotations

import ast
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bessemer.tokenization.tokenizer import Tokenizer

#: Most tokens of a row, of either side.
CONTEXT = 256
VOCABULARY = 4096
#: Steps, rows and tokens of a row of the training that makes the small model's weights.
STEPS, ROWS, LENGTH = 80, 16, 256
#: Prompts of reinforcement learning, none of them read twice in a run. All have this many tokens, the begin token among them.
PROMPTS, PROMPT_TOKENS = 256, 16
REWARD = '''"""The share of vowels among a completion's characters: it differs within every group."""


def vowels(completions, **kwargs):
    return [sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text)) for text in completions]
'''


@dataclass(frozen=True)
class Subject:
    """A folder with `model/`, `examples.jsonl` of prompts and completions, `pairs.jsonl`, `prompts.jsonl` and `rewards.py`."""

    folder: Path

    @property
    def model(self) -> Path:
        """The model's folder, of float32 weights."""
        return self.folder / "model"

    def examples(self) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of every example, in the order of `examples.jsonl`: -100 where the prompt is."""
        return list(json.loads((self.folder / "examples.json").read_text(encoding="utf-8")))

    def pairs(self) -> list[dict[str, list[int]]]:
        """`prompt_ids`, `chosen_ids` and `rejected_ids` of every pair, in the order of `pairs.jsonl`."""
        return list(json.loads((self.folder / "pairs.json").read_text(encoding="utf-8")))

    def texts_of_pairs(self) -> list[dict[str, str]]:
        """The same as `prompt`, `chosen` and `rejected`."""
        return [json.loads(line) for line in (self.folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]

    def prompts(self) -> list[str]:
        """The texts that are continued."""
        return [json.loads(line)["prompt"] for line in (self.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]

    @property
    def targets(self) -> int:
        """Tokens of all answers, with their end tokens."""
        return sum(label >= 0 for example in self.examples() for label in example["labels"])


def prepare(name: str, work: Path, rows: int, gguf: Path | None = None) -> Subject:
    """Make a subject, the model only once. rows: of `CONTEXT` tokens, that the examples fill when packed, and so the pairs.

    gguf: SmolLM2's file, for `135m`.
    """
    subject = Subject(work / f"posttraining-{name}")
    subject.folder.mkdir(parents=True, exist_ok=True)
    if not (subject.model / "model.safetensors").exists():
        if name == "1m":
            _small_model(subject.folder)
        else:
            assert gguf is not None
            _imported_model(gguf, subject.model)
    _write_texts(subject, rows)
    return subject


def _small_model(folder: Path) -> None:
    import torch

    from bessemer.distributed.mesh import ALONE
    from bessemer.model.config import ModelStageConfig
    from bessemer.model.stage import build_model
    from bessemer.model.storage.folder import load_model, save_model
    from bessemer.tokenization.algorithms import train_vocabulary
    from bessemer.tokenization.control_tokens import control_tokens
    from bessemer.tokenization.folder import write_folder
    from bessemer.tokenization.tokenizer import load_tokenizer
    from bessemer.training.data.batch import Batch
    from bessemer.training.model_setup import prepare_model
    from bessemer.training.objectives import build_objective
    from bessemer.training.optim.optimizers import build_optimizers
    from bessemer.training.pretrain_config import PretrainConfig
    from bessemer.training.runtime import Runtime
    from bessemer.training.trainer import Trainer

    texts = [path.read_text(encoding="utf-8") for path in _sources()]
    parts = train_vocabulary(texts, "bpe", VOCABULARY - len(control_tokens("chatml")))
    write_folder(folder / "tokenizer", parts)
    unfinished = folder / "unfinished"
    build_model(ModelStageConfig.parse({"preset": "qwen3-1m"}), folder / "tokenizer", unfinished, seed=1)
    tokens = torch.tensor(load_tokenizer(folder / "tokenizer").encode("\n".join(texts), add_bos=False))
    config = PretrainConfig(steps=STEPS, learning_rate=3e-3, optimizer="adamw", dtype="float32", compile=False)
    runtime = Runtime.of(config, torch.device("cpu"))
    model = load_model(unfinished / "model")
    with runtime.running():
        prepared = prepare_model(model, config, runtime, ALONE)
        optimizers = build_optimizers(prepared.model, config)
        trainer = Trainer(prepared.model, optimizers, build_objective(config, model.config), runtime, gradient_clip=1.0)
        draw = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            starts = torch.randint(0, len(tokens) - LENGTH - 1, (ROWS,), generator=draw).tolist()
            rows_BT = torch.stack([tokens[start : start + LENGTH + 1] for start in starts])
            trainer.step(Batch(rows_BT[:, :-1], rows_BT[:, 1:]))
    save_model(model, unfinished / "model", tokenizer=unfinished / "model")
    (unfinished / "model").rename(folder / "model")


def _imported_model(gguf: Path, folder: Path) -> None:
    import torch

    from bessemer.model.formats.gguf_import import import_gguf

    unfinished = folder.with_name("unfinished")
    import_gguf(gguf, unfinished, dtype=torch.float32)
    unfinished.rename(folder)


def _write_texts(subject: Subject, rows: int) -> None:
    from bessemer.posttraining.data.encoding import encode_answer
    from bessemer.tokenization.tokenizer import load_tokenizer
    from bessemer.training.data.packing import best_fit

    tokenizer = load_tokenizer(subject.model)
    texts: list[dict[str, str]] = []
    examples: list[dict[str, list[int]]] = []
    prompts: dict[str, None] = {}
    for prompt, answer in _documented():
        encoded = encode_answer(prompt, answer, tokenizer)
        begin = int(encoded.is_learnt.argmax())
        if begin >= PROMPT_TOKENS and len(prompts) < PROMPTS:
            # cut behind so many tokens: texts that are encoded to the same tokens again
            text = tokenizer.decode(encoded.ids[:PROMPT_TOKENS].tolist())
            if tokenizer.encode(text) == encoded.ids[:PROMPT_TOKENS].tolist():
                prompts[text] = None
        # no room is left in the row of either side, which holds the inputs alone or the last target too
        if len(encoded.ids) > CONTEXT:
            continue
        texts.append({"prompt": prompt, "completion": answer})
        examples.append({"input_ids": encoded.ids.tolist(), "labels": _labels(encoded.ids.tolist(), begin)})
    # the peer's rows hold the last target too: with as many as it needs, a pass has as many updates on either side
    lengths = [len(example["input_ids"]) for example in examples]

    def filled(examples: int) -> int:
        return int(best_fit(lengths[:examples], CONTEXT).max()) + 1

    count = _most(len(lengths), filled, rows)
    _write_lines(subject.folder / "examples.jsonl", texts[:count])
    (subject.folder / "examples.json").write_text(json.dumps(examples[:count]), encoding="utf-8")
    assert len(prompts) == PROMPTS, len(prompts)
    _write_lines(subject.folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    (subject.folder / "rewards.py").write_text(REWARD, encoding="utf-8")
    assert filled(count) == rows
    _write_pairs(subject, texts, tokenizer, rows)


def _write_pairs(subject: Subject, texts: list[dict[str, str]], tokenizer: Tokenizer, rows: int) -> None:
    from bessemer.posttraining.data.encoding import encode_answer
    from bessemer.posttraining.data.formats import as_pair
    from bessemer.posttraining.data.packing import pack_pairs

    pairs: list[dict[str, str]] = []
    ids: list[dict[str, list[int]]] = []
    for one, other in pairwise(texts):
        pair = {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        sides = [encode_answer(pair["prompt"], pair[side], tokenizer) for side in ("chosen", "rejected")]
        # nothing is cut off, and it makes no difference whether prompt and answer are encoded together
        fits = all(len(side.ids) <= CONTEXT // 2 for side in sides)
        together = [tokenizer.encode(pair["prompt"] + pair[side]) for side in ("chosen", "rejected")]
        if pair["chosen"] == pair["rejected"] or not fits or [side.ids[:-1].tolist() for side in sides] != together:
            continue
        pairs.append(pair)
        begin = int(sides[0].is_learnt.argmax())
        chosen, rejected = (side.ids[begin:].tolist() for side in sides)
        ids.append({"prompt_ids": sides[0].ids[:begin].tolist(), "chosen_ids": chosen, "rejected_ids": rejected})
    parsed = [as_pair(pair) for pair in pairs]

    def filled(count: int) -> int:
        return pack_pairs(parsed[:count], tokenizer, CONTEXT, shares_prompts=True).rows

    # each row holds some pairs, few of them more than ten
    count = _most(min(len(pairs), 12 * rows), filled, rows)
    assert filled(count) == rows
    _write_lines(subject.folder / "pairs.jsonl", pairs[:count])
    (subject.folder / "pairs.json").write_text(json.dumps(ids[:count]), encoding="utf-8")


def _labels(ids: list[int], begin: int) -> list[int]:
    return [-100] * begin + ids[begin:]


def _most(count: int, filled: Callable[[int], int], rows: int) -> int:
    """How many of so many examples fill as many rows at most. filled: the rows that some examples take."""
    low, high = 1, count
    while low < high:
        middle = (low + high + 1) // 2
        if filled(middle) <= rows:
            low = middle
        else:
            high = middle - 1
    return low


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _sources() -> list[Path]:
    """Files of Python's library, without its tests and packages."""
    return sorted(Path(inspect.getfile(ast)).parent.glob("*.py"))


def _documented() -> Iterator[tuple[str, str]]:
    """The beginning and the documentation of every documented function and class."""
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (said := ast.get_docstring(node)):
                yield f"# {path.stem}\n{lines[node.lineno - 1].strip()}\n", said
