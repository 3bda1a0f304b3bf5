"""Stop strings: the text of a completion as it grows, cut at the first of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from weakref import WeakValueDictionary


class StopStrings:
    """Passes text on, holding back only what could still become a stop string.

    The text ends before the stop string that is complete first, or behind it with `include`, however it is cut into chunks.
    What is fed with `search=False` completes none: of a stop string, the end has to come later. A character costs the same
    however many stop strings there are, and however long.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._automaton = _automaton_of(tuple(stops)) if stops else None
        self._include = include
        self._held = ""
        self._state = 0
        self.found = False
        #: The stop string that ended the text.
        self.matched = ""

    def feed(self, text: str, *, search: bool = True) -> str:
        """The text that may be shown now. Once `found`, nothing more is. search: whether a stop string may end in this text."""
        if self.found or self._automaton is None:
            return "" if self.found else text
        held, automaton, state = self._held + text, self._automaton, self._state
        for end, character in enumerate(text, len(self._held) + 1):
            state = automaton.next_state(state, character)
            if search and (length := automaton.ended[state]):
                self.found, self._held = True, ""
                self.matched = held[end - length : end]
                return held[: end if self._include else end - length]
            state = automaton.open_state[state]
        self._state = state
        shown = len(held) - automaton.depth[state]
        self._held = held[shown:]
        return held[:shown]

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


class _Automaton:
    """The automaton of Aho and Corasick (1975): its state is the longest end of a text that begins a stop string.

    ended: by state, the length of the longest stop string that is complete, 0 for none. open_state: by state, that of the
    longest end that is no whole stop string, or begins another. depth: by state, the length of that end.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._edges: dict[tuple[int, str], int] = {}
        self.depth, self.ended = [0], [0]
        has_longer = [False]
        for stop in stops:
            state = 0
            for character in stop:
                has_longer[state] = True
                if (following := self._edges.get((state, character))) is None:
                    following = self._edges[state, character] = len(self.depth)
                    self.depth.append(self.depth[state] + 1)
                    self.ended.append(0)
                    has_longer.append(False)
                state = following
            self.ended[state] = len(stop)
        children: dict[int, list[tuple[str, int]]] = {}
        for (state, character), following in self._edges.items():
            children.setdefault(state, []).append((character, following))
        #: The state of the longest shorter end.
        self._shorter = [0] * len(self.depth)
        self.open_state = list(range(len(self.depth)))
        # by depth: what a state takes from a shorter one is there
        queue = deque([0])
        while queue:
            state = queue.popleft()
            for character, following in children.get(state, ()):
                self._shorter[following] = self.next_state(self._shorter[state], character) if state else 0
                queue.append(following)
            if state:
                self.ended[state] = self.ended[state] or self.ended[self._shorter[state]]
                if not has_longer[state]:
                    self.open_state[state] = self.open_state[self._shorter[state]]

    def next_state(self, state: int, character: str) -> int:
        """The state behind one more character."""
        while (following := self._edges.get((state, character))) is None and state:
            state = self._shorter[state]
        return following or 0


#: Of the answers under way: those to one prompt share one.
_automata: WeakValueDictionary[tuple[str, ...], _Automaton] = WeakValueDictionary()


def _automaton_of(stops: tuple[str, ...]) -> _Automaton:
    found = _automata.get(stops)
    if found is None:
        found = _automata[stops] = _Automaton(stops)
    return found


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
