"""What are tools worth to a small agent, and does GRPO on tool tasks help with tools that it never saw?

    python benchmarks/tool_agents.py [--seeds 3] [--out FOLDER]      # three quarters of an hour on one core

Tasks of `tool_agents_world.py`: a question, and two tools of which one answers it. SmolLM2-135M takes minutes an update, so
that the model is a small one of our own. It is tuned on demonstrations with tools of the part "trained", and stopped when it
calls in the right form and errs often. From there the stage `rl` trains it by GRPO, once for each seed, on other tasks of the
same tools, in episodes on the engine, whose only reward is a right last message. Asked are, greedily, tasks that no stage has
seen: of tools of that part, and of tools whose nouns, names, descriptions and arguments no stage has seen; with the tools, and
without (a share of the demonstrations has none, so that an answer without a call is a form that the model knows). Nothing is
timed. GRPO's settings were chosen by one seed on other tasks, of trained tools and of a third part of tools.

The gain is of the same tasks before and after GRPO. Its intervals are of 95 %: over the tasks, with a task of all seeds as a
cluster, and over the seeds' means alone (Student's t, two degrees of freedom with three seeds). `--out` keeps what is finished:
a run that was stopped goes on. Result: `tool_agents.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import recording
from bessemer.assistant.assistant import Assistant, EngineModel
from bessemer.assistant.conversation import AssistantConfig
from bessemer.assistant.episodes import play
from bessemer.core.metrics import read_metrics
from bessemer.core.progress import PlainLines
from bessemer.core.statistics import Estimate, mean_estimate, paired_difference
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.model.config import ModelStageConfig
from bessemer.model.stage import build_model
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.stage import rl
from bessemer.posttraining.sft.config import SFTConfig
from bessemer.posttraining.sft.stage import sft
from bessemer.tokenization.bpe import byte_level_bpe, train_bpe
from bessemer.tokenization.control_tokens import END_OF_TEXT, control_tokens
from bessemer.tokenization.folder import AddedToken, TokenizerContent
from bessemer.tokenization.split import SPLIT_REGEXES
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from tool_agents_world import NoTools, World, demonstration, drawn_tasks

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/posttraining/rl",
    "src/bessemer/posttraining/sft",
    "src/bessemer/assistant",
    "benchmarks/tool_agents_world.py",
)

#: Tools in a line each, since JSON schemas would be half of all tokens; calls and results in Hermes' form.
TEMPLATE = r"""{{- bos_token -}}
{%- if tools -%}
    {{- '<|im_start|>system' -}}
    {%- for tool in tools -%}
        {%- set keys = tool.function.parameters.properties | list -%}
        {{- '\n"name": ' + (tool.function.name | tojson) + ', ' + tool.function.description + ' {"' + keys[0] -}}
        {{- '":' + (', "' + keys[1] + '":' if keys | length > 1 else '') -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' + (message.content or '') -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '<tool_call>\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' -}}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
MERGES, SPLIT = 110, "qwen2"
MODEL = {"preset": "qwen3-1m", "max_position_embeddings": 256}
BASE_SEED = 7
#: Demonstrations of a lesson and the share of them without tools; tasks of GRPO, of each test, and those that end the lessons.
DEMONSTRATIONS, WITHOUT, PROMPTS, TESTED, DECIDING = 2000, 0.15, 4000, 500, 80
#: The share of tasks that is solved when demonstrations end and rewards begin.
ENOUGH, MOST_LESSONS = 0.5, 16
SFT: dict[str, Any] = {
    "data": ["demonstrations.jsonl"],
    "validation_share": 0.0,
    "steps": 60,
    "batch_size": 16,
    "context_length": 256,
    "optimizer": "muon",
    "learning_rate": 5e-3,
    "decay_fraction": 0.4,
    "dtype": "float32",
    "compile": False,
    "diagnostics_every": 0,
    "threads": 1,
}
RL: dict[str, Any] = {
    "data": ["tasks.jsonl"],
    "chat": True,
    "environment": "tool_agents_world.py:World",
    "rewards": ["environment"],
    "validation_share": 0.0,
    "algorithm": "grpo",
    "steps": 60,
    "group_size": 16,
    "batch_size": 256,
    "dynamic_sampling": True,
    "max_tokens": 100,
    "context_length": 256,
    "optimizer": "muon",
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "decay_fraction": 0.4,
    "diagnostics_every": 0,
    "threads": 1,
}
HERE = Path(__file__).resolve().parent
TESTS = ("trained", "unseen")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tokenizer(folder: Path, texts: Sequence[str] = ()) -> None:
    """Bytes, merges of the texts, and ChatML's control tokens, with the template above."""
    tokens = train_bpe(texts, MERGES, SPLIT_REGEXES[SPLIT]) if texts else [bytes([byte]) for byte in range(256)]
    parts = byte_level_bpe(tokens, SPLIT)
    added = [
        AddedToken(id, token, special=True) for id, token in enumerate(control_tokens("chatml", 0, False), start=parts.size)
    ]
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    TokenizerContent(parts, tuple(added), roles, add_bos=True, chat_template=TEMPLATE).write(folder)


def words_of_the_form(tokenizer: Tokenizer, tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The demonstrations as text without nouns, names and numbers, which are then spelt alike whether they were seen or not."""
    texts = []
    for task in tasks:
        row = demonstration(task, with_tools=True)
        text = "".join(segment.text for segment in tokenizer.render_chat(row["messages"], tools=row["tools"]))
        own = [word for spec in task["tools"] for word in (*spec["name"].split("_"), *spec["keys"])]
        for word in (*own, *map(str, task["call"]["arguments"].values())):
            text = text.replace(word, "")
        texts.append(text)
    return texts


def tuned(out: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The model after its demonstrations, and what it solved of the tasks that decided where they end.

    Lessons of new demonstrations follow each other until it solves the share `ENOUGH` of those tasks, whose tools are trained.
    """
    lessons: list[dict[str, Any]] = []
    model = out / "new" / "model"
    if not model.is_dir():
        write_tokenizer(out / "bytes")
        texts = words_of_the_form(load_tokenizer(out / "bytes"), drawn_tasks("trained", 1000, "words"))
        write_tokenizer(out / "tokenizer", texts)
        build_model(ModelStageConfig.parse(MODEL), out / "tokenizer", out / "new", seed=BASE_SEED)
    while not lessons or lessons[-1]["solved"] < ENOUGH:
        number = len(lessons) + 1
        folder = out / f"lesson-{number}"
        if not (folder / "model").is_dir():
            tasks = drawn_tasks("trained", DEMONSTRATIONS, f"demonstrations {number}")
            rows = [demonstration(task, with_tools=place >= WITHOUT * len(tasks)) for place, task in enumerate(tasks)]
            write_rows(folder / "demonstrations.jsonl", rows)
            sft(SFTConfig.parse(SFT), model, None, folder, seed=number, folder=folder, progress=PlainLines(interval=60))
        model = folder / "model"
        found = solved(
            model, folder / "solved.json", {"trained": drawn_tasks("trained", DECIDING, "deciding")}, {"with": World}
        )
        lessons.append({"steps": number * SFT["steps"], "solved": float(np.mean(found["trained"]["with"]))})
        print(f"lesson {number}: {lessons[-1]}", flush=True)
        if number == MOST_LESSONS:
            raise SystemExit(f"{number} lessons are not enough")
    return model, lessons


def rewarded(model: Path, seed: int, out: Path) -> Path:
    """The model after GRPO."""
    done = out / "rl" / "model"
    if not done.is_dir():
        tasks = drawn_tasks("trained", PROMPTS, f"rewarded {seed}")
        write_rows(out / "tasks.jsonl", [{"prompt": task["question"], **task} for task in tasks])
        (out / "tool_agents_world.py").write_bytes((HERE / "tool_agents_world.py").read_bytes())
        (out / "rl").mkdir(exist_ok=True)
        rl(RLConfig.parse(RL), model, out / "rl", seed=seed, folder=out, progress=PlainLines(interval=60))
    return done


#: What is asked of one model, by the tools' part and whether they are offered: 1.0 where a task is solved.
Solved = dict[str, dict[str, list[float]]]


def solved(
    model: Path, kept: Path, tasks_of: Mapping[str, Sequence[Mapping[str, Any]]], kinds: Mapping[str, type[World]]
) -> Solved:
    if not kept.exists():
        params = SamplingParams(max_tokens=RL["max_tokens"], temperature=0)
        found: Solved = {}
        with Engine(model, device="cpu") as engine:
            assistant = Assistant(EngineModel(engine), config=AssistantConfig(max_rounds=4))
            for part, tasks in tasks_of.items():
                for name, kind in kinds.items():
                    episodes = play(assistant, [kind() for _ in tasks], tasks, params)
                    # an episode that broke off, at the context's end for example, is not solved
                    scores = [0.0 if episode.failure else episode.total for episode in episodes]
                    found.setdefault(part, {})[name] = scores
        kept.write_text(json.dumps(found), encoding="utf-8")
    values: Solved = json.loads(kept.read_text(encoding="utf-8"))
    return values


def tested(model: Path, kept: Path, whose: str) -> Solved:
    """The tests that are the same for all models."""
    found = solved(
        model, kept, {part: drawn_tasks(part, TESTED, f"test {part}") for part in TESTS}, {"with": World, "without": NoTools}
    )
    shares = {part: {name: round(float(np.mean(scores)), 3) for name, scores in of.items()} for part, of in found.items()}
    print(f"{whose}: {shares}", flush=True)
    return found


def one_seed(seed: int, base: Path, before: Solved, out: Path) -> dict[str, Any]:
    after = tested(rewarded(base, seed, out), out / "after.json", f"seed {seed}, after GRPO")
    lines = list(read_metrics(out / "rl" / "metrics.jsonl"))
    rewards = [[line["step"], line["reward"]] for line in lines if line.get("reward") is not None]
    return {"seed": seed, "before": before, "after": after, "rewards": rewards}


def as_figures(estimate: Estimate) -> dict[str, float]:
    low, high = estimate.interval(bounds=(-1.0, 1.0))
    return {"mean": estimate.mean, "low": low, "high": high}


def difference(seeds: Sequence[Mapping[str, Any]], part: str, new: tuple[str, str], old: tuple[str, str]) -> dict[str, Any]:
    """How much more is solved, over tasks (each a cluster of its seeds) and over the seeds' means. new, old: when, and how."""
    one, other = (np.array([seed[when][part][how] for seed in seeds]) for when, how in (new, old))
    clusters = np.tile(np.arange(one.shape[1]), len(seeds))
    return {
        "over_tasks": as_figures(paired_difference(one.ravel(), other.ravel(), clusters)),
        "over_seeds": as_figures(mean_estimate((one - other).mean(axis=1))),
        "by_seed": (one - other).mean(axis=1).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-tool-agents", help="what is finished"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base, lessons = tuned(arguments.out)
    before = tested(base, arguments.out / "before.json", "before")
    seeds = [one_seed(seed, base, before, arguments.out / str(seed)) for seed in range(1, arguments.seeds + 1)]
    gains = {part: difference(seeds, part, ("after", "with"), ("before", "with")) for part in TESTS}
    worth = {part: difference(seeds, part, ("after", "with"), ("after", "without")) for part in TESTS}
    figures = {
        "lessons": lessons,
        "seeds": seeds,
        "gain": gains,
        "worth_of_tools": worth,
        "settings": {"tested": TESTED, "enough": ENOUGH, "sft": SFT, "rl": RL, "model": MODEL},
    }

    def share(when: str, part: str, how: str) -> float:
        return float(np.mean([seed[when][part][how] for seed in seeds]))

    def interval(found: Mapping[str, float]) -> list[float]:
        return [100 * found["low"], 100 * found["high"]]

    rows = [
        [
            {"trained": "trained tools, unseen tasks", "unseen": "unseen tools"}[part],
            *(share(when, part, how) for how in ("without", "with") for when in ("before", "after")),
            100 * gains[part]["over_tasks"]["mean"],
            interval(gains[part]["over_tasks"]),
            interval(gains[part]["over_seeds"]),
        ]
        for part in TESTS
    ]
    columns = [
        *(("", ""), ("without tools, before", ".1%"), ("after", ".1%"), ("with tools, before", ".1%"), ("after GRPO", ".1%")),
        *(("gain, points", "+.1f"), ("95 %, tasks", "+.1f"), ("95 %, seeds", "+.1f")),
    ]
    print(json.dumps({"gain": gains, "worth_of_tools": worth}, indent=1))
    print(recording.save("tool_agents", figures, tables={"solved": recording.table(columns, rows)}, peers=["torch"]))


if __name__ == "__main__":
    main()
