"""The stage `tokenize`, and its section of the report.

The report has figures, splits, the simplest tokenizers for comparison, kinds of text, and tokens to look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.core.config import nearest
from bessemer.core.metrics import baseline_label, label, percent, shown
from bessemer.core.report import (
    Cell,
    Column,
    Facts,
    Heading,
    Metrics,
    Part,
    Section,
    StageReport,
    Table,
    Text,
    Tokens,
)
from bessemer.core.stage import Outside, StageContext, StageSpec, last_of
from bessemer.data.config import CollectConfig
from bessemer.data.corpus.remote import documents_of
from bessemer.data.sources.registry import source_name
from bessemer.tokenization.config import TOKENIZE_VERSION, TokenizeConfig

#: Figures of a sample: key in `by_domain` → heading.
DOMAIN_FIGURES = {
    "bytes_per_token": "Bytes per token",
    "fertility": "Tokens per word",
    "tokens_to_english": "Tokens, English = 1",
}
#: Splits whose text a tokenize stage may encode.
SPLITS = ("train", "validation", "anneal")

_MUCH_UNKNOWN = 0.02
UNKNOWN_NOTE = "In brackets: more than 2 % of the tokens are unknown, and each of those may stand for a whole word."
_DOMAINS_LEAD = (
    "Short samples that travel with Bessemer. The languages say the same, so that what one costs can be compared: a tokenizer "
    "trained on little but English cuts others into many tokens."
)
#: Metrics that are texts or lists of tokens, with their heading, and whether the tokens are single ones.
_TOKENS = (
    ("sample_tokens", "A text in tokens", False),
    ("longest_tokens", "The longest tokens", True),
    ("vocabulary_sample", "From the first token learned to the last", True),
    ("unused_examples", "Some of the tokens that the training text never uses", True),
    ("special_tokens", "Control tokens", True),
)

Domains = Mapping[str, Metrics]


def report(stage: StageReport) -> Section:
    """The tokenizer and what texts cost in it."""
    metrics = stage.metrics
    parts: list[Part] = [
        Text(
            "Text is cut into tokens, the units that the model reads and writes. The more bytes a token holds on average, "
            "the more text fits in the model's context.",
            lead=True,
        ),
        Facts(metrics),
    ]
    splits = {name: metrics[name] for name in SPLITS if isinstance(metrics.get(name), Mapping)}
    if splits:
        parts.append(_splits(splits))
    of_text = splits.get("validation", {}).get("bytes_per_token")
    if of_text and metrics.get("baselines"):
        parts += [Heading("Beside the simplest tokenizers"), baselines_table(of_text, metrics["baselines"])]
    if metrics.get("by_domain"):
        parts += [Heading("By kind of text"), Text(_DOMAINS_LEAD), *domains_table(metrics["by_domain"])]
    for key, title, listed in _TOKENS:
        if metrics.get(key):
            parts += [Heading(title), Tokens(metrics[key], listed=listed)]
    return Section(stage.titled("Tokenizer"), parts)


def summary_line(metrics: Metrics) -> str:
    """The vocabulary's size and the length of its tokens."""
    return f"{metrics['vocab_size']:,} tokens, {metrics['train']['bytes_per_token']:.2f} bytes each"


def _splits(splits: Mapping[str, Metrics]) -> Table:
    columns = [Column("Split"), *(Column(name, True) for name in ("Documents", "Tokens", "Text", "Bytes per token"))]
    names = ("documents", "tokens", "bytes", "bytes_per_token")
    return Table(columns, [(split, *(shown(name, metrics.get(name)) for name in names)) for split, metrics in splits.items()])


def domains_table(by_domain: Domains) -> list[Part]:
    """A row for each sample: its bytes per token, and whether decoding restores it."""
    best = max(map(_length, by_domain.values()), default=0) or 1
    unknown = any(figures["unknown_share"] is not None for figures in by_domain.values())
    columns = [Column("Sample"), *(Column(name, True) for name in DOMAIN_FIGURES.values())]
    columns += [Column("Unknown", True)] * unknown + [Column("Given back")]
    rows: list[tuple[str | Cell, ...]] = [
        (
            label(domain),
            Cell(figure(figures, "bytes_per_token"), share=_length(figures) / best),
            figure(figures, "fertility"),
            figure(figures, "tokens_to_english"),
            *([figure(figures, "unknown_share")] * unknown),
            "exactly" if figures["round_trip"] else Cell("not exactly", warning=True),
        )
        for domain, figures in by_domain.items()
    ]
    notes: list[Part] = [] if all(map(mostly_written, by_domain.values())) else [Text(UNKNOWN_NOTE)]
    return [Table(columns, rows), *notes]


