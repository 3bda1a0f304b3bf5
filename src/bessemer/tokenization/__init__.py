"""Training byte-level BPE, encoding documents to token shards, decoding, and the chat template."""
