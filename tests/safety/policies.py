"""A policy about furnaces, whose categories are found by words."""

from bessemer.core.policy import Policy

CATEGORIES = {
    "slag": {"code": "S1", "meaning": "talk of slag", "terms": ["slag", "molten slag*"], "refusal": "Nothing about slag."},
    "soot": {"code": "S2", "meaning": "talk of soot", "patterns": ["(?i)soo+t"]},
}
PRINCIPLES = {"care": {"critique": "What?", "revision": "Better.", "comparison": "Which is better?"}}


def policy(**changes) -> Policy:
    """The policy with other surfaces, messages or taint."""
    return Policy.parse({"format": 1, "name": "furnace", "categories": CATEGORIES, "principles": PRINCIPLES} | changes)
