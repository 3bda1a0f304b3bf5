"""Training of the guard's classifier from seeds, with PyTorch; thresholds from ordinary texts that it did not train on.

Seeds (`seeds/*.yaml`) are infinitives by category and language, frames, wrappers by family of attack, and harmless ones.
Each training text is read in the windows of `classifier.py`; a window with most of a harmful infinitive belongs to its
category, one without any of it to none, and the rest is left out. So what stands around a request is learned as harmless, and a
wrapper that was never seen changes little. Words of one meaning in several languages (`concepts.yaml`) share features, and some
batches read these alone, so that they carry what they can.

    python -m bessemer.safety.classifier_training guard_classifier.npz --ordinary piqa.jsonl arc_easy.jsonl
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np

from bessemer.core.errors import SourceError
from bessemer.core.hashing import derive_seed, hash_file, hash_value
from bessemer.core.progress import Progress, Silent
from bessemer.core.yaml_file import read_yaml
from bessemer.safety.classifier import _WORD, BLOCK, Concepts, GuardClassifier, block_features, first_concept_bucket, windows_of
from bessemer.safety.normalise import cleaned

_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
#: Share of an infinitive's words that a window of its category has at least.
_MOST_OF_IT = 0.6
#: Keys of a record that hold what somebody asks or reads.
_TEXT_KEYS = ("query", "prompt", "instruction", "question", "goal", "context", "text")


@dataclass(frozen=True)
class TrainingSettings:
    """How much is drawn from the seeds, and how the weights are fitted."""

    bits: int = 17
    #: Infinitives drawn of a pattern, and texts made of each, by language: English, others.
    of_pattern: tuple[int, int] = (12, 8)
    texts_of_each: tuple[int, int] = (2, 2)
    #: Harmless infinitives drawn of a pattern, each in two frames and a wrapper.
    of_harmless: int = 20
    #: Paragraphs of each source of prose.
    of_prose: int = 900
    passes: int = 4
    batch: int = 1024
    learning_rate: float = 0.05
    weight_decay: float = 0.01
    #: How many times as fast the weights of concepts are learned, and the share of batches that read nothing else.
    concepts_rate: float = 2.0
    concepts_alone: float = 0.1
    #: Share of the harmless texts that choose the thresholds, and of these the share that may be refused.
    held_out: float = 0.2
    refused: float = 0.01
    #: The same of paragraphs of prose, which have many windows and nobody asks for anything in them.
    refused_prose: float = 0.007
    #: Of harmless requests whose patterns and wrappers were held out 5 % reach it.
    lowest_threshold: float = 0.6
    seed: int = 0


@dataclass(frozen=True)
class Seeds:
    """hazards: by category and language. harmless: by language, and whole `sentences`. frames: by language. wrappers: by
    family."""

    hazards: Mapping[str, Mapping[str, Sequence[str]]]
    harmless: Mapping[str, Sequence[str]]
    frames: Mapping[str, Sequence[str]]
    wrappers: Mapping[str, Sequence[str]]
    #: Words of one meaning in several languages, by its name, without accents.
    concepts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def without(self, families: Collection[str]) -> Seeds:
        """The seeds without some families of wrappers."""
        kept = {name: texts for name, texts in self.wrappers.items() if name not in families}
        return replace(self, wrappers=kept)

    @property
    def hash(self) -> str:
        return hash_value([self.hazards, self.harmless, self.frames, self.wrappers, self.concepts])


def packaged_seeds() -> Seeds:
    """The seeds that travel with Bessemer."""
    folder = Path(str(resources.files("bessemer.safety.seeds")))
    parts = {name: read_yaml(folder / f"{name}.yaml").values for name in ("hazards", "harmless", "frames", "wrappers")}
    concepts = read_yaml(folder / "concepts.yaml").values
    return Seeds(**parts, concepts={name: sorted(set(cleaned(words).lower().split())) for name, words in concepts.items()})


def expanded(pattern: str, most: int, draw: random.Random) -> list[str]:
    """At most `most` different texts of a pattern, (a|b) standing for each of its words, which come equally often."""
    parts = _CHOICE.split(pattern)
    options = [part.split("|") if place % 2 else [part] for place, part in enumerate(parts)]
    number = 1
    for choices in options:
        number *= len(choices)
    found: dict[str, None] = {}
    decks: list[list[str]] = [[] for _ in options]
    for _ in range(4 * most):
        for deck, choices in zip(decks, options, strict=True):
            if not deck:
                deck += draw.sample(choices, len(choices))
        found[" ".join("".join(deck.pop() for deck in decks).split())] = None
        if len(found) == min(most, number):
            break
    return list(found)


@dataclass(frozen=True)
class LabelledText:
    """A text, and the words that make it harmful: of which category, and where they begin and end. None: it is harmless."""

    text: str
    category: str | None = None
    first: int = 0
    end: int = 0


def requests(seeds: Seeds, settings: TrainingSettings) -> Iterator[LabelledText]:
    """Requests for harm, plain, in wrappers, and between ordinary sentences."""
    draw = random.Random(derive_seed(settings.seed, "requests"))
    around = [text for pattern in seeds.harmless["sentences"] for text in expanded(pattern, 12, draw)]
    for category, languages in seeds.hazards.items():
        for language, patterns in languages.items():
            is_english = language == "en"
            for pattern in patterns:
                for action in expanded(pattern, settings.of_pattern[not is_english], draw):
                    for number in range(settings.texts_of_each[not is_english]):
                        # the first half plain: what is asked is learned best without anything around it
                        plain = draw.choice(seeds.frames[language])
                        if 2 * number < settings.texts_of_each[not is_english]:
                            yield _placed(plain, action, category)
                        elif draw.random() < 0.7:
                            yield _placed(_wrapped(seeds, plain, draw), action, category)
                        else:
                            before, behind = draw.choice(around), draw.choice(around)
                            yield _placed(f"{before} {plain} {behind}".replace("{{", "{"), action, category)


def harmless_texts(seeds: Seeds, settings: TrainingSettings) -> Iterator[str]:
    """Harmless requests, plain and in wrappers, and sentences."""
    draw = random.Random(derive_seed(settings.seed, "harmless"))
    for language, patterns in seeds.harmless.items():
        for pattern in patterns:
            for action in expanded(pattern, settings.of_harmless, draw):
                if language == "sentences":
                    yield action
                    continue
                for number in range(3):
                    template = draw.choice(seeds.frames[language])
                    if number > 1:
                        template = _wrapped(seeds, template, draw)
                    yield _placed(template, action, None).text


def _wrapped(seeds: Seeds, frame: str, draw: random.Random) -> str:
    """A frame in a wrapper, whose place for the infinitive it keeps. Those with encoded requests are read decoded anyway."""
    plain = [text for texts in seeds.wrappers.values() for text in texts if "{request}" in text or "{action}" in text]
    if not plain:
        return frame
    return draw.choice(plain).replace("{request}", frame)


def _placed(template: str, action: str, category: str | None) -> LabelledText:
    before, _, behind = template.replace("{{", "{").replace("}}", "}").partition("{action}")
    # a wrapper names what is asked once
    behind = behind.replace("{action}", "that")
    first = len(_WORD.findall(cleaned(before).lower()))
    words = len(_WORD.findall(cleaned(action).lower()))
    return LabelledText(before + action + behind, category, first, first + words)


def read_ordinary(path: Path, *, answers: bool = False) -> list[str]:
    """Questions or instructions of a JSON or JSONL file, or paragraphs of a text file. answers: the right choices instead.
    Raises SourceError."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows = json.loads(content)
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            return [" ".join(part.split()) for part in content.split("\n\n") if len(part.split()) > 3]
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: these ordinary texts cannot be read ({error})") from None
    texts = []
    for row in rows:
        if answers:
            gold, choices = row.get("gold"), row.get("choices")
            texts += [str(choices[gold])] if isinstance(gold, int) and isinstance(choices, list) and gold < len(choices) else []
            continue
        asked = next((row[key] for key in _TEXT_KEYS if isinstance(row.get(key), str)), "")
        asked = asked.removeprefix("Question: ").removesuffix("\nAnswer:")
        more = row.get("input") if isinstance(row.get("input"), str) else ""
        if asked.strip():
            texts.append(f"{asked}\n{more}".strip())
    return texts


