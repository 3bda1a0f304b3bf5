"""Lines of held-out files, filled in from what stands around them: `python fill_in.py [RUN] [STAGE]` after the recipe.

Single-line infilling (Bavarian et al. 2022): a line is taken out, and the model is asked for it. Beside the share of lines
that come back exactly: the bits per byte of the line that stood there, with the text after it, in both orders, and without. A
model that is too small to write the line shows there what it makes of the suffix. Needs what `recipe.yaml` needs.
"""

import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from bessemer import Engine, SamplingParams
from bessemer.data.corpus.reader import iterate_documents
from bessemer.tokenization.prompts import infill_prompt

LINES_BEFORE, LINES_AFTER, ITEMS = 10, 6, 200
TOKENS = 64  # of a line at most


def gaps(texts: Iterator[str], draw: random.Random) -> Iterator[tuple[str, str, str]]:
    """What stands before a line, the line, and what stands after it: one line of code in ten."""
    for text in texts:
        lines = text.splitlines(keepends=True)
        for number in range(1, len(lines) - 1):
            is_code = len(lines[number].strip()) > 3 and not lines[number].lstrip().startswith(("#", '"'))
            if is_code and draw.random() < 0.1:
                before, after = lines[max(0, number - LINES_BEFORE) : number], lines[number + 1 : number + 1 + LINES_AFTER]
                yield "".join(before), lines[number], "".join(after)


#: What is asked about a gap.
BEHIND, BEFORE, WITHOUT = "the text after it, behind the text before", "the text after it, first", "nothing after it"


def items_of(run: Path, engine: Engine) -> tuple[dict[str, list[list[int]]], list[str]]:
    """Prompts by what is asked, and the lines of a run's held-out files that they ask for."""
    held_out = (
        text
        for batch in iterate_documents(run / "corpus" / "documents", ["text"], split="validation")
        for text in batch.column("text").to_pylist()
    )
    draw = random.Random(7)
    found = list(gaps(held_out, draw))
    prompts: dict[str, list[list[int]]] = {BEHIND: [], BEFORE: [], WITHOUT: []}
    lines: list[str] = []
    for before, line, after in draw.sample(found, len(found)):
        prompt = infill_prompt(engine.tokenizer, before, after)
        is_short = len(engine.tokenizer.encode(line, add_bos=False)) <= TOKENS
        if is_short and len(prompt) + TOKENS < engine.context_length and len(lines) < ITEMS:
            prompts[BEHIND].append(prompt)
            prompts[BEFORE].append(infill_prompt(engine.tokenizer, before, after, suffix_first=True))
            prompts[WITHOUT].append(engine.tokenizer.encode(before))
            lines.append(line)
    return prompts, lines


def written(engine: Engine, prompts: list[list[int]]) -> list[str]:
    """The lines that the model writes behind prompts."""
    greedy = SamplingParams(max_tokens=TOKENS, temperature=0.0, stop=["\n"])
    return [completion.text for completion in engine.generate(prompts, greedy)]


def share_and_bits(engine: Engine, prompts: list[list[int]], lines: list[str]) -> tuple[float, float]:
    """Share of lines that come back exactly, and bits per byte of the true ones."""
    exact = sum(text == line.rstrip("\n") for text, line in zip(written(engine, prompts), lines, strict=True))
    scores = engine.score_items([(prompt, [line]) for prompt, line in zip(prompts, lines, strict=True)])
    nats = -sum(score.total for (score,) in scores)
    return exact / len(lines), nats / math.log(2) / sum(len(line.encode()) for line in lines)


def main(run: Path, stage: str) -> None:
    """Print what comes of each, and some lines."""
    with Engine(run / "stages" / stage / "model") as engine:
        prompts, lines = items_of(run, engine)
        for name, asked in prompts.items():
            exact, bits = share_and_bits(engine, asked, lines)
            print(f"{name}: {exact:.1%} of {len(lines)} lines exactly, {bits:.3f} bits per byte")
        for line, text in zip(lines, written(engine, prompts[BEFORE][:3]), strict=False):
            print(f"  {line.strip()!r} ← {text.strip()!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/coding-assistant"), sys.argv[2] if len(sys.argv) > 2 else "pretrain")
