"""Routes of the page of safety: the server's policy, what its guard decided and by which line, a text put to it, and red teams'
findings."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from bessemer.core.errors import ArtefactError
from bessemer.core.policy import RULE_KINDS, Policy, PolicyLines, SurfaceName
from bessemer.core.store import check_format, read_json
from bessemer.safety.findings import SURFACES
from bessemer.safety.hook import GuardHook
from bessemer.safety.redteam.campaign import FORMAT
from bessemer.safety.redteam.report import redteam_parts
from bessemer.safety.redteam.results import RESULTS_FILE
from bessemer.serving.runtime.bodies import ApiError, Body, read_body, without_places
from bessemer.serving.runtime.served import Served
from bessemer.webapp.access import check_owner, missing, off_the_loop, shown_runs, without_styles

#: Most findings of a text that are sent.
_MOST_FINDINGS = 20


class GuardCheck(Body):
    """A text at a surface."""

    text: str = Field(min_length=1)
    surface: SurfaceName = "prompt"


class SafetyApi:
    """The routes. lines: of the policy's file, where the server has one; redteams: the folder of red teams' runs; None where
    none are shown."""

    def __init__(self, served: Served, lines: PolicyLines | None, redteams: Path | None) -> None:
        self._hook = next((hook for hook in served.hooks if isinstance(hook, GuardHook)), None)
        self._lines = lines
        self._redteams = redteams

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/inspect")
        router.add_api_route("/safety", self.state, methods=["GET"], response_model=None)
        router.add_api_route("/safety/check", self.check, methods=["POST"], response_model=None)
        router.add_api_route("/redteams", self.all_redteams, methods=["GET"], response_model=None)
        router.add_api_route("/redteams/{name}", self.redteam, methods=["GET"], response_model=None)
        return router

    async def state(self, request: Request) -> dict[str, Any]:
        """The policy, and the latest decisions."""
        check_owner(request)
        if self._hook is None:
            return {"policy": None, "rails": [], "decisions": [], "texts": False}
        decisions = [self._placed(entry["surface"], entry["category"], entry) for entry in self._hook.audit.latest()]
        return {
            "policy": self._shown(self._hook.policy),
            "rails": [name for name, _ in self._hook.guard.rails],
            "decisions": decisions,
            "texts": self._hook.audit.with_content,
        }

    async def check(self, request: Request) -> dict[str, Any]:
        """What the guard would do about a text; nothing is noted down."""
        check_owner(request)
        body = await read_body(GuardCheck, request)
        if self._hook is None:
            raise ApiError("this server has no guard; start it with --policy FILE", status=403, code="not_allowed")
        if body.surface not in SURFACES:
            raise ApiError(f"surface: {body.surface} is checked by no guard; one of {', '.join(SURFACES)}", parameter="surface")
        guard = self._hook.guard

        def work() -> dict[str, Any]:
            decision, findings = guard.check(body.text, body.surface), guard.findings(body.text, body.surface)
            return {
                "decision": self._placed(
                    body.surface,
                    decision.finding.category if decision.finding else "",
                    {"action": decision.action, "reason": decision.reason},
                ),
                "findings": [
                    {
                        "category": one.category,
                        "score": round(one.score, 4),
                        "rail": one.rail,
                        "rule": one.rule,
                        "reading": one.reading,
                        "action": guard.policy.action(body.surface, one.category),
                    }
                    for one in findings[:_MOST_FINDINGS]
                ],
            }

        return await off_the_loop(work)

    async def all_redteams(self, request: Request) -> dict[str, Any]:
        folder = shown_runs(request, self._redteams)

        def read() -> dict[str, Any]:
            found = []
            for path in sorted(folder.glob(f"*/{RESULTS_FILE}")):
                about: dict[str, Any] = {"name": path.parent.name}
                try:
                    results = _results(path)
                    about |= {key: results[key] for key in ("planned", "finished", "measurable")}
                except (ArtefactError, KeyError) as error:
                    about["problem"] = without_places(f"cannot be read: {error}")
                found.append(about)
            return {"runs": found}

        return await off_the_loop(read)

    async def redteam(self, request: Request, name: str) -> dict[str, Any]:
        folder = shown_runs(request, self._redteams)

        def read() -> dict[str, Any]:
            # needs matplotlib, which a server may lack
            from bessemer.views.report import draw_parts

            known = {path.parent.name: path for path in folder.glob(f"*/{RESULTS_FILE}")}
            if name not in known:
                raise missing(f"there is no red team's run {name!r}")
            parts = redteam_parts(_results(known[name]))
            return {"html": without_styles(str(draw_parts(parts, (f"redteam-{number}" for number in count(1)))))}

        return await off_the_loop(read)

    def _placed(self, surface: SurfaceName, category: str, entry: dict[str, Any]) -> dict[str, Any]:
        """An entry with the policy's line that led to it."""
        place, line = ("", "") if self._lines is None or not category else self._lines.of(surface, category)
        return {**entry, "place": place, "line": line}

    @staticmethod
    def _shown(policy: Policy) -> dict[str, Any]:
        """Categories and kinds of rules, with what each surface does about them."""
        rows = [(name, one.code, one.meaning) for name, one in policy.categories.items()]
        rows += [(name, "", meaning) for name, meaning in RULE_KINDS.items()]
        return {
            "name": policy.name,
            "hash": policy.hash,
            "surfaces": list(SURFACES),
            "categories": [
                {
                    "name": name,
                    "code": code,
                    "meaning": meaning,
                    "actions": [policy.action(surface, name) for surface in SURFACES],
                }
                for name, code, meaning in rows
            ],
        }


def _results(path: Path) -> dict[str, Any]:
    """A red team's results. Raises ArtefactError for a damaged file, and one of another format."""
    results = read_json(path, "file of a red team's results")
    check_format(results.get("format"), FORMAT, path, "file of a red team's results")
    return results