def _length(figures: Metrics) -> float:
    """Bytes per token for a bar: none for a sample that is mostly unknown."""
    return (figures["bytes_per_token"] or 0) if mostly_written(figures) else 0


def baselines_table(bytes_per_token: float, baselines: Mapping[str, float | None]) -> Table:
    """Bytes per token of a tokenizer and of the simplest tokenizers on the same text, the longest tokens first."""
    figures = {baseline_label(name): (value, False) for name, value in baselines.items() if value is not None}
    ordered = sorted((figures | {"This tokenizer": (bytes_per_token, True)}).items(), key=lambda item: -item[1][0])
    longest = ordered[0][1][0]
    rows = [
        (
            Cell(name, strong=True) if is_ours else Cell(name, remark="baseline"),
            Cell(f"{value:.2f}", share=value / longest),
        )
        for name, (value, is_ours) in ordered
    ]
    return Table([Column("Held-out text"), Column("Bytes per token", True)], rows)


def figure(figures: Metrics, name: str) -> str:
    """One figure of a sample, as a table shows it."""
    value = figures.get(name)
    if value is None:
        return "–"
    if name == "unknown_share":
        return percent(value)
    return f"{value:.2f}" if mostly_written(figures) else f"({value:.2f})"


def mostly_written(figures: Metrics) -> bool:
    """Whether few enough tokens are unknown for the figures to mean something: an unknown token may stand for a whole word."""
    return (figures.get("unknown_share") or 0) < _MUCH_UNKNOWN


def domains_of(tokenizers: Sequence[Metrics], name: str) -> list[str]:
    """The samples that have a figure of this name in some tokenizer, in order."""
    domains = dict.fromkeys(domain for one in tokenizers for domain in one["by_domain"])
    return [domain for domain in domains if any(one["by_domain"][domain].get(name) is not None for one in tokenizers)]


def _tokenize_packages(config: TokenizeConfig) -> list[str]:
    names = ["pyarrow", "tokenizers", "fastokens", "rustbpe"]
    return [*names, "sentencepiece"] if config.algorithm in ("unigram", "sentencepiece_bpe") else names


def _tokenize(context: StageContext) -> dict[str, Any]:
    from bessemer.tokenization.stage import tokenize

    documents = documents_of(context)
    assert documents is not None
    return tokenize(context.config, documents, context.out, seed=context.seed, progress=context.progress, folder=context.folder)


def _tokenize_fingerprint(config: TokenizeConfig, outside: Outside) -> Any:
    if config.tokenizer is None:
        return None
    from bessemer.tokenization.existing import existing_fingerprint

    return existing_fingerprint(config.tokenizer, outside.folder)


def _unknown_source(config: TokenizeConfig, above: Mapping[str, Any]) -> str | None:
    """The conflict of a weight for a source that the recipe does not collect: reported before hours of work on the corpus."""
    collect = last_of(above, CollectConfig)
    names = [source_name(source) for source in collect.sources] if collect is not None else []
    unknown = next((source for source in config.source_weights if names and source not in names), None)
    return None if unknown is None else f"source_weights: no source is named {unknown!r}{nearest(unknown, names)}"


STAGES = (
    StageSpec(
        kind="tokenize",
        summary="Train a tokenizer, or take an existing one, and write the documents as token shards.",
        config=TokenizeConfig,
        version=TOKENIZE_VERSION,
        needs={"documents": "documents"},
        makes={"tokenizer": "tokenizer", "tokens": "tokens"},
        links={"tokenizer": "tokenizer", "tokens": "tokens"},
        example="tokenize: {vocab_size: 4096}",
        remedy="make again: its tokens hold the text, and its tokenizer may have learned from it",
        budget_seconds=4,
        report=report,
        summary_line=summary_line,
        run=_tokenize,
        uses_seed=True,
        resumes=True,
        fingerprint=_tokenize_fingerprint,
        packages=_tokenize_packages,
        conflict=_unknown_source,
    ),
)
