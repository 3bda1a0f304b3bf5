"""Things to read: documents kept and dropped, samples of a model in training, questions and answers."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from bessemer.core.report import Answer, Document, Sample


def documents(found: Sequence[Document]) -> Markup:
    """Documents with their source, id and the reason why they were dropped."""
    return Markup("").join(
        Markup('<article class="document"><header>{}{}{}</header><pre>{}</pre></article>').format(
            document.source,
            Markup(' <span class="id">{}</span>').format(document.id) if document.id else "",
            Markup(' <span class="reason">{}</span>').format(document.reason) if document.reason else "",
            document.text,
        )
        for document in found
    )


def samples(found: Sequence[Sample]) -> Markup:
    """What the model wrote at several points of training, by step."""
    steps: dict[int, list[Sample]] = {}
    for sample in found:
        steps.setdefault(sample.step, []).append(sample)
    return Markup("").join(
        Markup('<section class="sample"><h4>Step {:,}</h4>{}</section>').format(
            step,
            Markup("").join(
                Markup('<p><span class="prompt">{}</span>{}</p>').format(sample.prompt, sample.text) for sample in at_step
            ),
        )
        for step, at_step in sorted(steps.items())
    )


def answers(found: Sequence[Answer]) -> Markup:
    """Questions with the expected answer and the model's; those it was trained on are marked as memorised."""
    return Markup("").join(_answer(one) for one in found)


def _answer(one: Answer) -> Markup:
    verdict = {True: "exact", False: "differs", None: ""}[one.correct]
    where = "held in: memorised" if one.held_in else "held out"
    return Markup(
        '<article class="answer"><header>{} <span class="soft">{}</span></header><dl><dt>Expected</dt><dd>{}</dd>'
        '<dt>{}</dt><dd>{} <span class="verdict {}">{}</span></dd></dl></article>'
    ).format(one.question, where, one.expected, one.model or "Model", one.answer, verdict, verdict)
