"""The page of `bessemer inspect`: one HTML file that needs no script and no network.

Tokens, attention (every head, one head step by step, roles, the loss without each), logit lens, experts, embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from bessemer.core.metrics import label, percent
from bessemer.core.report import Column
from bessemer.inspection.heads import ROLES, OpenedHead, strongest
from bessemer.inspection.inspect import Inspection, Neighbours, TokenMap
from bessemer.views.elements import (
    POSITIVE,
    WEIGHT_EXPONENT,
    heat_map,
    lead,
    measured,
    render_page,
    strip,
    table,
    token,
    tokens_html,
    visible,
    weights_picture,
)

#: Most labels along one side of a picture, and most rows of the table of steps.
_LABELS, _STEPS = 40, 64
#: More heads than this have smaller pictures.
_MANY_HEADS = 12

ROLE_NOTES = {
    "previous_token": "looks at the token before",
    "same_token": "looks at the same token, earlier",
    "induction": "looks at what came after the same token last time",
    "first_token": "rests on the first token",
}


def attention(inspection: Inspection) -> Markup:
    """Every head as a small picture, and the chosen one large."""
    if not any(weights is not None for weights in inspection.attention):
        return lead("Every layer of this model is linear attention: a state, and no attention weights to draw.")
    chosen = (inspection.opened.layer, inspection.opened.head) if inspection.opened else (0, 0)
    heads = max(len(weights) for weights in inspection.attention if weights is not None)
    variables, shown, rows = [], [], []
    for layer, weights in enumerate(inspection.attention):
        if weights is None:
            cells = Markup('<td class="linear" colspan="{}">linear attention: a state, no weights</td>').format(heads)
        else:
            cells = Markup("")
            for head, picture in enumerate(weights):
                id = f"h{layer}-{head}"
                variables.append(f"--{id}:url({weights_picture(picture)});")
                shown.append(
                    f'.attention:has(#{id}:checked){{--shown:var(--{id});--shown-name:"Layer {layer}, head {head}"}}\n'
                )
                cells += Markup(
                    '<td><label title="layer {} head {}"><input type="radio" name="head" id="{}"{}>'
                    '<i style="background-image:var(--{})"></i></label></td>'
                ).format(layer, head, id, " checked" if (layer, head) == chosen else "", id)
        rows.append(Markup('<tr><th scope="row">{}</th>{}</tr>').format(layer, cells))
    top = Markup("").join(Markup("<th>{}</th>").format(head) for head in range(heads))
    style = Markup("<style>.attention{{{}}}\n{}</style>").format(Markup("".join(variables)), Markup("".join(shown)))
    grid = Markup('<div class="pictures{}"><table><thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table></div>').format(
        " many" if heads > _MANY_HEADS else "", top, Markup("").join(rows)
    )
    note = lead(
        "Each small picture is one head (layers down, heads across): a row for each token that looks, a column for each that "
        "is looked at. Choose one to see it large. A row's weights sum to 1"
        + (", less what the head's sink takes." if inspection.config.attention_sinks else ".")
    )
    return note + style + Markup('<div class="attention">{}{}</div>').format(grid, _large(inspection)) + _towards(inspection)


def _large(inspection: Inspection) -> Markup:
    """The chosen head drawn large, with the tokens along its sides."""
    pieces = inspection.tokens.pieces
    every = math.ceil(len(pieces) / _LABELS)
    labels = Markup("")
    for position in range(0, len(pieces), every):
        place, text = f"{100 * (position + 0.5) / len(pieces):.3f}%", visible(pieces[position])
        labels += Markup('<span class="row" style="top:{}">{}</span>').format(place, text)
        labels += Markup('<span class="column" style="left:{}">{}</span>').format(place, text)
    steps = Markup("").join(
        Markup('<span><b style="background:rgba{}"></b>{}</span>').format(
            f"{(*POSITIVE, round(w**WEIGHT_EXPONENT, 3))}", f"{w:g}"
        )
        for w in (0.01, 0.1, 0.25, 0.5, 1.0)
    )
    return Markup(
        '<div class="large"><p class="chosen"></p><div class="square"><i></i>{}</div><p class="scale">weight {}</p></div>'
    ).format(labels, steps)


def _towards(inspection: Inspection) -> Markup:
    """The attention of each head from the chosen query to the chosen key."""
    if inspection.opened is None or inspection.key is None:
        return Markup("")
    looks_LH = inspection.towards(inspection.opened.position, inspection.key)
    query, key = (token(inspection.tokens.pieces[place]) for place in (inspection.opened.position, inspection.key))
    best = strongest(looks_LH, 8)
    rows = [(f"layer {layer}, head {head}", measured(weight, percent(weight))) for layer, head, weight in best]
    drawn = heat_map(
        looks_LH, title="Weight by layer and head", shown=percent, marked=[place[:2] for place in best[:1]], limit=1
    )
    return Markup('<h3>Which heads of {} look at {}</h3><div class="heats">{}<div>{}</div></div>').format(
        query, key, drawn, table([Column("Head"), Column("Weight", True)], rows)
    )


def opened_head(inspection: Inspection) -> Markup:
    """One head at one position: scores, mask, softmax, the weighted sum of values."""
    opened = inspection.opened
    if opened is None:
        return Markup("")
    query = inspection.tokens.pieces[opened.position]
    shown = _shown_keys(opened)
    limit = float(np.abs(opened.keys_TC[shown]).max(initial=0)) or 1.0
    values_limit = float(np.abs(opened.values_TV[shown]).max(initial=0)) or 1.0
    columns = [Column("Key"), Column("k"), Column("q · k", True), Column("scaled", True)]
    columns += [Column("capped", True)] * (opened.softcap is not None) + [Column("+ mask", True)]
    columns += [Column("Weight", True), Column("v")]
    rows, unseen = [], []
    for key in shown:
        cells: list[str | Markup] = [
            Markup('{} <span class="soft">{}</span>').format(token(inspection.tokens.pieces[key]), key),
            strip(opened.keys_TC[key], limit),
            f"{opened.products_T[key]:.2f}",
            f"{opened.scaled_T[key]:.2f}",
        ]
        cells += [f"{opened.capped_T[key]:.2f}"] * (opened.softcap is not None)
        cells += ["−∞" if np.isneginf(opened.masked_T[key]) else f"{opened.masked_T[key]:.2f}"]
        cells += [
            measured(float(opened.weights_T[key]), f"{opened.weights_T[key]:.3f}"),
            strip(opened.values_TV[key], values_limit),
        ]
        rows.append(cells)
        unseen.append("unseen" if np.isneginf(opened.masked_T[key]) else "")
    scale = f"1 / √{1 / opened.scale**2:.4g}" if opened.scale < 1 else f"{opened.scale:.4g}"
    cap = (
        f" They are held within ±{opened.softcap:g} by {opened.softcap:g} · tanh(score / {opened.softcap:g})."
        if opened.softcap
        else ""
    )
    sink = "" if opened.sink is None else (
        f" A sink with the score {opened.sink:.2f} takes part in the softmax and takes {percent(opened.sink_share)}: "
        "the weights below sum to the rest."
    )  # fmt: skip
    left_out = len(opened.weights_T) - len(shown)
    note = f" The {len(shown)} keys with the largest weights are shown, {left_out} are left out." if left_out else ""
    return (
        Markup("<p>Layer {}, head {}, at position {}: {}.</p>").format(opened.layer, opened.head, opened.position, token(query))
        + Markup('<p class="formula">weights = softmax(q · k × {} + mask), output = Σ weight · v</p>').format(scale)
        + lead(
            "q and k are normed where the model norms them and turned by their positions. Strips show a vector's channels: "
            f"orange positive, blue negative, the fuller the larger. A score is q · k times {scale}.{cap} The mask takes away "
            f"what may not be seen; the softmax turns scores into weights.{sink}{note}"
        )
        + Markup('<h3 class="minor">q of {}</h3>{}').format(token(query), strip(opened.query_C))
        + Markup('<div class="steps">{}</div>').format(table(columns, rows, unseen))
        + Markup('<h3 class="minor">output: the weighted sum of v</h3>{}').format(strip(opened.output_V, values_limit))
    )


def _shown_keys(opened: OpenedHead) -> list[int]:
    """The keys in the table of steps: all of a short text, else those with the largest weights, in order."""
    if len(opened.weights_T) <= _STEPS:
        return list(range(len(opened.weights_T)))
    return sorted(np.argsort(-opened.weights_T, kind="stable")[:_STEPS].tolist())


def roles(inspection: Inspection) -> Markup:
    """The score of every head in each role."""
    if not any(np.isfinite(scores).any() for scores in inspection.roles.values()):
        return Markup("")
    columns = Markup("")
    for role in ROLES:
        best = strongest(inspection.roles[role])
        rows = [(f"{layer}", f"{head}", f"{score:.2f}") for layer, head, score in best]
        columns += Markup('<div>{}<p class="soft">{}</p>{}</div>').format(
            heat_map(inspection.roles[role], title=label(role), shown=percent, marked=[best[0][:2]] if best else [], limit=1),
            ROLE_NOTES[role],
            table([Column("Layer"), Column("Head"), Column("Score", True)], rows),
        )
    return lead(
        "What heads look for, scored on random tokens that come twice in the same order: the mean attention to the token "
        "before, to the same token, to the token after it (induction), to the first token."
    ) + Markup('<div class="roles">{}</div>').format(columns)


def ablation(inspection: Inspection) -> Markup:
    """The change of the loss without each head."""
    changes_LH = inspection.head_changes_LH
    if changes_LH is None:
        return Markup("")
    needed, harmful = strongest(changes_LH), strongest(-changes_LH)
    rows = [(f"layer {layer}, head {head}", signed(change)) for layer, head, change in needed]
    fewer = [(f"layer {layer}, head {head}", signed(-change)) for layer, head, change in harmful if change > 0]
    drawn = heat_map(changes_LH, title="Change of the loss, nats per token", shown=signed, marked=[needed[0][:2]])
    lists = Markup("<div><h3>Needed most</h3>{}</div>").format(table([Column("Head"), Column("Loss", True)], rows))
    if fewer:
        lists += Markup("<div><h3>The text is likelier without</h3>{}</div>").format(
            table([Column("Head"), Column("Loss", True)], fewer)
        )
    return lead(
        f"The loss on this text is {inspection.loss:.3f} nats per token. Here is by how much it changes when one head alone "
        "adds nothing: orange where the model needs it, blue where this text is likelier without it. On a short text this is "
        "what happens here, not what a head is worth in general."
    ) + Markup('<div class="heats">{}{}</div>').format(drawn, lists)


def signed(change: float) -> str:
    """A change with its sign: `+0.781`, `−0.127`."""
    return f"{change:+.3f}".replace("-", "−")


#: Most words on the map, positions of the lens (the last ones), and characters of the heading.
_ON_MAP, _LENS, _HEADING = 120, 64, 160


def inspection_page(inspection: Inspection, name: str) -> str:
    """The whole page. name: the model's. Every text from outside is escaped; the same numbers give the same bytes."""
    return render_page(
        "inspection.html.jinja",
        ["style.css", "inspection.css"],
        name=name,
        heading=inspection.text if len(inspection.text) <= _HEADING else f"{inspection.text[:_HEADING]}…",
        figures=key_figures(inspection),
        sections=inspection_sections(inspection),
    )