def paragraphs(text: str) -> list[str]:
    """Paragraphs of more than eight words, on one line each."""
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [part for part in parts if len(part.split()) > 8]


def read_prose(path: Path, most: int, seed: int = 0) -> list[str]:
    """At most so many paragraphs, drawn evenly, of a text file, of a file that `read_ordinary` reads, or of a folder's pages of
    HTML. Raises SourceError."""
    if path.is_dir():
        from bessemer.data.extraction.extract import main_text, to_utf8

        texts = [main_text(to_utf8(page.read_bytes())).replace("\n", "\n\n") for page in sorted(path.glob("*.html"))]
        if not texts:
            raise SourceError(f"{path}: this folder has no pages (*.html)")
        found = [part for text in texts for part in paragraphs(text)]
    elif path.suffix in (".json", ".jsonl"):
        found = read_ordinary(path)
    else:
        found = paragraphs(path.read_text(encoding="utf-8"))
    found = [*dict.fromkeys(found)]
    return random.Random(derive_seed(seed, "prose")).sample(found, min(most, len(found)))


def library_prose(most: int, seed: int = 0) -> list[str]:
    """At most so many paragraphs of the standard library's docstrings, and as many of Python's reference (`pydoc_data`)."""
    from pydoc_data.topics import topics

    docstrings: dict[str, None] = {}
    for path in sorted(Path(random.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstrings |= dict.fromkeys(paragraphs(ast.get_docstring(node) or ""))
    reference = dict.fromkeys(part for text in topics.values() for part in paragraphs(text))
    draw = random.Random(derive_seed(seed, "library"))
    return [part for found in (docstrings, reference) for part in draw.sample([*found], min(most, len(found)))]


@dataclass
class _Windows:
    """Windows of many texts: their buckets, one behind the other, and the category of each, -1 for none."""

    buckets: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, labelled: LabelledText, number: int, bits: int, concepts: Concepts) -> None:
        features = block_features(cleaned(labelled.text), bits, concepts)
        if not features.blocks:
            return
        for first, end in zip(*windows_of(features.blocks), strict=True):
            label = -1
            if labelled.category is not None:
                overlap = min(labelled.end, end * BLOCK) - max(labelled.first, first * BLOCK)
                if overlap >= _MOST_OF_IT * (labelled.end - labelled.first):
                    label = number
                elif overlap > 0:
                    continue
            self.buckets.append(features.buckets_F[features.starts_N[first] : features.starts_N[end]])
            self.labels.append(label)


def train_guard_classifier(
    seeds: Seeds,
    ordinary: Iterable[str],
    settings: TrainingSettings | None = None,
    *,
    answers: Iterable[str] = (),
    prose: Iterable[str] = (),
    progress: Progress | None = None,
) -> GuardClassifier:
    """Fit the weights, and choose the thresholds. ordinary: requests; prose: paragraphs of long texts; some of either choose
    the thresholds; answers: other harmless texts. The same seeds, texts and settings give the same classifier on a machine."""
    settings, progress = settings or TrainingSettings(), progress or Silent()
    categories, concepts = tuple(seeds.hazards), Concepts(seeds.concepts)
    windows = _Windows()
    for labelled in requests(seeds, settings):
        windows.add(labelled, categories.index(labelled.category or ""), settings.bits, concepts)
    asked = len(windows.labels)
    draw = random.Random(derive_seed(settings.seed, "held out"))
    held_out: list[list[str]] = []
    for kind in ([*harmless_texts(seeds, settings), *ordinary], prose):
        held_out.append([])
        for text in dict.fromkeys(kind):
            if draw.random() < settings.held_out:
                held_out[-1].append(text)
            else:
                windows.add(LabelledText(text), -1, settings.bits, concepts)
    for text in answers:
        windows.add(LabelledText(text), -1, settings.bits, concepts)
    progress.say(f"{asked:,} windows of requests, {len(windows.labels) - asked:,} others")
    weights, biases = _fitted(windows, len(categories) + 1, settings, with_concepts=bool(seeds.concepts))
    scales = np.maximum(np.abs(weights).max(0), 1e-6) / 127
    rounded = np.round(weights / scales).astype(np.int8)
    classifier = GuardClassifier(
        categories,
        settings.bits,
        rounded,
        scales.astype(np.float32),
        biases,
        np.full(len(categories), 0.5, np.float32),
        {},
        concepts,
    )
    thresholds, curve = _thresholds(classifier, held_out, settings)
    made = {"seeds": seeds.hash, "windows": len(windows.labels), "held_out": [len(texts) for texts in held_out], "curve": curve}
    return replace(classifier, thresholds_K=thresholds, made=made)


def _fitted(
    windows: _Windows, columns: int, settings: TrainingSettings, *, with_concepts: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (2^bits, C) and biases (C,), float32, of logistic regressions on all windows, by AdamW. The last column's windows
    are those of any category."""
    import torch
    from torch.nn import functional

    lengths = np.array([len(buckets) for buckets in windows.buckets])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    buckets = torch.from_numpy(np.concatenate(windows.buckets))
    labels = torch.tensor(windows.labels)
    weights = torch.zeros((1 << settings.bits, columns), requires_grad=True)
    biases = torch.full((columns,), -3.0, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": [weights], "weight_decay": settings.weight_decay}, {"params": [biases], "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    generator = np.random.default_rng(derive_seed(settings.seed, "order"))
    first_concept = first_concept_bucket(settings.bits)
    steps = settings.passes * ((len(lengths) + settings.batch - 1) // settings.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(settings.passes):
        order = generator.permutation(len(lengths))
        for begin in range(0, len(order), settings.batch):
            rows = order[begin : begin + settings.batch]
            sizes = lengths[rows]
            before = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            chosen = buckets[torch.from_numpy(np.repeat(starts[rows] - before, sizes) + np.arange(sizes.sum()))]
            counts = torch.from_numpy(sizes)
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
            each = (1 / counts.sqrt()).repeat_interleave(counts).float()
            is_concept = chosen >= first_concept
            if with_concepts:
                each[is_concept] *= settings.concepts_rate
                if generator.random() < settings.concepts_alone:
                    each[~is_concept] = 0.0
            logits = (
                functional.embedding_bag(chosen, weights, offsets.to(chosen.dtype), mode="sum", per_sample_weights=each)
                + biases
            )
            targets = functional.one_hot(labels[torch.from_numpy(rows)] + 1, columns)[:, 1:].float()
            targets = torch.cat([targets, targets.sum(1, keepdim=True)], dim=1)
            loss = functional.binary_cross_entropy_with_logits(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    fitted = weights.detach().numpy()
    if with_concepts:
        fitted[first_concept:] *= settings.concepts_rate
    return fitted, biases.detach().numpy()


def _thresholds(
    classifier: GuardClassifier, held_out: Sequence[Sequence[str]], settings: TrainingSettings
) -> tuple[np.ndarray, list[list[float]]]:
    """The threshold of each category, (K,) float32, and the curve they come from: by threshold the shares of held-out requests
    and of held-out prose that are refused.

    One threshold for all refuses at most the allowed share of either; a category in which harmless texts reach less gets the
    lower one that they just do not reach.
    """
    worst, reached_K = [], np.zeros(len(classifier.categories))
    for texts in held_out:
        found = [classifier.probabilities(cleaned(text)) for text in texts]
        highest_TK = np.array([one.max(0) for one in found if len(one)]).reshape(-1, len(reached_K))
        worst.append(highest_TK.max(1))
        reached_K = np.maximum(reached_K, highest_TK.max(0, initial=0.0))
    grid = np.round(np.linspace(0.05, 0.95, 19), 2)
    curve = [[float(one), *(round(float((of >= one).mean()), 5) if len(of) else 0.0 for of in worst)] for one in grid]
    common = max(
        float(np.quantile(of, 1 - refused))
        for of, refused in zip(worst, (settings.refused, settings.refused_prose), strict=True)
        if len(of)
    )
    of_category = np.minimum(common, reached_K + 0.02)
    return np.clip(of_category, settings.lowest_threshold, 0.98).astype(np.float32), curve


def main() -> None:
    """Train on the seeds and ordinary texts, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ordinary", type=Path, nargs="*", default=[], help="files of ordinary questions and texts")
    parser.add_argument("--prose", type=Path, nargs="*", default=[], help="files and folders of pages of ordinary prose")
    arguments = parser.parse_args()
    settings = TrainingSettings()
    texts = [text for path in arguments.ordinary for text in read_ordinary(path)]
    others = [text for path in arguments.ordinary for text in read_ordinary(path, answers=True)]
    prose = [text for path in arguments.prose for text in read_prose(path, settings.of_prose)]
    prose += library_prose(settings.of_prose)
    trained = train_guard_classifier(packaged_seeds(), texts, settings, answers=others, prose=prose)
    trained.made["ordinary"] = {path.name: hash_file(path) for path in arguments.ordinary}
    trained.made["prose"] = {path.name: len(read_prose(path, settings.of_prose)) for path in arguments.prose}
    trained.save(arguments.out)
    print(json.dumps({"thresholds": dict(zip(trained.categories, trained.thresholds_K.tolist(), strict=True)), **trained.made}))


if __name__ == "__main__":
    main()
