"""The scheduler's data: a sequence (its tokens, pictures and KV blocks), the chunk of it that a step computes, and a step's
output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Status = Literal["waiting", "running", "finished"]


class ImageMark(NamedTuple):
    """A picture in a prompt, the tokens start : end, and a digest of its pixels: equal tokens stand for other pictures.

    whole: the tokens first : end of it that are computed in one chunk, because they see each other; none in most models.
    """

    start: int
    end: int
    digest: bytes
    whole: tuple[tuple[int, int], ...] = ()


def image_key(images: Sequence[ImageMark], start: int, end: int) -> bytes:
    """What tells the block start : end apart from one with the same tokens of other pictures: the digest of each picture in it,
    and where that begins, counted from the block. Blocks have one size, so tokens are never taken for a key."""
    return b"".join(
        mark.digest + (mark.start - start).to_bytes(8, "little", signed=True)
        for mark in images
        if mark.start < end and mark.end > start
    )


def before_whole(images: Sequence[ImageMark], end: int) -> int:
    """The last place up to `end` where a chunk may end: it cuts no tokens that are computed in one."""
    for mark in images:
        for first, behind in mark.whole:
            if first < end < behind:
                return first
    return end


@dataclass(eq=False, slots=True)
class TokenSequence:
    """A prompt and the tokens made so far. Fields with `init=False` are written only by the scheduler.

    identity: the engine's name for it. tokens: the prompt, then the tokens made. limit: the most tokens in all.
    priority: lower is more urgent; among equals, the first to arrive is. salt: what else the keys depend on (the adapter),
    and which requests may share them. logits_from: the position from which on the logits of every token are wanted; None:
    those of the last known token alone. computed_from: the position from which on tokens are computed, and not found in the
    prefix cache; those whose logits are wanted are in any case. overflow: tokens that come yet when the limit is reached, after
    a context shift that keeps the first `keep`; 0: it ends there. images: pictures among the tokens, which have none of such
    shifts.
    """

    identity: int
    tokens: list[int]
    prompt_length: int
    limit: int
    priority: int = 0
    salt: str | None = None
    logits_from: int | None = None
    computed_from: int | None = None
    overflow: int = 0
    keep: int = 0
    images: tuple[ImageMark, ...] = ()
    #: draft tokens: verified at the next step as many as the step has tokens for, cleared by its commit
    draft: list[int] = field(default_factory=list)
    #: tokens whose keys are in the KV cache
    computed: int = field(default=0, init=False)
    #: per group: the number of every block of the sequence, -1 where it was released behind the window
    tables: list[list[int]] = field(default_factory=list, init=False)
    #: slot of linear attention's state; None in models without, and while waiting
    state_slot: int | None = field(default=None, init=False)
    #: tokens found in the prefix cache at the first admission
    cached: int = field(default=0, init=False)
    status: Status = field(default="waiting", init=False)

    #: (priority, arrival, birth): lower is more urgent, and no two are equal
    order: tuple[int, int, int] = field(default=(0, 0, 0), init=False)
    #: the root of its hash chain, then the hash of every full block so far
    chain: list[bytes] = field(default_factory=list, init=False)
    #: full blocks that were sealed, or found
    sealed: int = field(default=0, init=False)
    #: positions below this one have blocks; those from `computed` on are in blocks of no other sequence
    reserved: int = field(default=0, init=False)
    #: per group: blocks at the beginning that were released behind the window
    passed: list[int] = field(default_factory=list, init=False)
    admitted: bool = field(default=False, init=False)
    #: where states of linear attention are saved while the next chunk is computed: by position, the number of the snapshot
    snapshots: dict[int, int] = field(default_factory=dict, init=False)
    #: whether the last token is a placeholder: it is being computed, and the next step is scheduled already
    ahead: bool = field(default=False, init=False)
    #: the hash of the text up to the snapshot that moves on with the sequence
    following: bytes | None = field(default=None, init=False)
    #: known positions at which another sequence's text begins to differ from this one
    partings: set[int] = field(default_factory=set, init=False)
    #: context shifts so far
    shifts: int = field(default=0, init=False)

    def change_salt(self, salt: str) -> None:
        """Let the keys depend on something else. Not while the sequence runs: it has keys then."""
        assert self.status != "running", "preempt the sequence first"
        self.salt = salt
        self.chain = []

    @property
    def must_shift(self) -> bool:
        """Whether it has reached its limit, and goes on after a context shift."""
        return self.overflow > 0 and len(self.tokens) == self.limit and self.status != "finished"

    def drop_middle(self) -> None:
        """Drop tokens behind the first `keep`, so that the text can go on. What is left is treated as a prompt."""
        assert not self.images, "pictures keep their places"
        dropped = tokens_to_drop(len(self.tokens), self.limit, self.keep)
        del self.tokens[self.keep : self.keep + dropped]
        self.prompt_length = len(self.tokens)
        room = min(self.limit - len(self.tokens), self.overflow)
        self.limit, self.overflow = len(self.tokens) + room, self.overflow - room
        self.chain, self.partings = [], set()
        self.shifts += 1

    @property
    def is_decoding(self) -> bool:
        """Whether it runs and lacks the keys of its last token alone: the next step samples a token."""
        return self.status == "running" and len(self.tokens) - self.computed == 1

    @property
    def usable_drafts(self) -> int:
        """Drafts that may be verified: after them comes one more token within the limit."""
        return min(len(self.draft), self.limit - len(self.tokens) - 1)


def tokens_to_drop(length: int, capacity: int, keep: int) -> int:
    """How many tokens behind the first `keep` must go from a text of `length`, so that it has room for one more within
    `capacity`; 0 where it has.

    Whole halves of the places behind the kept ones (as llama.cpp's context shift): a conversation that grows is cut at the same
    place for many turns, whose common beginning is then found in the prefix cache.
    """
    half = max(1, (capacity - keep) // 2)
    return half * max(0, -(-(length + 1 - capacity) // half))


#: (group, from block, to block), copied before anything is computed.
Copies = list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens of a sequence that a step computes: `(tokens + draft)[start : start + count]`.

    drafts: how many of the last of them are draft tokens. num_logits: logits that are wanted, of the last tokens of the
    chunk: 1 + drafts, or 0 where more known tokens follow.
    """

    sequence: TokenSequence
    start: int
    count: int
    drafts: int
    num_logits: int


class SchedulerOutput(NamedTuple):
    """One step. copies, (group, from block, to block), and then restored, (snapshot, state slot), come before the
    computation. States are saved in each sequence's `snapshots` while it runs."""

    chunks: list[ScheduledChunk]
    copies: Copies
    preempted: list[TokenSequence]
    restored: list[tuple[int, int]]
