"""What `bessemer inspect` prints: the short form of its page."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bessemer.core.metrics import label, percent
from bessemer.inspection.heads import ROLES, strongest
from bessemer.inspection.inspect import Inspection, Neighbours
from bessemer.views.elements import tokens_text, visible
from bessemer.views.inspection import key_figures, signed
from bessemer.views.parts_terminal import bar_text, listing, section

#: Most rows of a list, most tokens or heads in a line, and most keys of the opened head.
_ROWS, _LIKELY, _KEYS = 5, 3, 12


def show_inspection(inspection: Inspection) -> RenderableType:
    """Tokens, where the opened head looks, what layers predict, what heads do, experts, neighbours."""
    facts = "   ".join(f"{name} {value}" for name, value in key_figures(inspection))
    parts: list[RenderableType] = [tokens_text(inspection.tokens.pieces), Text(facts, "dim")]
    if inspection.opened is None:
        parts.append(Text("every layer is linear attention: a state, and no attention weights", "dim"))
    else:
        if inspection.key is not None:
            pieces = (visible(inspection.tokens.pieces[place]) for place in (inspection.opened.position, inspection.key))
            best = strongest(inspection.towards(inspection.opened.position, inspection.key), _ROWS)
            parts += section("Which heads of {} look at {}".format(*pieces), _heads(best, percent))
        parts += section(f"Layer {inspection.opened.layer}, head {inspection.opened.head}, step by step", _steps(inspection))
    parts += section("What each layer would predict after the last token", _lens(inspection))
    if any(np.isfinite(scores).any() for scores in inspection.roles.values()):
        parts += section("What heads look for, on random tokens that come twice (layer.head score)", _roles(inspection))
    if inspection.head_changes_LH is not None:
        parts += section("The loss rises most without", _heads(strongest(inspection.head_changes_LH, _ROWS), signed))
    if inspection.experts:
        parts += section("Experts of each token", _experts(inspection))
    for name, near in (inspection.neighbours | inspection.analogies).items():
        parts += section(f"Nearest to {visible(name) if name in inspection.neighbours else name}", _nearest(inspection, near))
    return Group(*parts)


def _heads(best: list[tuple[int, int, float]], shown: Callable[[float], str]) -> Table:
    return listing("layer", "head", "", rows=[(f"{layer}", f"{head}", shown(value)) for layer, head, value in best])


def _steps(inspection: Inspection) -> Table:
    opened = inspection.opened
    assert opened is not None
    drawn = listing("key", "position", "q · k", "scaled", *(["capped"] if opened.softcap else []), "masked", "weight", "")
    seen = [key for key in range(len(opened.weights_T)) if not np.isneginf(opened.masked_T[key])]
    largest = sorted(sorted(seen, key=lambda key: -opened.weights_T[key])[:_KEYS])
    for key in largest:
        scores = [opened.products_T, opened.scaled_T, *([opened.capped_T] if opened.softcap else []), opened.masked_T]
        weight = float(opened.weights_T[key])
        drawn.add_row(
            Text(visible(inspection.tokens.pieces[key])),
            f"{key}",
            *(f"{score[key]:.2f}" for score in scores),
            f"{weight:.3f}",
            bar_text(weight),
        )
    if opened.sink is not None:
        blank = [""] * (3 + (opened.softcap is not None))
        drawn.add_row(
            Text("sink", "dim"), *blank, f"{opened.sink:.2f}", f"{opened.sink_share:.3f}", bar_text(opened.sink_share)
        )
    return drawn


def _lens(inspection: Inspection) -> Table:
    lens = inspection.lens
    drawn = Table.grid(padding=(0, 2))
    for layer in range(len(lens.tokens_LTk)):
        likeliest = zip(lens.tokens_LTk[layer, -1], lens.probabilities_LTk[layer, -1], strict=True)
        words = "   ".join(
            f"{visible(inspection.pieces[int(id)])} {percent(float(share))}" for id, share in [*likeliest][:_LIKELY]
        )
        drawn.add_row(Text("embedding" if layer == 0 else f"layer {layer - 1}", "dim"), Text(words))
    return drawn


def _roles(inspection: Inspection) -> Table:
    drawn = Table.grid(padding=(0, 2))
    for role in ROLES:
        best = "   ".join(f"{layer}.{head} {score:.2f}" for layer, head, score in strongest(inspection.roles[role], _LIKELY))
        drawn.add_row(Text(label(role)), Text(best))
    return drawn


def _experts(inspection: Inspection) -> Table:
    drawn = listing("token", *(f"layer {layer}" for layer in inspection.experts))
    for position, piece in enumerate(inspection.tokens.pieces):
        chosen = (" ".join(map(str, experts.experts_BTk[0, position].tolist())) for experts in inspection.experts.values())
        drawn.add_row(Text(visible(piece)), *chosen)
    return drawn


def _nearest(inspection: Inspection, near: Neighbours) -> RenderableType:
    pairs = zip(near.tokens, near.cosines, strict=True)
    return Text("   ".join(f"{visible(inspection.pieces[int(id)])} {cosine:.2f}" for id, cosine in pairs))
