"""MB per CPU-second of the edits and scores beyond rules, on the text of the packages installed beside this one.

    python benchmarks/edits.py [--megabytes 60]

Each runs once to compile, then three times on the same batch of source, documentation and metadata; the median counts. Result:
`edits.json`.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import recording
from bessemer.core.hashing import hash_bytes
from bessemer.data.edits.line_removal import boilerplate
from bessemer.data.edits.personal_data import personal_data
from bessemer.data.edits.repair import repair
from bessemer.data.edits.secrets import secrets
from bessemer.data.filters.classifier import Classifier
from bessemer.data.filters.classifier_training import ClassifierConfig, fit
from bessemer.data.filters.language import language
from bessemer.data.filters.word_list_scores import hazards, model_written, spam, toxicity
from bessemer.data.filters.word_model import WordModelConfig, fit_words
from bessemer.data.text.texts import Texts
from rounds import summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/data/edits", "src/bessemer/data/filters")

ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", "METADATA")
REPEATS = 3
#: Of the batch's texts, how many the classifier and the model of words are trained on, and how many languages are told of.
TRAINED_ON, LANGUAGES_OF = 2000, 1000
#: Tables of the result, and what stands in each.
TABLES = {
    "edits": ("personal_data", "secrets", "repair", "boilerplate"),
    "scores": ("toxicity", "spam", "model_written", "hazards", "classifier", "classifier_pieces", "perplexity", "language"),
}
LABELS = {
    "classifier_pieces": "`classifier`, pieces of 3 to 5",
    "perplexity": "`perplexity`, the model of words",
    "language": "`language`, which reads 2,000 characters of a text",
}


def package_texts(megabytes: float) -> list[str]:
    """Texts of the installed packages in an order of its own, none longer than 100,000 characters."""
    root = Path(sysconfig.get_paths()["purelib"])
    files = [path for path in root.rglob("*") if path.name.endswith(ENDINGS) and path.stat().st_size > 200]
    texts, left = [], megabytes * 1e6
    for path in sorted(files, key=lambda path: hash_bytes(path.relative_to(root).as_posix().encode())):
        text = path.read_text(encoding="utf-8", errors="replace")[:100_000]
        texts.append(text)
        left -= len(text.encode())
        if left < 0:
            break
    return texts


def trained(texts: list[str], max_subword: int) -> Classifier:
    chosen = texts[:TRAINED_ON]
    labels = np.array([">>>" in text or "def " in text for text in chosen], int)
    return fit(chosen, labels, ClassifierConfig(max_subword=max_subword, passes=2))


def speed(function: Callable[[Texts], Any], texts: list[str]) -> dict[str, Any]:
    """MB per CPU-second."""
    batch = Texts.of(texts)
    function(Texts.of(texts[:2]))
    seconds = []
    for _ in range(REPEATS):
        fresh = Texts.from_arrow(batch.array)  # nothing found out before
        begin = time.process_time()
        function(fresh)
        seconds.append(time.process_time() - begin)
    return summary(float(batch.offsets[-1]) / 1e6 / taken for taken in seconds)


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    speeds = figures["mb_per_cpu_second"]
    columns = [("", ""), ("MB per CPU-second", ",.0f")]
    return {
        table: recording.table(columns, [(LABELS.get(name, f"`{name}`"), speeds[name]["median"]) for name in names])
        for table, names in TABLES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=60)
    texts = package_texts(parser.parse_args().megabytes)
    words, pieces = trained(texts, 0), trained(texts, 5)
    model = fit_words(Texts.of(texts[:TRAINED_ON]), WordModelConfig())
    speeds: dict[str, Any] = {}
    for name, function, batch in (
        ("personal_data", personal_data, texts),
        ("secrets", secrets, texts),
        ("repair", repair, texts),
        ("boilerplate", boilerplate, texts),
        ("toxicity", toxicity, texts),
        ("spam", spam, texts),
        ("model_written", model_written, texts),
        ("hazards", hazards, texts),
        ("classifier", words.probabilities, texts),
        ("classifier_pieces", pieces.probabilities, texts),
        ("perplexity", model.bits, texts),
        ("language", lambda batch: language(_argument(batch)), texts[:LANGUAGES_OF]),
    ):
        speeds[name] = speed(function, batch)
        print(f"{name:20} {speeds[name]['median']:8.1f} MB per CPU-second", flush=True)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    figures = {"texts": len(texts), "megabytes": megabytes, "mb_per_cpu_second": speeds}
    print(recording.save("edits", figures, tables=tables(figures)))


def _argument(batch: Texts) -> Any:
    """What `language` takes: texts, or their array."""
    return batch if "Texts" in language.__annotations__["texts"] else batch.array


if __name__ == "__main__":
    main()