def inspection_sections(inspection: Inspection) -> list[tuple[str, str, Markup]]:
    """The page's sections: an anchor, a title and what stands below it."""
    sections = [(anchor, title, Markup(draw(inspection))) for anchor, title, draw in _SECTIONS]
    return [section for section in sections if section[2]]


def key_figures(inspection: Inspection) -> list[tuple[str, str]]:
    """A few figures of the model and the text."""
    config = inspection.config
    figures = [
        ("tokens", f"{len(inspection.tokens.ids):,}"),
        ("layers", f"{config.num_hidden_layers}"),
        ("heads of a layer", f"{config.num_attention_heads}"),
    ]
    if inspection.loss is not None:
        figures += [("loss, nats per token", f"{inspection.loss:.2f}")]
    return figures


def _tokens(inspection: Inspection) -> Markup:
    losses = [math.nan, *inspection.lens.losses()] if len(inspection.tokens.ids) > 1 else [math.nan]
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
            zip(inspection.tokens.pieces, inspection.tokens.ids, inspection.tokens.offsets, losses, strict=True)
        )
    ]
    columns = [Column("Position", True), Column("Token"), Column("Id", True), Column("Characters", True)]
    columns += [Column("Loss, nats", True)]
    return (
        lead("What the model reads, and how much each token surprised it: the loss is −ln of the probability it had.")
        + tokens_html(inspection.tokens.pieces)
        + Markup("<details><summary>Ids, offsets and losses</summary>{}</details>").format(table(columns, rows))
    )


