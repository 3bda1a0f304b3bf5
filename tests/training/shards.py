"""Token shards of random documents, for tests of what reads them."""

import numpy as np

from bessemer.tokenization.shards import EncodedDocuments, ShardWriter, TokenShards

BEGIN = 99
VOCABULARY = 100


def write_shards(folder, documents, sources=None, *, shard_tokens=1000, vocab_size=VOCABULARY, tokenizer_hash="hash"):
    """The folder of documents, lists of ids without begin tokens."""
    writer = ShardWriter(folder, tokenizer_hash=tokenizer_hash, vocab_size=vocab_size, bos_id=BEGIN, shard_tokens=shard_tokens)
    lengths = [len(document) for document in documents]
    writer.add(
        EncodedDocuments(
            [str(number) for number in range(len(documents))],
            list(sources or ["text"] * len(documents)),
            np.array(lengths, np.int64),
            np.concatenate([np.array(document, np.uint32) for document in documents]),
            np.cumsum([0, *lengths], dtype=np.int64),
        )
    )
    writer.finish()
    return TokenShards(folder)


def random_documents(lengths, seed=0, below=90):
    """Documents of these lengths, of ids that no control token has."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, below, length).tolist() for length in lengths]
