"""A trained tokenizer: encoding and decoding, with the ids of `transformers` on the same folder."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path

import numpy as np
import tokenizers

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.core.hashing import hash_file
from bessemer.tokenization.chat import (
    ChatEncoder,
    ChatTemplate,
    Message,
    Segment,
    Tool,
    check_encodable,
    encode_without_blocking,
)
from bessemer.tokenization.chat_turns import ChatTurns
from bessemer.tokenization.fast import LONG_TEXT, BulkEncoder, TokenizersEncoder, agree, bulk_encoder, slices
from bessemer.tokenization.folder import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    begin_and_ends,
    mark_special,
    read_chat_template,
    read_configuration,
    template_hash,
    token_text,
)
from bessemer.tokenization.trained_template import read_trained_template
from bessemer.tokenization.vocabulary import (
    SPACE_MARK,
    Kind,
    byte_tokenizer,
    read_vocabulary,
    spans_of_pieces,
    spread_runs,
    without_holes,
)

#: Upper bound for the tokens at a slice's ends that differ from those of the whole text.
_AT_ENDS = 64
#: Texts that a lossy tokenizer does not restore: white space, normal forms, letters of any script, control characters.
_ROUND_TRIP = (
    " a",
    "a  b\n\t c ",
    "A\u0301 e\u0301 \ufb01 \u212b",
    "\u65e5\x00\x7f\U0001f44d\U00010330\u200b",
    "don 't . , ##a",
)


class Tokenizer:
    """A tokenizer read from a Hugging Face folder. Made by `load_tokenizer`.

    Control tokens typed in a text are encoded as text, never as the control token: ids equal those of `AutoTokenizer`
    on the same folder with `split_special_tokens=True`. Only the chat template writes control tokens.
    """

    def __init__(
        self, folder: Path, tokenizer: tokenizers.Tokenizer, bos_id: int, eos_ids: Sequence[int], chat_template: str | None
    ) -> None:
        self.folder = folder
        #: The chat template in jinja, None where the folder has none.
        self.chat_template = chat_template
        self.bos_id = bos_id
        #: Tokens at which a text or a turn ends.
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
        added = {id: _added_text(token) for id, token in tokenizer.get_added_tokens_decoder().items()}
        self._special = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._control_ids = {content: id for id, content in self._special.items()}
        decoder = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
        self._vocabulary = read_vocabulary(tokenizer.get_vocab(), added, decoder, type(tokenizer.model).__name__)
        gaps = frozenset(self._vocabulary.gaps)
        # ids that decoding leaves out, by `skip_special`
        self._hidden = {True: gaps | self._special.keys(), False: gaps}
        self._before, self._after = _surroundings(tokenizer)
        # it would also trim the spans of byte-level tokens
        tokenizer.post_processor = None
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return len(self._vocabulary.later)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The ids that the tokenizer's file puts before a text: often a begin token, or none."""
        return tuple(self._before)

    @property
    def kind(self) -> Kind:
        """How the vocabulary represents bytes."""
        return self._vocabulary.kind

    @cached_property
    def lossless(self) -> bool:
        """Whether decoding restores any text, checked on a few hard ones. U+2581 may become a space."""
        return all(self.decode(self.encode(text, add_bos=False)) == text for text in _ROUND_TRIP)

    @cached_property
    def hash(self) -> str:
        """Hash of `tokenizer.json`: what token shards and models are checked against."""
        return hash_file(self.folder / TOKENIZER_FILE)

    @cached_property
    def template_hash(self) -> str | None:
        """Hash of the chat template: what models and adapters are checked against. None where there is none."""
        return None if self.chat_template is None else template_hash(self.chat_template)

    @cached_property
    def tool_format(self) -> str:
        """The name of the format in which the model was trained to call tools, where its folder says so; else empty."""
        record = read_trained_template(self.folder)
        return "" if record is None else record.tool_format

    @cached_property
    def bulk(self) -> BulkEncoder:
        """The encoder for many texts, chosen by a check at its first use."""
        return bulk_encoder(self.folder / TOKENIZER_FILE)

    def check_bulk(self, sample: Sequence[str]) -> None:
        """Drop the fast encoder when its ids differ from those of `tokenizers` on this sample of texts."""
        reference = TokenizersEncoder(self.folder / TOKENIZER_FILE)
        if self.bulk.name != reference.name and not agree(self.bulk, reference, sample):
            self.bulk = reference

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Ids of a text. add_bos: with the tokens that the tokenizer's file puts around a text (a begin token, `[CLS]` and
        `[SEP]`, or none). Raises RequestError for a lone surrogate, which has no UTF-8."""
        check_encodable(text)
        if len(text) > LONG_TEXT:
            # in parts: little memory, and time that grows no faster than the text
            ids: list[int] = self.bulk.encode_flat([text])[0].tolist()
        else:
            ids = encode_without_blocking(self._tokenizer, text).ids
        return [*self._before, *ids, *self._after] if add_bos else ids

    def has_more_tokens(self, text: str, limit: int) -> bool:
        """Whether a text is known to have more than `limit` tokens, with little work for a text of any length.

        It is if even the longest token would occur more often. Otherwise slices are encoded until the limit is exceeded. False
        for a text that may have fewer tokens, or that is short enough to be encoded.
        """
        if self.lossless and len(text.replace(SPACE_MARK, " ").encode(errors="replace")) > limit * self._longest:
            return True
        parts = slices(text)
        if len(parts) == 1:
            return False
        count = 0
        for start, end in parts:
            # tokens at a slice's ends may differ from those of the whole text
            count += max(len(self.bulk.encode_flat([text[start:end]])[0]) - _AT_ENDS, 0)
            if count > limit:
                return True
        return False

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self._vocabulary.later))

    def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Ids of a text without a begin token, and where each stands: int64 (tokens, 2), the characters [start, end).

        A token that holds part of a character spans the whole character, so neighbours may share one. Otherwise the spans touch
        and cover the text, except for white space between tokens that are words. A space that encoding puts before the text
        has the span (0, 0). Raises RequestError when the text has a lone surrogate.
        """
        check_encodable(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if self.kind in ("wordpiece", "words"):
            return ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)
        spans = spans_of_pieces(text, [self._vocabulary.later[id] for id in ids])
        if spans is None:
            # a normalizer or an added token changed the text
            given = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            spans = without_holes(spread_runs(text, encoding.tokens, given, self._byte_spans), len(text))
            if len(ids) > 1 and given[1, 0] == 0 and self._vocabulary.first.get(ids[0]) == b"":
                spans[0] = 0
        return ids, spans

    @cached_property
    def _byte_spans(self) -> tokenizers.Tokenizer:
        return byte_tokenizer(self._tokenizer.normalizer)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts without begin tokens, in one uint32 array, and int64 offsets (one more than texts).

        Raises RequestError for a lone surrogate, and for a single text, whose letters would be taken for texts.
        """
        if isinstance(texts, str):
            raise RequestError("a list of texts is needed, got str; encode takes one text")
        try:
            return self.bulk.encode_flat(texts)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                check_encodable(text)
            raise

    def encode_batch(self, texts: Sequence[str], add_bos: bool = True) -> list[np.ndarray]:
        """Ids of many texts, a uint32 array each, as `encode` gives them. Raises RequestError for a lone surrogate."""
        ids, offsets = self.encode_flat(texts)
        before = np.array(self._before if add_bos else [], np.uint32)
        after = np.array(self._after if add_bos else [], np.uint32)
        return [np.concatenate([before, ids[start:end], after]) for start, end in pairwise(offsets)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. Control tokens are left out, or shown as they are written."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True, beginning: bool = True) -> bytes:
        """The bytes that ids stand for. At the beginning of a text, the space before its first word is left out where the
        vocabulary writes one. Raises RequestError for an id outside the vocabulary."""
        return self._vocabulary.text_bytes(self.shown(ids, skip_special), beginning)

    def shown(self, ids: Iterable[int], skip_special: bool = True) -> list[int]:
        """The ids that decoding shows. Raises RequestError for an id outside the vocabulary."""
        hidden = self._hidden[skip_special]
        shown = [id for id in ids if id not in hidden]
        if shown:
            self._check_id(min(shown))
            self._check_id(max(shown))
        return shown

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token inside a text. Raises RequestError for an id outside the vocabulary."""
        self._check_id(id)
        return self._vocabulary.later[id]

    def _check_id(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            raise RequestError(f"token id {id} is outside the vocabulary of {self.vocab_size:,} tokens")

    def is_special(self, id: int) -> bool:
        """Whether an id is a control token."""
        return id in self._special

    def is_end(self, id: int) -> bool:
        """Whether a turn may end at an id: a control token, or what the tokenizer's files call an end."""
        return id in self._special or id in self.eos_ids

    def control_id(self, token: str) -> int | None:
        """The id of a control token by how it is written; None when there is no such control token."""
        return self._control_ids.get(token)

    @cached_property
    def _chat(self) -> ChatTemplate:
        if self.chat_template is None:
            raise RequestError(f"{self.folder}: it has no chat template; bessemer finetune makes a model that chats")
        config = read_configuration(self.folder)
        named = {name: token_text(value) for name, value in config.items() if name.endswith("_token")}
        variables = {name: content for name, content in named.items() if isinstance(content, str)}
        return ChatTemplate(self.chat_template, tuple(self._control_ids), variables, str(self.folder))

    @cached_property
    def _chat_encoder(self) -> ChatEncoder:
        try:
            return ChatEncoder(self._tokenizer, self._control_ids)
        except ValueError as error:
            raise ArtefactError(f"{self.folder}: this tokenizer cannot encode conversations: {error}") from None

    def render_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Tool] | None = None
    ) -> list[Segment]:
        """A conversation in segments, of which only the template's control tokens are control tokens.

        Raises RequestError for a malformed message or tool, and for what the template refuses.
        """
        return self._chat.segments(messages, add_generation_prompt, tools)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Tool] | None = None
    ) -> list[int]:
        """Ids of a conversation; with `add_generation_prompt`, up to where the assistant speaks next. Raises RequestError
        as `render_chat`."""
        return self._chat_encoder.encode(self._chat.segments(messages, add_generation_prompt, tools))[0]

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Tool] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and which of them the assistant says: its contents, its calls of tools, and the control
        token that ends its turn.

        A token that holds the end of the template's text and the beginning of the content (two line breaks in one)
        counts as the template's. Raises RequestError as `render_chat`, and for a template that does not tell who speaks.
        """
        ids, says = self._chat_encoder.encode(self._chat.training_segments(messages, add_generation_prompt, tools))
        # some templates mark the content only, and write the end token after the mark
        for place, id in enumerate(ids):
            if place and id in self.eos_ids and says[place - 1] and not self.is_end(ids[place - 1]):
                says[place] = True
        return ids, says

    def chat_turns(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> ChatTurns:
        """The turns of a conversation, to be rendered one by one. Raises RequestError for malformed messages or tools."""
        return ChatTurns(self._chat, messages, tools)

    def encode_together(self, parts: Sequence[Sequence[Segment]]) -> list[list[int]] | None:
        """The ids of each of some parts of a conversation, encoded as one text, as `apply_chat_template` does. None where a
        token would hold text of two parts."""
        return self._chat_encoder.encode_parts(parts)

    def encode_apart(self, parts: Sequence[Sequence[Segment]]) -> list[list[int]]:
        """The ids of a context, as `apply_chat_template` gives them, and of the parts behind it, each as it is written behind
        tokens that stand already."""
        first, *others = parts
        # behind a control token, since some tokenizers put a space before a text
        behind = [self._chat_encoder.encode([self._any_end, *part])[0] for part in others]
        return [self._chat_encoder.encode(first)[0], *(ids[1:] for ids in behind)]

    @cached_property
    def _any_end(self) -> Segment:
        text = next(text for text, id in self._control_ids.items() if id == self.eos_ids[0])
        return Segment(text, is_control=True, is_assistant=False)

    @property
    def end_tokens(self) -> frozenset[str]:
        """The control tokens at which generation stops."""
        return frozenset(token for token, id in self._control_ids.items() if id in self.eos_ids)

    @property
    def marks_generation(self) -> bool:
        """Whether the chat template marks what the assistant says by `{% generation %}`."""
        return self._chat.marks_generation

    def continue_chat(
        self, messages: Sequence[Message], answered: int, tools: Sequence[Tool] | None = None
    ) -> tuple[int, list[int]]:
        """The end token of the assistant's message number `answered`, and the ids after it up to where the assistant speaks
        next. For a conversation whose sampled tokens are kept as they are and never encoded again.

        Raises RequestError as `render_chat`, and for a template that ends the assistant's turn without an end token.
        """
        segments = self._chat.following(messages, answered, self.end_tokens, tools)
        end, *ids = self._chat_encoder.encode(segments)[0]
        assert end == self._control_ids[segments[0].text], "a control token is one id"
        return end, ids


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read a tokenizer from its folder, a model's folder or a GGUF file.

    A folder holds `tokenizer.json` and may hold `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and
    `generation_config.json`. Raises ArtefactError when the tokenizer is missing, damaged, of a kind that is not read, or
    without an end token.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        from bessemer.tokenization.formats.gguf_import import unpacked

        scratch = unpacked(folder)
        opened = load_tokenizer(scratch.name)
        # it reads some files only when they are needed
        weakref.finalize(opened, scratch.cleanup)
        return opened
    path = folder / TOKENIZER_FILE
    if not path.exists():
        raise ArtefactError(f"{path}: no such file; a tokenizer's folder holds it beside {TOKENIZER_CONFIG_FILE}")
    config = read_configuration(folder)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # the library raises the bare class
        raise ArtefactError(f"{path}: this tokenizer is damaged or of an unknown kind ({error})") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    mark_special(tokenizer, config)
    bos_id, eos_ids = begin_and_ends(folder, tokenizer, config)
    try:
        return Tokenizer(folder, tokenizer, bos_id, eos_ids, read_chat_template(folder))
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}") from None


def _added_text(token: tokenizers.AddedToken) -> str:
    """The text that an added token stands for. One that is matched in normalised text has U+2581 for spaces, as SentencePiece's
    user-defined runs of spaces have."""
    content: str = token.content
    return content.replace(SPACE_MARK, " ") if token.normalized and not token.special else content


def _surroundings(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the file's post-processor adds before and after a text."""
    around = tokenizer.encode("a", add_special_tokens=True)
    before = list(takewhile(lambda entry: entry[1], zip(around.ids, around.special_tokens_mask, strict=True)))
    after = zip(around.ids[len(before) :], around.special_tokens_mask[len(before) :], strict=True)
    return [id for id, _ in before], [id for id, is_special in after if is_special]
