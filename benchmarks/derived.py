"""Tables and figures that pages show beyond a result's own, computed from its rounds and trials when a page is written.

`best` sets our median beside the peer's fastest of all its rounds and of all the trials by which its settings were chosen, so
that no chance on its side counts for us.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import recording

_COLUMNS = [("tokens/s", ""), ("Bessemer, median", ",.0f"), ("llama.cpp, fastest of any trial", ",.0f"), ("ratio", ".2f~ ×")]
_FILES = {"q8_0": "Q8_0", "q4_0": "Q4_0"}
_STREAMS = {"streams_8": 8, "streams_32": 32}
#: Of `gguf_forms`: what is compared under which name, ours and the peer's.
_FORMS = {
    **{f"1b_{form.lower()}": (f"{form}_bessemer", f"{form}_llama.cpp") for form in ("Q4_K_M", "Q8_0", "Q4_0")},
    "avx2_q8_0": ("arithmetic_avx2", "arithmetic_llama.cpp for AVX2"),
}


def fastest(rounds: Iterable[float], tried: Iterable[Mapping[str, Any]] = ()) -> float:
    """The largest rate of any round and of any trial that did not fail."""
    return max([*rounds, *(trial["rate"] for trial in tried if "rate" in trial)])


def _servers(figures: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for what, clients in _STREAMS.items():
        for file in _FILES:
            for sampling, label in (("greedy", "greedy"), ("top_p", "top-p")):
                found = figures[what][file][sampling]
                ours, peer = found["bessemer"]["median"], fastest(found["peer"]["rounds"], found["options"]["tried"])
                rows.append([f"{clients} clients, {_FILES[file]}, {label}", ours, peer, ours / peer])
    ratios = [row[-1] for row in rows]
    return {"figures": {"beside_best": {"lowest": min(ratios), "highest": max(ratios)}}, "tables": {"best": rows}}


def _gguf_forms(figures: Mapping[str, Any]) -> dict[str, Any]:
    ratios = {
        name: figures[ours]["decode"]["median"] / fastest(figures[peer]["decode"]["rounds"])
        for name, (ours, peer) in _FORMS.items()
    }
    return {"figures": {"decoding_beside_best": ratios}, "tables": {}}


def _machines(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"figures": {"minutes": {name: run["whole_seconds"] / 60 for name, run in figures.items()}}, "tables": {}}


def _first_minute(figures: Mapping[str, Any]) -> dict[str, Any]:
    written = figures["written"]
    peer = fastest(written["peer"]["rate"]["rounds"], written["peer"]["tried"])
    found = {
        "seconds": figures["started"]["demo, warm"]["first"]["median"],
        "cold_seconds": figures["started"]["demo, cold"]["first"]["median"],
        "beside_best": written["bessemer"]["rate"]["median"] / peer,
    }
    return {"figures": {"demo": found}, "tables": {}}


_OF = {
    "first_minute": _first_minute,
    "servers": _servers,
    "gguf_forms": _gguf_forms,
    "machines": _machines,
}


def with_derived(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """A result with what is computed from it; the result itself where nothing is."""
    if result["name"] not in _OF:
        return result
    more = _OF[result["name"]](result["figures"])
    tables = {name: recording.table(_COLUMNS, rows) for name, rows in more["tables"].items()}
    return {**result, "figures": result["figures"] | more["figures"], "tables": result["tables"] | tables}