def _lens(inspection: Inspection) -> Markup:
    lens, pieces = inspection.lens, inspection.tokens.pieces
    shown = range(max(len(pieces) - _LENS, 0), len(pieces))
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(token(pieces[position])) for position in shown)
    rows = []
    for layer in reversed(range(len(lens.tokens_LTk))):
        cells = Markup("")
        for position in shown:
            best, probability = int(lens.tokens_LTk[layer, position, 0]), float(lens.probabilities_LTk[layer, position, 0])
            likeliest = zip(lens.tokens_LTk[layer, position], lens.probabilities_LTk[layer, position], strict=True)
            title = ", ".join(f"{visible(inspection.pieces[int(id)])} {percent(float(share))}" for id, share in likeliest)
            is_next = position + 1 < len(pieces) and best == inspection.tokens.ids[position + 1]
            if position + 1 < len(pieces):
                rank, share = int(lens.next_rank_LT[layer, position]), float(lens.next_probability_LT[layer, position])
                title += f"; what comes next, {visible(pieces[position + 1])}, is number {rank:,} with {percent(share)}"
            cells += Markup('<td{} style="background:rgba{}" title="{}">{}</td>').format(
                Markup(' class="next"') if is_next else "",
                f"{(*POSITIVE, round(0.75 * probability, 3))}",
                title,
                token(inspection.pieces[best]),
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
        + Markup(
            '<div class="lens scroll" tabindex="0"><table><thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table></div>'
        ).format(head, body)
        + _ranks(inspection)
    )


