import numpy as np
import pytest
import torch

from bessemer.core.errors import ArtefactError
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.data.batches import TokenBatches
from bessemer.training.data.packing import DocumentBatches
from bessemer.training.data.token_stream import DocumentSources
from bessemer.training.objectives import next_token_loss
from tests.tokenization.test_shards import write as write_ids
from tests.training.shards import BEGIN, random_documents, write_shards

LENGTH = 32
DOCUMENTS = random_documents(np.random.default_rng(3).integers(0, 80, 60))
SOURCES = ["code" if len(document) % 2 else "web" for document in DOCUMENTS]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("documents") / "shards", DOCUMENTS, SOURCES)


@pytest.fixture(scope="module")
def batches(shards):
    return DocumentBatches(shards, batch_size=4, context_length=LENGTH, seed=1)


def rows_in(batches, rows):
    """(tokens, targets, positions, sources) of every piece of the first rows."""
    found = []
    for step in range(rows // batches.batch_size):
        batch = batches.batch(step)
        for tokens, targets, positions, documents, sources in zip(
            batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.document_ids_BT, batch.sources_BT, strict=True
        ):
            for number in range(1, int(documents.max()) + 1):
                inside = documents == number
                found.append([column[inside].tolist() for column in (tokens, targets, positions, sources)])
    return found


def test_an_epoch_learns_every_token_of_every_document_and_its_end_once(shards):
    batches = DocumentBatches(shards, batch_size=1, context_length=LENGTH, seed=1)
    pieces = rows_in(batches, batches.rows)
    ended = [([BEGIN, *document], [*document, BEGIN]) for document in DOCUMENTS]
    whole = [(tokens, targets) for tokens, targets, _, _ in pieces if tokens[0] == BEGIN and targets[-1] == BEGIN]
    assert len(whole) > 20 and all(piece in ended for piece in whole)
    learned = sorted(target for _, targets, _, _ in pieces for target in targets)
    assert learned == sorted(token for document in DOCUMENTS for token in [*document, BEGIN])
    assert sum(tokens[0] == BEGIN for tokens, *_ in pieces) == len(DOCUMENTS)


def test_targets_follow_and_positions_restart_in_every_piece(batches):
    for tokens, targets, positions, _ in rows_in(batches, batches.rows):
        assert tokens[1:] == targets[:-1]
        assert BEGIN not in tokens[1:]
        assert positions == list(range(len(tokens)))


def test_padding_is_nobodys_document_and_has_no_targets(shards):
    batch = DocumentBatches(shards, batch_size=200, context_length=LENGTH, seed=1).batch(0)
    padding = batch.document_ids_BT == 0
    assert padding.any() and (batch.tokens_BT[padding] == BEGIN).all()
    assert (batch.targets_BT[padding] == IGNORE_INDEX).all() and (batch.targets_BT[~padding] != IGNORE_INDEX).all()


def test_the_loss_of_packed_documents_is_that_of_each_alone(decoder, tmp_path):
    documents = random_documents([5, 9, 13, 3, 20])
    shards = write_shards(tmp_path, documents)
    batches = DocumentBatches(shards, batch_size=2, context_length=LENGTH, seed=1)
    decoder = decoder.double().eval()
    begin = 96  # the tiny model's vocabulary ends below the shards'
    alone = []
    for document in documents:
        tokens = torch.tensor([[begin, *document, begin]])
        logits = decoder(tokens[:, :-1])[0]
        alone.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
    assert batches.rows == 2
    batch = batches.batch(0)
    tokens, targets = (column.masked_fill(column == BEGIN, begin) for column in (batch.tokens_BT, batch.targets_BT))
    together = next_token_loss(decoder, type(batch)(tokens, targets, batch.positions_BT, batch.document_ids_BT))
    torch.testing.assert_close(together, sum(alone) / sum(len(document) + 1 for document in documents))


def test_tokens_carry_the_source_of_their_document(shards, batches):
    source_of = {tuple([BEGIN, *document][:5]): source for document, source in zip(DOCUMENTS, SOURCES, strict=True)}
    names = batches.batch(0).source_names
    assert names == ("code", "web") == shards.sources
    seen = 0
    for tokens, _, _, sources in rows_in(batches, batches.rows):
        if tokens[0] == BEGIN and len(tokens) >= 5:
            assert {names[source] for source in sources} == {source_of[tuple(tokens[:5])]}
            seen += 1
    assert seen > 20


def test_windows_carry_the_source_of_every_token(shards):
    origins = DocumentSources(shards)
    batches = TokenBatches(shards, batch_size=3, context_length=LENGTH, seed=1, sources=origins)
    expected = [name for document, name in zip(DOCUMENTS, SOURCES, strict=True) for _ in range(len(document) + 1)]
    stream = shards.read(0, shards.tokens).tolist()
    windows = {tuple(stream[start : start + LENGTH]): start for start in range(0, batches.rows * LENGTH, LENGTH)}
    for step in range(batches.rows // 3):
        batch = batches.batch(step)
        for tokens, sources in zip(batch.tokens_BT.tolist(), batch.sources_BT.tolist(), strict=True):
            start = windows[tuple(tokens)]
            assert [batch.source_names[source] for source in sources] == expected[start : start + LENGTH]
    names = [origins.names[number] for number in origins.at(np.arange(len(expected)))]
    assert names == expected


def test_parts_of_a_batch_in_a_row_are_the_batch(batches):
    whole, parts = batches.batch(2), [batches.batch(2, slice(0, 1)), batches.batch(2, slice(1, 4))]
    for name in ("tokens_BT", "targets_BT", "positions_BT", "document_ids_BT", "sources_BT"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_shards_without_documents_are_refused(tmp_path):
    write_ids(tmp_path, [])
    with pytest.raises(ArtefactError, match="no documents to pack"):
        DocumentBatches(TokenShards(tmp_path), batch_size=1, context_length=8, seed=1)


def test_a_document_without_text_is_its_begin_and_its_end(tmp_path):
    batch = DocumentBatches(write_shards(tmp_path, [[]]), batch_size=1, context_length=8, seed=1).batch(0)
    assert (batch.tokens_BT[0, 0], batch.targets_BT[0, 0]) == (BEGIN, BEGIN)
    assert (batch.targets_BT[0, 1:] == IGNORE_INDEX).all()
