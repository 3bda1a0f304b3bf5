"""Lines of held-out files, filled in from what stands around them: `python fill_in.py [RUN] [STAGE]` after the recipe.

Single-line infilling (Bavarian et al. 2022): a line is taken out, and the model is asked for it. Beside the share of lines
that come back exactly: the bits per byte of the line that stood there, with the text after it and without. A model that is too
small to write the line shows there what it makes of the suffix.
"""

import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from bessemer import Engine, SamplingParams
from bessemer.data.corpus.reader import iterate_documents
from bessemer.tokenization.infill import infill_prompt

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


run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/coding-assistant")
stage = sys.argv[2] if len(sys.argv) > 2 else "pretrain"
held_out = (
    text
    for batch in iterate_documents(run / "corpus" / "documents", ["text"], split="validation")
    for text in batch.column("text").to_pylist()
)
draw = random.Random(7)
found = list(gaps(held_out, draw))
with Engine(run / "stages" / stage / "model") as engine:
    tokenizer = engine.tokenizer
    asked = [
        (infill_prompt(tokenizer, before, after), tokenizer.encode(before), tokenizer.encode(line, add_bos=False), line)
        for before, line, after in draw.sample(found, len(found))
    ]
    items = [one for one in asked if len(one[2]) <= TOKENS and len(one[0]) + TOKENS < engine.context_length][:ITEMS]
    sizes = sum(len(line.encode()) for *_, line in items)
    for name, prompts in (("with the text after it", [one[0] for one in items]), ("without it", [one[1] for one in items])):
        greedy = SamplingParams(max_tokens=TOKENS, temperature=0.0, stop=["\n"])
        written = engine.generate(prompts, greedy)
        exact = sum(completion.text == line.rstrip("\n") for completion, (*_, line) in zip(written, items, strict=True))
        scores = engine.score_items([(prompt, [line]) for prompt, (_, _, line, _) in zip(prompts, items, strict=True)])
        bits = -sum(score.total for (score,) in scores) / math.log(2)
        print(f"{name}: {exact / len(items):.1%} of {len(items)} lines exactly, {bits / sizes:.3f} bits per byte")
    for (prompt, _, _, line), _ in zip(items, range(3), strict=False):
        (completion,) = engine.generate([prompt], SamplingParams(max_tokens=TOKENS, temperature=0.0, stop=["\n"]))
        print(f"  {line.strip()!r} ← {completion.text.strip()!r}")