def _ranks(inspection: Inspection) -> Markup:
    """By layer: how often the true next token is the likeliest, and its median rank."""
    lens = inspection.lens
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


def _embedding(inspection: Inspection) -> Markup:
    parts = [
        Markup("<div><h3>Nearest to {}</h3>{}</div>").format(token(word), _nearest(inspection, near))
        for word, near in inspection.neighbours.items()
    ]
    parts += [
        Markup("<div><h3>{}</h3>{}</div>").format(formula, _nearest(inspection, near))
        for formula, near in inspection.analogies.items()
    ]
    listed = Markup('<div class="columns">{}</div>').format(Markup("").join(parts)) if parts else Markup("")
    note = lead("Each token is a vector; the cosine between two says how nearly they point the same way.") if parts else ""
    return Markup(note) + listed + _map(inspection.map)


def _nearest(inspection: Inspection, near: Neighbours) -> Markup:
    rows = [
        (token(inspection.pieces[int(id)]), measured(max(float(cosine), 0.0), f"{cosine:.2f}"))
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
    """Heights of the names of points, moved down where they would overlap."""
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


def _experts(inspection: Inspection) -> Markup:
    if not inspection.experts:
        return Markup("")
    layers = Markup("")
    for layer, (experts_BTk, weights_BTk) in inspection.experts.items():
        experts_Tk, weights_Tk = experts_BTk[0], weights_BTk[0]
        share_E = np.bincount(experts_Tk.ravel(), minlength=inspection.config.num_experts) / experts_Tk.size
        columns = [Column("Token"), *(Column("") for _ in range(experts_Tk.shape[1]))]
        rows = [
            (token(piece), *(_expert(int(id), float(weight)) for id, weight in zip(ids, weights, strict=True)))
            for piece, ids, weights in zip(inspection.tokens.pieces, experts_Tk, weights_Tk, strict=True)
        ]
        busiest = ", ".join(f"{id} ({percent(share_E[id])})" for id in np.argsort(-share_E, kind="stable")[:3].tolist())
        summary = f"Layer {layer}: busiest experts {busiest}; {int((share_E == 0).sum())} of {len(share_E)} unused"
        layers += Markup('<details{}><summary>{}</summary><div class="experts">{}</div></details>').format(
            Markup(" open") if layer == next(iter(inspection.experts)) else "", summary, table(columns, rows)
        )
    return lead("In each sparse layer, the experts that each token chose, the heaviest first, with their weights.") + layers


def _expert(id: int, weight: float) -> Markup:
    shade = f"{(*POSITIVE, round(min(max(weight, 0), 1) * 0.75, 3))}"
    return Markup('<span class="shade" style="background:rgba{}">{}</span> <span class="soft">{:.2f}</span>').format(
        shade, id, weight
    )


_SECTIONS = (
    ("tokens", "Tokens", _tokens),
    ("attention", "Attention", attention),
    ("head", "One head, step by step", opened_head),
    ("lens", "Logit lens", _lens),
    ("roles", "What heads look for", roles),
    ("ablation", "Without each head", ablation),
    ("experts", "Experts", _experts),
    ("embedding", "Embedding", _embedding),
)
