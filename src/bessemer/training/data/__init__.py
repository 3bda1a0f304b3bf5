"""Batches of training: from token shards and documents to rows, as a pure function of seed and step."""
