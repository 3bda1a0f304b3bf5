"""The routes that the pages call, for `/openapi.json`."""

from __future__ import annotations

from typing import Any

from bessemer.serving.openapi import Operation
from bessemer.webapp.change_api import ChangeRequest
from bessemer.webapp.feedback import Feedback
from bessemer.webapp.forward_api import ForwardRequest
from bessemer.webapp.lineage_api import EarlierRequest, GrowthRequest
from bessemer.webapp.pictures_api import PatchRequest, PicturesRequest
from bessemer.webapp.safety_api import GuardCheck
from bessemer.webapp.token_api import PiecesRequest, TokenRequest
from bessemer.webapp.xray_api import WithoutRequest, XrayRequest

_ANY: dict[str, Any] = {}
_RUNS, _DOCUMENTS = "/inspect/runs", "/inspect/documents"


def _object(*names: str) -> dict[str, Any]:
    """An object with at least these properties."""
    return {"type": "object", "required": list(names), "properties": dict.fromkeys(names, _ANY)}


def _read(summary: str, *names: str, path: tuple[str, ...] = ()) -> Operation:
    return Operation(summary, _object(*names), path=path, tag="Pages")


#: (path, method) → route.
OPERATIONS: dict[tuple[str, str], Operation] = {
    ("/feedback", "post"): Operation("Keep what is said of an answer.", _object("kept"), Feedback, tag="Pages"),
    ("/feedback/train", "post"): Operation(
        "Start `preference` on the pairs that were kept.", _object("run", "pairs"), tag="Pages"
    ),
    ("/feedback/{identity}", "delete"): Operation(
        "Take back the label of an answer.", _object("deleted"), path=("identity",), tag="Pages"
    ),
    ("/inspect/pieces", "post"): Operation("The text of each token.", _object("pieces"), PiecesRequest, tag="Pages"),
    ("/inspect/opening/{name}", "get"): _read("Whether a model is open.", "state", "seconds", "bytes", path=("name",)),
    ("/inspect/token", "post"): Operation(
        "What could have come in a token's place, and what each layer would have said.",
        _object("alternatives", "lens", "entropy_bits", "kept", "vocabulary"),
        TokenRequest,
        tag="Pages",
    ),
    ("/inspect/pictures", "post"): Operation(
        "How much of its attention a token gives to each part of the prompt's pictures.",
        _object("pictures", "before", "layers", "heads", "strongest"),
        PicturesRequest,
        tag="Pages",
    ),
    ("/inspect/patch", "post"): Operation(
        "What each layer would say behind one token of the prompt.", _object("id", "piece", "lens"), PatchRequest, tag="Pages"
    ),
    ("/inspect/forward", "post"): Operation(
        "A token's way through the model, as a stream of events.", None, ForwardRequest, tag="Pages"
    ),
    ("/inspect/heads", "get"): _read("What heads were measured to look for.", "layers", "heads", "names"),
    ("/inspect/change", "post"): Operation(
        "Go on with and without a change, as a stream of events.", None, ChangeRequest, tag="Pages"
    ),
    ("/inspect/earlier", "post"): Operation(
        "What the run's earlier models say of a token.", _object("models"), EarlierRequest, tag="Pages"
    ),
    ("/inspect/growth", "post"): Operation(
        "How likely an answer's tokens were to the run's models, as a stream of events.", None, GrowthRequest, tag="Pages"
    ),
    ("/inspect/origins", "post"): Operation(
        "The spans of an answer that stand in the training data.", _object("text", "spans"), GrowthRequest, tag="Pages"
    ),
    ("/inspect/training", "post"): Operation(
        "Training documents and examples with the tokens before one.",
        _object("run", "passages", "looked_at", "documents"),
        EarlierRequest,
        tag="Pages",
    ),
    ("/inspect/xray", "post"): Operation(
        "A sentence, seen from inside.", _object("figures", "sections", "layers", "heads"), XrayRequest, tag="Pages"
    ),
    ("/inspect/without", "post"): Operation(
        "Go on with a sentence, with and without a head.", _object("whole", "without"), WithoutRequest, tag="Pages"
    ),
    (_RUNS, "get"): _read("The runs.", "runs"),
    (f"{_RUNS}/{{run}}", "get"): _read("A run and its stages.", "name", "stages", path=("run",)),
    (f"{_RUNS}/{{run}}/figures", "get"): _read("A run's curves.", path=("run",)),
    (f"{_RUNS}/{{run}}/report", "get"): Operation("A run's report, as HTML.", None, path=("run",), tag="Pages"),
    (f"{_RUNS}/{{run}}/stages/{{stage}}/section", "get"): _read("A stage's section of the report.", path=("run", "stage")),
    (f"{_RUNS}/{{run}}/stages/{{stage}}/{{what}}", "get"): _read(
        "Lines that a stage has written since a place.", path=("run", "stage", "what")
    ),
    (f"{_RUNS}/{{run}}/beside/{{other}}", "get"): _read("Two runs compared.", path=("run", "other")),
    ("/inspect/safety", "get"): _read("The guard's policy, and its latest decisions.", "policy", "rails", "decisions", "texts"),
    ("/inspect/safety/check", "post"): Operation(
        "What the guard would do about a text.", _object("decision", "findings"), GuardCheck, tag="Pages"
    ),
    ("/inspect/redteams", "get"): _read("The runs of red teams.", "runs"),
    ("/inspect/redteams/{name}", "get"): _read("What a red team found.", "html", path=("name",)),
    ("/inspect/sweeps", "get"): _read("The sweeps.", "sweeps"),
    ("/inspect/evaluations", "get"): _read("The evaluations.", "evaluations"),
    ("/inspect/evaluations/beside", "get"): _read("Two evaluations compared."),
    (f"{_DOCUMENTS}/{{run}}", "get"): _read("The folders of a run's documents.", "folders", path=("run",)),
    (f"{_DOCUMENTS}/{{run}}/{{stage}}/{{side}}", "get"): _read(
        "Documents that a stage kept or dropped.", "rows", "looked_at", "documents", path=("run", "stage", "side")
    ),
    (f"{_DOCUMENTS}/{{run}}/{{stage}}/{{side}}/facets", "get"): _read(
        "Sources, splits and reasons.", "sources", "splits", "rules", path=("run", "stage", "side")
    ),
    (f"{_DOCUMENTS}/{{run}}/{{stage}}/{{side}}/duplicates", "get"): _read(
        "Groups of duplicates.", "groups", path=("run", "stage", "side")
    ),
    (f"{_DOCUMENTS}/{{run}}/{{identity}}", "get"): _read(
        "A document, and how it came to be as it is.", "id", "text", "history", path=("run", "identity")
    ),
}
