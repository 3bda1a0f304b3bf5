"""Politeness towards sites: robots.txt (RFC 9309), crawl delays, and objections to training."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

from protego import Protego

from bessemer.data.sources.document import TRAINING_ROBOTS
from bessemer.data.sources.http.fetch import Clock, FetchError, Limits, fetch

_LARGEST_RULES = 500 << 10
_LONGEST_DELAY = 60.0


@dataclass(frozen=True)
class _Rules:
    robots: Protego
    training: Protego | None
    delay: float


class Politeness:
    """The rules and the pace of every host that is visited; safe to use from several threads."""

    def __init__(self, limits: Limits, delay_seconds: float, clock: Clock | None = None) -> None:
        self._limits = limits
        self._delay = delay_seconds
        self._clock = clock or Clock()
        self._rules: dict[str, _Rules] = {}
        self._next_visit: dict[str, float] = {}
        self._lock = threading.Lock()
        self._agent = limits.user_agent.split("/")[0].split(" ")[0]

    def may_visit(self, url: str) -> None:
        """Wait until the host may be asked again. Raises FetchError when its robots.txt forbids the address."""
        rules = self._rules_of(url)
        if not rules.robots.can_fetch(url, self._agent):
            raise FetchError("forbidden_by_robots", "its robots.txt forbids it")
        self._wait(_origin(url), max(self._delay, rules.delay))

    def opt_out(self, url: str) -> str | None:
        """What the host says against training on a page, in its robots.txt or ai.txt."""
        rules = self._rules_of(url)
        signs = []
        if not all(rules.robots.can_fetch(url, robot) for robot in TRAINING_ROBOTS):
            signs.append("robots.txt closed to training")
        if rules.training is not None and not rules.training.can_fetch(url, self._agent):
            signs.append("ai.txt")
        return ", ".join(signs) or None

    def sitemaps(self, url: str) -> list[str]:
        """The sitemaps that a host's robots.txt names."""
        return list(self._rules_of(url).robots.sitemaps)

    def _wait(self, origin: str, delay: float) -> None:
        with self._lock:
            now = self._clock.now()
            turn = max(now, self._next_visit.get(origin, now))
            self._next_visit[origin] = turn + delay
        if turn > now:
            self._clock.sleep(turn - now)

    def _rules_of(self, url: str) -> _Rules:
        origin = _origin(url)
        with self._lock:
            known = self._rules.get(origin)
        if known is None:
            robots = self._robots(origin)
            delay = min(float(robots.crawl_delay(self._agent) or 0.0), _LONGEST_DELAY)
            known = _Rules(robots, self._training_rules(origin), delay)
            with self._lock:
                known = self._rules.setdefault(origin, known)
        return known

    def _robots(self, origin: str) -> Protego:
        """The rules; all is allowed where there are none, nothing where the server fails (RFC 9309, 2.3.1)."""
        try:
            return Protego.parse(self._file(f"{origin}/robots.txt"))
        except FetchError as error:
            if error.kind in ("private_addresses", "bad_addresses"):
                raise
            missing = error.kind.startswith("status_4") and error.kind != "status_429"
            return Protego.parse("" if missing or error.kind == "too_large" else "User-agent: *\nDisallow: /")

    def _training_rules(self, origin: str) -> Protego | None:
        try:
            text = self._file(f"{origin}/ai.txt")
        except FetchError:
            return None
        return Protego.parse(text) if "user-agent" in text.lower() and "<html" not in text[:2000].lower() else None

    def _file(self, url: str) -> str:
        self._wait(_origin(url), self._delay)
        answer = fetch(url, self._limits, clock=self._clock)
        return answer.body[:_LARGEST_RULES].decode("utf-8", errors="replace")


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
