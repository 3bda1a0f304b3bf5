"""Attention as pictures: every head, one head step by step, what heads look for, and the loss without each."""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup

from bessemer.core.figures import label, percent
from bessemer.core.report import Column
from bessemer.inspection.inspect import Inspection
from bessemer.inspection.roles import ROLES, strongest
from bessemer.inspection.steps import OpenedHead
from bessemer.views.bars import measured
from bessemer.views.heat import POSITIVE, WEIGHT_EXPONENT, heat_map, strip, weights_picture
from bessemer.views.tables import lead, table
from bessemer.views.tokens import token, visible

#: Labels along one side of a picture, and rows of the table of steps: no more than can be read.
_LABELS, _STEPS = 40, 64
#: More heads than this have smaller pictures.
_MANY_HEADS = 12

ROLE_NOTES = {
    "previous_token": "looks at the token before",
    "same_token": "looks at the same token, earlier",
    "induction": "looks at what came after the same token last time",
    "first_token": "rests on the first token",
}


def attention(found: Inspection) -> Markup:
    """Every head as a small picture, and the chosen one large."""
    if not any(weights is not None for weights in found.attention):
        return lead("Every layer of this model is linear attention: a state, and no attention weights to draw.")
    chosen = (found.opened.layer, found.opened.head) if found.opened else (0, 0)
    heads = max(len(weights) for weights in found.attention if weights is not None)
    variables, shown, rows = [], [], []
    for layer, weights in enumerate(found.attention):
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
    grid = Markup('<div class="pictures{}"><table><thead><tr><th></th>{}</tr></thead><tbody>{}</tbody></table></div>').format(
        " many" if heads > _MANY_HEADS else "", top, Markup("").join(rows)
    )
    note = lead(
        "Each small picture is one head (layers down, heads across): a row for each token that looks, a column for each that "
        "is looked at. Choose one to see it large. A row's weights sum to 1"
        + (", less what the head's sink takes." if found.config.attention_sinks else ".")
    )
    return note + style + Markup('<div class="attention">{}{}</div>').format(grid, _large(found)) + _towards(found)


def _large(found: Inspection) -> Markup:
    """The place where the chosen head is drawn large, with the tokens along its sides."""
    pieces = found.tokens.pieces
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
    return Markup('<div class="large"><h3></h3><div class="square"><i></i>{}</div><p class="scale">weight {}</p></div>').format(
        labels, steps
    )


def _towards(found: Inspection) -> Markup:
    """How hard each head looks from the asked query at the asked key."""
    if found.opened is None or found.key is None:
        return Markup("")
    looks_LH = found.towards(found.opened.position, found.key)
    query, key = (token(found.tokens.pieces[place]) for place in (found.opened.position, found.key))
    best = strongest(looks_LH, 8)
    rows = [(f"layer {layer}, head {head}", measured(weight, percent(weight))) for layer, head, weight in best]
    drawn = heat_map(
        looks_LH, title="Weight by layer and head", shown=percent, marked=[place[:2] for place in best[:1]], limit=1
    )
    return Markup('<h3>Which heads of {} look at {}</h3><div class="heats">{}<div>{}</div></div>').format(
        query, key, drawn, table([Column("Head"), Column("Weight", True)], rows)
    )


def opened_head(found: Inspection) -> Markup:
    """One head at one position: scores, mask, softmax, the weighted sum of values."""
    opened = found.opened
    if opened is None:
        return Markup("")
    query = found.tokens.pieces[opened.position]
    shown = _shown_keys(opened)
    limit = float(np.abs(opened.keys_TC[shown]).max(initial=0)) or 1.0
    values_limit = float(np.abs(opened.values_TV[shown]).max(initial=0)) or 1.0
    columns = [Column("Key"), Column("k"), Column("q · k", True), Column("scaled", True)]
    columns += [Column("capped", True)] * (opened.softcap is not None) + [Column("+ mask", True)]
    columns += [Column("Weight", True), Column("v")]
    rows, unseen = [], []
    for key in shown:
        cells: list[str | Markup] = [
            Markup('{} <span class="soft">{}</span>').format(token(found.tokens.pieces[key]), key),
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
        + Markup("<h4>q of {}</h4>{}").format(token(query), strip(opened.query_C))
        + Markup('<div class="steps">{}</div>').format(table(columns, rows, unseen))
        + Markup("<h4>output: the weighted sum of v</h4>{}").format(strip(opened.output_V, values_limit))
    )


def _shown_keys(opened: OpenedHead) -> list[int]:
    """The keys in the table of steps: all of a short text, else those with the largest weights, in order."""
    if len(opened.weights_T) <= _STEPS:
        return list(range(len(opened.weights_T)))
    return sorted(np.argsort(-opened.weights_T, kind="stable")[:_STEPS].tolist())


def roles(found: Inspection) -> Markup:
    """How far every head plays each role."""
    if not any(np.isfinite(scores).any() for scores in found.roles.values()):
        return Markup("")
    columns = Markup("")
    for role in ROLES:
        best = strongest(found.roles[role])
        rows = [(f"{layer}", f"{head}", f"{score:.2f}") for layer, head, score in best]
        columns += Markup('<div>{}<p class="soft">{}</p>{}</div>').format(
            heat_map(found.roles[role], title=label(role), shown=percent, marked=[best[0][:2]] if best else [], limit=1),
            ROLE_NOTES[role],
            table([Column("Layer"), Column("Head"), Column("Score", True)], rows),
        )
    return lead(
        "What heads look for, scored on random tokens that come twice in the same order: the mean attention to the token "
        "before, to the same token, to the token after it (induction), to the first token."
    ) + Markup('<div class="roles">{}</div>').format(columns)


def ablation(found: Inspection) -> Markup:
    """What the loss does without each head."""
    changes_LH = found.head_changes_LH
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
        f"The loss on this text is {found.loss:.3f} nats per token. Here is by how much it changes when one head alone adds "
        "nothing: orange where the model needs it, blue where this text is likelier without it. On a short text this is "
        "what happens here, not what a head is worth in general."
    ) + Markup('<div class="heats">{}{}</div>').format(drawn, lists)


def signed(change: float) -> str:
    """A change with its sign: `+0.781`, `−0.127`."""
    return f"{change:+.3f}".replace("-", "−")
