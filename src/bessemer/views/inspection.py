"""What `bessemer inspect` found as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bessemer.core.figures import percent
from bessemer.core.report import Column
from bessemer.inspection.embedding import Neighbours
from bessemer.inspection.inspect import Inspection, TokenMap
from bessemer.views import heads
from bessemer.views.bars import measured
from bessemer.views.heat import POSITIVE
from bessemer.views.tables import lead, table
from bessemer.views.tokens import token, tokens_html, visible

#: Words on the map, positions of the lens (the last ones), characters of the heading: no more than can be read.
_ON_MAP, _LENS, _HEADING = 120, 64, 160


def inspection_page(found: Inspection, name: str) -> str:
    """The whole page. name: the model's. Every text from outside is escaped; the same numbers give the same bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    files = resources.files("bessemer.views")
    template = environment.from_string(files.joinpath("inspection.html.jinja").read_text(encoding="utf-8"))
    style = "".join(files.joinpath(file).read_text(encoding="utf-8") for file in ("style.css", "inspection.css"))
    return template.render(
        name=name,
        heading=found.text if len(found.text) <= _HEADING else f"{found.text[:_HEADING]}…",
        figures=key_figures(found),
        style=Markup(style),
        sections=inspection_sections(found),
    )


def inspection_sections(found: Inspection) -> list[tuple[str, str, Markup]]:
    """The page's sections: an anchor, a title and what stands below it."""
    sections = [(anchor, title, Markup(draw(found))) for anchor, title, draw in _SECTIONS]
    return [section for section in sections if section[2]]


def key_figures(found: Inspection) -> list[tuple[str, str]]:
    """A few figures of the model and the text."""
    config = found.config
    figures = [
        ("tokens", f"{len(found.tokens.ids):,}"),
        ("layers", f"{config.num_hidden_layers}"),
        ("heads of a layer", f"{config.num_attention_heads}"),
    ]
    if found.loss is not None:
        figures += [("loss, nats per token", f"{found.loss:.2f}")]
    return figures


def _tokens(found: Inspection) -> Markup:
    losses = [math.nan, *found.lens.losses()] if len(found.tokens.ids) > 1 else [math.nan]
    worst = max((loss for loss in losses if not math.isnan(loss)), default=0) or 1
    rows = [
        (
            f"{position}",
            token(piece),
            f"{id}",
            f"{start}–{end}" if end > start else "–",
            "–" if math.isnan(loss) else measured(loss / worst, f"{loss:.2f}"),
        )
        for position, (piece, id, (start, end), loss) in enumerate(
            zip(found.tokens.pieces, found.tokens.ids, found.tokens.offsets, losses, strict=True)
        )
    ]
    columns = [Column("Position", True), Column("Token"), Column("Id", True), Column("Characters", True)]
    columns += [Column("Loss, nats", True)]
    return (
        lead("What the model reads, and how much each token surprised it: the loss is −ln of the probability it had.")
        + tokens_html(found.tokens.pieces)
        + Markup("<details><summary>Ids, offsets and losses</summary>{}</details>").format(table(columns, rows))
    )


def _lens(found: Inspection) -> Markup:
    lens, pieces = found.lens, found.tokens.pieces
    shown = range(max(len(pieces) - _LENS, 0), len(pieces))
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(token(pieces[position])) for position in shown)
    rows = []
    for layer in reversed(range(len(lens.tokens_LTk))):
        cells = Markup("")
        for position in shown:
            best, probability = int(lens.tokens_LTk[layer, position, 0]), float(lens.probabilities_LTk[layer, position, 0])
            likeliest = zip(lens.tokens_LTk[layer, position], lens.probabilities_LTk[layer, position], strict=True)
            title = ", ".join(f"{visible(found.pieces[int(id)])} {percent(float(share))}" for id, share in likeliest)
            is_next = position + 1 < len(pieces) and best == found.tokens.ids[position + 1]
            if position + 1 < len(pieces):
                rank, share = int(lens.next_rank_LT[layer, position]), float(lens.next_probability_LT[layer, position])
                title += f"; what comes next, {visible(pieces[position + 1])}, is number {rank:,} with {percent(share)}"
            cells += Markup('<td{} style="background:rgba{}" title="{}">{}</td>').format(
                Markup(' class="next"') if is_next else "",
                f"{(*POSITIVE, round(0.75 * probability, 3))}",
                title,
                token(found.pieces[best]),
            )
        name = "embedding" if layer == 0 else f"layer {layer - 1}"
        rows.append(Markup("<tr><td>{}</td>{}</tr>").format(name, cells))
    actual = Markup("").join(Markup("<td>{}</td>").format(token(piece)) for piece in (*pieces[shown.start + 1 :], "…"))
    body = Markup('<tr class="actual"><td>what comes next</td>{}</tr>{}').format(actual, Markup("").join(rows))
    return (
        lead(
            "The likeliest next token if the model ended after each layer: its last norm and its head on the residual stream "
            "there. The fuller the shade, the surer; underlined is what does come next. Rest the pointer on a cell for the "
            "next likeliest and the rank of the true one."
            + (f" Of {len(pieces)} positions the last {len(shown)} are shown." if len(shown) < len(pieces) else "")
        )
        + Markup('<div class="lens scroll"><table><thead><tr><th></th>{}</tr></thead><tbody>{}</tbody></table></div>').format(
            head, body
        )
        + _ranks(found)
    )


