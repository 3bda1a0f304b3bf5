"""The report of a run: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bessemer.core.progress import duration
from bessemer.views import corpus, evaluation, examples, tables, tokenizers, tokens
from bessemer.views.charts import training_charts
from bessemer.views.diagnostics import diagnostics
from bessemer.views.figures import LOSSY_NOTE, is_lossy, shown
from bessemer.views.quantisation import quantisation
from bessemer.views.run_data import Answer, KeyFigure, Metrics, ReportData, StageRun, Training
from bessemer.views.tables import lead, soft

__all__ = ["Answer", "KeyFigure", "ReportData", "StageRun", "Training", "render_report"]

#: Answers shown of each kind, held in and held out.
_SHOWN_ANSWERS = 8


def render_report(report: ReportData) -> str:
    """The whole page. Every text from outside is escaped; the same data gives the same bytes."""
    sections = [(name, title, draw(report)) for name, title, draw in _SECTIONS]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    files = resources.files("bessemer.views")
    template = environment.from_string(files.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    style = Markup(files.joinpath("style.css").read_text(encoding="utf-8"))
    return template.render(report=report, style=style, sections=[section for section in sections if section[2]])


def _line(report: ReportData) -> Markup:
    if not report.stages:
        return Markup("")
    total = duration(sum(stage.seconds for stage in report.stages))
    return lead(f"{len(report.stages)} stages, {total} of work.") + tables.stages_table(report.stages)


def _data(report: ReportData) -> Markup:
    if not report.data:
        return Markup("")
    hint = (
        f"What became of a document, and why: bessemer explain ID --run {report.name}, with the id that stands above its text."
    )
    return corpus.corpus(report.data) + soft(hint)


def _tokenizer(report: ReportData) -> Markup:
    metrics = report.tokenizer
    if metrics is None:
        return Markup("")
    parts = [
        lead("Text is cut into tokens, the units that the model reads and writes. The more bytes a token holds on average, "
              "the more text fits in the model's context."),
        tables.facts(metrics),
    ]  # fmt: skip
    splits = {name: metrics[name] for name in ("train", "validation", "anneal") if isinstance(metrics.get(name), Mapping)}
    if splits:
        parts.append(_splits(splits))
    of_text = splits.get("validation", {}).get("bytes_per_token")
    if of_text and metrics.get("baselines"):
        parts.append(
            Markup("<h3>Beside the simplest tokenizers</h3>") + tokenizers.baselines_table(of_text, metrics["baselines"])
        )
    if metrics.get("by_domain"):
        parts.append(Markup("<h3>By kind of text</h3>") + soft(_DOMAINS_LEAD) + tokenizers.domains_table(metrics["by_domain"]))
    for key, title, view in _TOKEN_VIEWS:
        if metrics.get(key):
            parts.append(Markup("<h3>{}</h3>{}").format(title, view(metrics[key])))
    return Markup("").join(parts)


_DOMAINS_LEAD = (
    "Short samples that travel with Bessemer. The languages say the same, so that what one costs can be compared: a tokenizer "
    "trained on little but English cuts others into many tokens."
)
_TOKEN_VIEWS = (
    ("sample_tokens", "A text in tokens", tokens.tokens_html),
    ("longest_tokens", "The longest tokens", tokens.token_list),
    ("vocabulary_sample", "From the first token learned to the last", tokens.token_list),
    ("unused_examples", "Some of the tokens that the training text never uses", tokens.token_list),
    ("special_tokens", "Control tokens", tokens.token_list),
)


def _splits(splits: Mapping[str, Metrics]) -> Markup:
    columns = [
        tables.Column("Split"),
        *(tables.Column(name, True) for name in ("Documents", "Tokens", "Text", "Bytes per token")),
    ]
    names = ("documents", "tokens", "bytes", "bytes_per_token")
    rows = [(split, *(shown(name, metrics.get(name)) for name in names)) for split, metrics in splits.items()]
    return tables.table(columns, rows)


def _model(report: ReportData) -> Markup:
    if report.model is None:
        return Markup("")
    return lead("The network before it has seen any text: what its parts weigh and what a token costs.") + (
        tables.facts(report.model) + tables.layers_table(report.model.get("layers", ()))
    )


def _pretraining(report: ReportData) -> Markup:
    if report.pretraining is None:
        return Markup("")
    training = report.pretraining
    score = (
        f"Bits per byte are measured on text held out of training. {LOSSY_NOTE}"
        if is_lossy(report.tokenizer)
        else "Bits per byte, on text held out of training, is the honest score: it can be compared with any other model and "
        "with a file compressor."
    )
    parts = [
        lead(f"The model reads the training tokens and learns to predict the next one. {score}"),
        training_charts(training.records, name="pretraining", baselines=training.baselines),
        diagnostics(training.records, name="pretraining"),
        tables.facts(training.metrics),
    ]
    if training.samples:
        parts.append(Markup("<h3>What it wrote along the way</h3>") + examples.samples(training.samples))
    return Markup("").join(parts)


def _finetuning(report: ReportData) -> Markup:
    if report.finetuning is None:
        return Markup("")
    training = report.finetuning
    parts = [
        lead("The pretrained model learns to answer questions. Questions held in were part of this training: right answers to "
              "them are memorised and say nothing of what it knows. Questions held out were never shown."),
        training_charts(training.records, name="finetuning"),
        diagnostics(training.records, name="finetuning"),
        tables.facts(training.metrics),
    ]  # fmt: skip
    for held_in, title in ((False, "Held-out questions"), (True, "Held-in questions, memorised")):
        chosen = [answer for answer in training.answers if answer.held_in == held_in][:_SHOWN_ANSWERS]
        if chosen:
            parts.append(Markup("<h3>{}</h3>{}").format(title, examples.answers(chosen)))
    return Markup("").join(parts)


def _evaluation(report: ReportData) -> Markup:
    results = report.evaluation
    if results is None:
        return Markup("")
    parts = [
        evaluation.bits_per_byte_table(results),
        soft(LOSSY_NOTE) if is_lossy(report.tokenizer) and results.get("bits_per_byte") else Markup(""),
        evaluation.tasks_tables(results),
    ]
    if comparisons := evaluation.comparisons_table(results.get("comparisons", ())):
        parts.append(Markup("<h3>Differences</h3>") + comparisons)
    return Markup("").join(parts)


def _environment(report: ReportData) -> Markup:
    values = {**report.host, "commit": report.commit, **report.versions} if report.host or report.versions else {}
    return tables.facts(values) if values else Markup("")


def _recipe(report: ReportData) -> Markup:
    named = (("As run", report.recipe), ("Locked, with what was measured on this machine", report.lock))
    return Markup("").join(Markup("<h3>{}</h3><pre>{}</pre>").format(title, text) for title, text in named if text)


_SECTIONS: tuple[tuple[str, str, Callable[[ReportData], Markup]], ...] = (
    ("line", "The line", _line),
    ("data", "Data", _data),
    ("tokenizer", "Tokenizer", _tokenizer),
    ("model", "Model", _model),
    ("pretraining", "Pretraining", _pretraining),
    ("finetuning", "Fine-tuning", _finetuning),
    ("evaluation", "Evaluation", _evaluation),
    ("quantisation", "Quantisation", lambda report: quantisation(report.quantisation)),
    ("environment", "Environment", _environment),
    ("recipe", "Recipe", _recipe),
)
