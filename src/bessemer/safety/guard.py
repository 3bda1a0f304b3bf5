"""The guard of a policy: rails find things in a text, the policy says what is done about them at a surface.

A *rail* looks at a text in all its readings (`normalise.py`) and returns findings; the guard keeps those that reach their
category's limit, and the severest action of the policy decides. A decision names the rule that led to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from bessemer.core.errors import ConfigError
from bessemer.core.policy import ACTIONS, RULE_KINDS, Action, Policy, SurfaceName
from bessemer.safety.config import RAILS, GuardConfig
from bessemer.safety.findings import SURFACES, Finding, Rail
from bessemer.safety.normalise import LONGEST, readings

_KEPT_DECISIONS = 512


@dataclass(frozen=True)
class Decision:
    """What is done about a text at a surface. finding: the one that led to it; None where nothing is done."""

    surface: SurfaceName
    action: Action
    finding: Finding | None = None
    #: All that reached their limits, the severest first, and with it what is done about each.
    findings: Sequence[tuple[Finding, Action]] = field(default=(), repr=False)

    @property
    def reason(self) -> str:
        """Category and rule on one line."""
        if self.finding is None:
            return "nothing was found"
        one = self.finding
        read = "" if one.reading == "plain" else f", read as {one.reading}"
        return f"{one.category} by {one.rail}: {one.rule}{read}"


class Guard:
    """Decides about texts by a policy. Safe to use from several threads."""

    def __init__(
        self, policy: Policy, config: GuardConfig | None = None, rails: Sequence[tuple[str, Rail]] | None = None
    ) -> None:
        """rails: by name, in place of those that the settings name.

        Raises ConfigError where a surface acts on a category that no rail finds, and what the rails' makers raise.
        """
        self.policy = policy
        self.config = config or GuardConfig()
        if rails is None:
            rails = [(name, RAILS.find(name).load()(policy, self.config)) for name in self.config.rails]
        self.rails = tuple(rails)
        self.takes_long = any(rail.takes_long for _, rail in self.rails)
        self._acted_on = {surface: self._actions(surface) for surface in SURFACES}
        self._check_coverage()
        self._decide = lru_cache(maxsize=_KEPT_DECISIONS)(self._decided)

    def check(self, text: str, surface: SurfaceName) -> Decision:
        """The decision about a text. Of one longer than a million characters, the middle is not read."""
        if not self._acted_on[surface] or not text:
            return Decision(surface, "allow")
        if len(text) > LONGEST:
            text = text[: LONGEST // 2] + "\n" + text[-LONGEST // 2 :]
        # long texts are seldom seen twice, and would fill the memory
        return self._decide(text, surface) if len(text) < 10_000 else self._decided(text, surface)

    def findings(self, text: str, surface: SurfaceName = "prompt") -> list[Finding]:
        """All that the rails find, whatever the policy says of it, the highest score first."""
        found_readings = readings(text)
        found = [finding for _, rail in self.rails for finding in rail.check(text, found_readings, surface)]
        return sorted(found, key=lambda finding: -finding.score)

    def redacted(self, text: str, decision: Decision) -> str:
        """The text with what is to be blacked out replaced; the whole text where a finding has no place in it."""
        marks = [finding for finding, action in decision.findings if action == "redact"]
        whole = next((finding for finding in marks if finding.start is None), None)
        if whole is not None:
            return self._mark(whole)
        places = sorted((self._place(text, finding), finding.category) for finding in marks)
        parts, end = [], 0
        for (start, stop), kind in places:
            if start >= end:
                parts += [text[end:start], self.policy.messages.redacted.replace("{kind}", kind)]
            end = max(end, stop)
        return "".join([*parts, text[end:]])

    def refusal(self, decision: Decision) -> str:
        """What is said in place of a text."""
        name = decision.finding.category if decision.finding else ""
        category = self.policy.categories.get(name)
        return (category.refusal if category else "") or self.policy.messages.refusal

    def _mark(self, finding: Finding) -> str:
        return self.policy.messages.redacted.replace("{kind}", finding.category)

    def _place(self, text: str, finding: Finding) -> tuple[int, int]:
        assert finding.start is not None and finding.end is not None, "a finding with a place"
        if finding.category != "injection":
            return finding.start, finding.end
        # what an injection goes on to say stands on its line
        start = text.rfind("\n", 0, finding.start) + 1
        end = text.find("\n", finding.end)
        return start, len(text) if end < 0 else end

    def _decided(self, text: str, surface: SurfaceName) -> Decision:
        actions = self._acted_on[surface]
        reached: list[tuple[Finding, Action]] = []
        disguised: Finding | None = None
        for finding in self.findings(text, surface):
            category = self.policy.categories.get(finding.category)
            if category is not None and finding.score < category.limit:
                continue
            if category is not None and finding.reading != "plain" and disguised is None:
                disguised = Finding("hidden_text", finding.score, finding.rail, f"hides {finding.category}", finding.reading)
            action = actions.get(finding.category, "allow")
            if action != "allow":
                reached.append((finding, action))
        if disguised is not None and (action := actions.get("hidden_text", "allow")) != "allow":
            reached.append((disguised, action))
        if not reached:
            return Decision(surface, "allow")
        reached.sort(key=lambda one: -ACTIONS.index(one[1]))
        finding, action = reached[0]
        return Decision(surface, action, finding, reached)

    def _actions(self, surface: SurfaceName) -> dict[str, Action]:
        """What a surface does about each category and kind of rules that it does anything about."""
        names = [*self.policy.categories, *RULE_KINDS]
        return {name: action for name in names if (action := self.policy.action(surface, name)) != "allow"}

    def _check_coverage(self) -> None:
        found = {name for _, rail in self.rails for name in rail.categories}
        for surface, actions in self._acted_on.items():
            for name in actions:
                if name not in found:
                    raise ConfigError(
                        f"the policy {self.policy.name!r}: surface {surface} acts on {name!r}, which no rail finds; "
                        "give the category terms or patterns, or name a rail that finds it"
                    )
