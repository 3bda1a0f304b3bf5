import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ConfigError
from bessemer.tokenization.control_tokens import FILL_IN_THE_MIDDLE_SPELLINGS
from bessemer.tokenization.existing import add_tokens
from bessemer.tokenization.prompts import FimTokens, fim_tokens, infill_prompt
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.data.batches import TokenBatches
from bessemer.training.data.packing import DocumentBatches
from bessemer.training.data.token_stream import DocumentSources, FillInTheMiddle
from tests.model.tokenizers import write_small_tokenizer
from tests.training.shards import BEGIN, random_documents, write_shards

PREFIX, SUFFIX, MIDDLE = 96, 97, 98
TOKENS = FimTokens(PREFIX, SUFFIX, MIDDLE)
LENGTH = 256


def rearranging(**changes):
    return FillInTheMiddle(**{"tokens": TOKENS, "begin_id": BEGIN, "rate": 0.5, "spm_rate": 0.5, "seed": 1} | changes)


def restored(tokens):
    """(a document in its own order, how it was shown), without its begin and end."""
    tokens = [token for token in tokens if token != BEGIN]
    if PREFIX not in tokens:
        return tokens, "plain"
    suffix, middle = tokens.index(SUFFIX), tokens.index(MIDDLE)
    assert tokens[0] == PREFIX and suffix < middle
    if suffix == 1:
        # SPM: nothing says where the prefix ends and the middle begins, and together they stand in order
        return tokens[middle + 1 :] + tokens[2:middle], "spm"
    return tokens[1:suffix] + tokens[middle + 1 :] + tokens[suffix + 1 : middle], "psm"


@settings(deadline=None)
@given(st.lists(st.integers(0, 90), max_size=40), st.integers(0, 2**40), st.integers(0, 5), st.booleans())
def test_a_rearranged_document_is_the_document_in_another_order(body, start, epoch, ended):
    tokens = np.array([BEGIN, *body, BEGIN if ended else 50], np.uint16)
    shown = rearranging(rate=1.0).document(tokens, start, epoch, source=0)
    assert shown[0] == BEGIN and (shown[-1] == BEGIN) == ended
    if len(body) < 3:
        assert shown.tolist() == tokens.tolist()
        return
    found, order = restored(shown.tolist())
    assert order in ("psm", "spm") and found == body


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 90), max_size=30), min_size=1, max_size=6), st.integers(0, 2**40), st.booleans())
def test_a_window_holds_its_documents_from_the_first_on_and_nothing_else(documents, start, cut):
    stream = [token for document in documents for token in [BEGIN, *document]][int(cut) :]
    if not stream:
        return
    window, places, lengths = rearranging(rate=0.7).window(np.array(stream, np.uint16), start, 0, None)
    assert len(window) == len(stream) == lengths.sum()
    ends = np.cumsum(lengths)
    originals = []
    for end, length in zip(ends, lengths, strict=True):
        piece = window[end - length : end].tolist()
        originals += [BEGIN] * (piece[0] == BEGIN) + restored(piece)[0]
    assert originals == stream[: len(originals)]
    assert len(stream) - len(originals) == 3 * int((window == MIDDLE).sum())
    assert [stream[: int(place) - start].count(BEGIN) for place in places] == [
        window[: end - length].tolist().count(BEGIN) for end, length in zip(ends, lengths, strict=True)
    ]


@pytest.fixture(scope="module")
def with_fim_tokens(tmp_path_factory):
    """A tokenizer of bytes and a few merges, with the control tokens."""
    folder = tmp_path_factory.mktemp("fim")
    write_small_tokenizer(folder / "plain")
    add_tokens(folder / "plain", folder / "fim", special_tokens=list(FILL_IN_THE_MIDDLE_SPELLINGS[0]))
    return load_tokenizer(folder / "fim")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    documents = random_documents(np.random.default_rng(5).integers(3, 30, 800))
    sources = ["code" if number % 2 else "web" for number in range(800)]
    return write_shards(tmp_path_factory.mktemp("middle") / "shards", documents, sources, shard_tokens=5000)


def pieces(batches, epoch=0):
    """Tokens, and the last target, of every piece in the rows of an epoch, with their sources."""
    found = []
    for step in range(epoch * batches.rows, (epoch + 1) * batches.rows):
        batch = batches.batch(step)
        tokens, targets, documents, sources = (
            column[0] for column in (batch.tokens_BT, batch.targets_BT, batch.document_ids_BT, batch.sources_BT)
        )
        for number in range(1, int(documents.max()) + 1):
            inside = documents == number
            assert (targets[inside] != IGNORE_INDEX).all()
            source = batch.source_names[int(sources[inside][0])]
            found.append(([*tokens[inside].tolist(), int(targets[inside][-1])], source))
    return found


def packed(shards, **changes):
    middle = rearranging(**changes)
    return DocumentBatches(shards, batch_size=1, context_length=LENGTH, seed=1, fill_in_the_middle=middle)


def test_packed_rows_hold_every_document_and_end_it(shards):
    found = pieces(packed(shards))
    stream = shards.read(0, shards.tokens - 1).tolist()
    expected = [[]]
    for token in stream[1:]:
        expected[-1].append(token) if token != BEGIN else expected.append([])
    assert sorted(restored(tokens)[0] for tokens, _ in found) == sorted(expected)
    assert all(tokens[0] == tokens[-1] == BEGIN for tokens, _ in found)