def _ranks(found: Inspection) -> Markup:
    """By layer: how often the true next token is the likeliest, and its median rank."""
    lens = found.lens
    if not lens.next_rank_LT.size:
        return Markup("")
    rows = []
    for layer in range(len(lens.next_rank_LT)):
        ranks, first = lens.next_rank_LT[layer], float((lens.next_rank_LT[layer] == 1).mean())
        loss = float(-np.log(np.maximum(lens.next_probability_LT[layer], 1e-30)).mean())
        name = "embedding" if layer == 0 else f"layer {layer - 1}"
        rows.append((name, measured(first, percent(first)), f"{np.median(ranks):,.0f}", f"{loss:.2f}"))
    columns = [
        Column("After"),
        Column("Right", True),
        Column("Median rank of the next token", True),
        Column("Loss, nats", True),
    ]
    return Markup("<details><summary>How right each layer is</summary>{}</details>").format(table(columns, rows))


def _embedding(found: Inspection) -> Markup:
    parts = [
        Markup("<div><h3>Nearest to {}</h3>{}</div>").format(token(word), _nearest(found, near))
        for word, near in found.neighbours.items()
    ]
    parts += [
        Markup("<div><h3>{}</h3>{}</div>").format(formula, _nearest(found, near)) for formula, near in found.analogies.items()
    ]
    listed = Markup('<div class="columns">{}</div>').format(Markup("").join(parts)) if parts else Markup("")
    note = lead("Each token is a vector; the cosine between two says how nearly they point the same way.") if parts else ""
    return Markup(note) + listed + _map(found.map)


def _nearest(found: Inspection, near: Neighbours) -> Markup:
    rows = [
        (token(found.pieces[int(id)]), measured(max(float(cosine), 0.0), f"{cosine:.2f}"))
        for id, cosine in zip(near.tokens, near.cosines, strict=True)
    ]
    return table([Column("Token"), Column("Cosine", True)], rows)


def _map(tokens: TokenMap) -> Markup:
    """Tokens as points with their names, in the plane in which they vary most."""
    if len(tokens.pieces) < 3:
        return Markup("")
    width, height, margin = 820, 560, 30
    points_N2 = tokens.coordinates_N2[:_ON_MAP]
    low, high = points_N2.min(0), points_N2.max(0)
    unit_N2 = (points_N2 - low) / np.where(high > low, high - low, 1)
    places = [(margin + x * (width - 2 * margin - 60), height - margin - y * (height - 2 * margin)) for x, y in unit_N2]
    parts = Markup("")
    for (x, y), piece, label_y in zip(places, tokens.pieces, _apart(places), strict=False):
        parts += Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.2"/>').format(x, y)
        parts += Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(x + 5, label_y + 4, visible(piece))
    return Markup(
        '<h3>A map</h3>{}<figure class="map"><svg viewBox="0 0 {} {}" role="img" aria-label="map of tokens">{}</svg></figure>'
    ).format(
        lead(
            "The tokens above in the plane in which they vary most (the first two principal components), which keeps "
            f"{percent(tokens.share)} of their variance: near on the map need not be near in the table."
        ),
        width, height, parts,
    )  # fmt: skip


def _apart(places: Sequence[tuple[float, float]]) -> list[float]:
    """Heights for the names of points, moved down where they would lie on one another."""
    heights: list[float] = [y for _, y in places]
    done: list[tuple[float, float]] = []
    for index in sorted(range(len(places)), key=lambda index: places[index][1]):
        x, y = places[index]
        for _ in range(len(done)):
            blocking = [other for other_x, other in done if abs(other_x - x) < 75 and abs(other - y) < 11]
            if not blocking:
                break
            y = max(blocking) + 11
        done.append((x, y))
        heights[index] = y
    return heights


def _experts(found: Inspection) -> Markup:
    if not found.experts:
        return Markup("")
    layers = Markup("")
    for layer, (experts_BTk, weights_BTk) in found.experts.items():
        experts_Tk, weights_Tk = experts_BTk[0], weights_BTk[0]
        share_E = np.bincount(experts_Tk.ravel(), minlength=found.config.num_experts) / experts_Tk.size
        columns = [Column("Token"), *(Column("") for _ in range(experts_Tk.shape[1]))]
        rows = [
            (token(piece), *(_expert(int(id), float(weight)) for id, weight in zip(ids, weights, strict=True)))
            for piece, ids, weights in zip(found.tokens.pieces, experts_Tk, weights_Tk, strict=True)
        ]
        busiest = ", ".join(f"{id} ({percent(share_E[id])})" for id in np.argsort(-share_E, kind="stable")[:3].tolist())
        summary = f"Layer {layer}: busiest experts {busiest}; {int((share_E == 0).sum())} of {len(share_E)} unused"
        layers += Markup('<details{}><summary>{}</summary><div class="experts">{}</div></details>').format(
            Markup(" open") if layer == next(iter(found.experts)) else "", summary, table(columns, rows)
        )
    return lead("In each sparse layer, the experts that each token chose, the heaviest first, with their weights.") + layers


def _expert(id: int, weight: float) -> Markup:
    shade = f"{(*POSITIVE, round(min(max(weight, 0), 1) * 0.75, 3))}"
    return Markup('<span class="shade" style="background:rgba{}">{}</span> <span class="soft">{:.2f}</span>').format(
        shade, id, weight
    )


_SECTIONS = (
    ("tokens", "Tokens", _tokens),
    ("attention", "Attention", heads.attention),
    ("head", "One head, step by step", heads.opened_head),
    ("lens", "Logit lens", _lens),
    ("roles", "What heads look for", heads.roles),
    ("ablation", "Without each head", heads.ablation),
    ("experts", "Experts", _experts),
    ("embedding", "Embedding", _embedding),
)