def test_shares_are_those_asked_for_and_cuts_lie_anywhere():
    middle = rearranging(rate=0.4, spm_rate=0.25)
    document = np.array([BEGIN, *[7] * 50, BEGIN])
    shown = [middle.document(document, start, epoch=0, source=0).tolist() for start in range(0, 80_000, 20)]
    rearranged = [tokens for tokens in shown if PREFIX in tokens]
    assert len(rearranged) / len(shown) == pytest.approx(0.4, abs=0.03)  # four standard deviations
    psm = [tokens for tokens in rearranged if tokens.index(SUFFIX) > 2]
    empty_prefix = 1 - (50 / 51) ** 2  # looks like SPM
    assert len(psm) / len(rearranged) == pytest.approx(0.75 * (1 - empty_prefix), abs=0.045)
    lengths = np.array([[tokens.index(SUFFIX) - 2, 51 - tokens.index(MIDDLE) + 2] for tokens in psm])
    assert lengths.mean(axis=0) == pytest.approx([50 / 3, 50 / 3], abs=2)  # of the prefix and of the middle


def test_only_the_named_sources_are_rearranged(shards):
    middle = rearranging(rate=1.0, sources=[shards.sources.index("code")])
    batches = DocumentBatches(shards, batch_size=1, context_length=LENGTH, seed=1, fill_in_the_middle=middle)
    for tokens, source in pieces(batches):
        assert (restored(tokens)[1] == "plain") == (source == "web")
    document_sources = DocumentSources(shards)
    windows = TokenBatches(
        shards, batch_size=8, context_length=LENGTH, seed=1, sources=document_sources, fill_in_the_middle=middle
    )
    batch = windows.batch(0)
    marked = (batch.tokens_BT == MIDDLE) | (batch.tokens_BT == PREFIX)
    assert marked.any()
    assert {batch.source_names[number] for number in batch.sources_BT[marked]} == {"code"}


def test_every_epoch_cuts_anew_and_a_repeat_alike(shards):
    first, again, second = (sorted(pieces(packed(shards), epoch)) for epoch in (0, 0, 1))
    assert first == again != second
    assert sorted(restored(tokens)[0] for tokens, _ in first) == sorted(restored(tokens)[0] for tokens, _ in second)
    assert sorted(pieces(packed(shards, seed=2))) != first


def test_windows_of_the_stream_are_rearranged_too(shards):
    batches = TokenBatches(shards, batch_size=4, context_length=LENGTH, seed=1, fill_in_the_middle=rearranging())
    plain = TokenBatches(shards, batch_size=4, context_length=LENGTH, seed=1)
    batch = batches.batch(0)
    assert (batch.tokens_BT == MIDDLE).any()
    assert batch.tokens_BT.shape == (4, LENGTH) and (batch.tokens_BT[:, 1:] == batch.targets_BT[:, :-1]).all()
    assert batches.fingerprint != plain.fingerprint


def test_a_tokenizer_without_the_tokens_is_refused_and_one_with_them_is_not(tokenized, tmp_path):
    with pytest.raises(ConfigError, match=r"needs the control tokens <\|fim_prefix\|>.*tokenize\.fim_tokens"):
        fim_tokens(load_tokenizer(tokenized / "tokenizer"))
    names = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    extension = add_tokens(tokenized / "tokenizer", tmp_path, special_tokens=names)
    ids = {token: id for id, token in extension.added.items()}
    assert fim_tokens(load_tokenizer(tmp_path)) == FimTokens(ids[names[0]], ids[names[2]], ids[names[1]])


@settings(deadline=None)
@given(body=st.lists(st.integers(0, 90), min_size=3, max_size=40), start=st.integers(0, 2**40))
def test_a_prompt_is_a_rearranged_document_up_to_its_middle(with_fim_tokens, body, start):
    tokenizer = with_fim_tokens
    control = fim_tokens(tokenizer)
    # letters that no two of which make a token
    ids = [tokenizer.encode("qxzjQXZJ"[token % 8], add_bos=False)[0] for token in body]
    begin = tokenizer.bos_id
    rearranged = FillInTheMiddle(tokens=control, begin_id=begin, rate=1.0, spm_rate=0.0, seed=1)
    shown = rearranged.document(np.array([begin, *ids, begin]), start, 0, source=0).tolist()
    suffix, middle = shown.index(control.suffix), shown.index(control.middle)
    before, after = tokenizer.decode(shown[2:suffix]), tokenizer.decode(shown[suffix + 1 : middle])
    assert infill_prompt(tokenizer, before, after) == shown[: middle + 1]
    suffix_first = FillInTheMiddle(tokens=control, begin_id=begin, rate=1.0, spm_rate=1.0, seed=1)
    shown = suffix_first.document(np.array([begin, *ids, begin]), start, 0, source=0).tolist()
    middle = shown.index(control.middle)
    after, begun = tokenizer.decode(shown[3:middle]), shown[middle + 1 :][: len(body) // 3]
    begun = [token for token in begun if token != begin]
    asked = infill_prompt(tokenizer, tokenizer.decode(begun), after, suffix_first=True)
    assert asked == shown[: middle + 1 + len(begun)]


def test_control_tokens_typed_around_a_gap_are_text(with_fim_tokens):
    prompt = infill_prompt(with_fim_tokens, "<|fim_middle|>", "<|endoftext|>")
    control = fim_tokens(with_fim_tokens)
    assert [prompt.count(id) for id in (with_fim_tokens.bos_id, control.prefix, control.suffix, control.middle)] == [1, 1, 1, 1]
