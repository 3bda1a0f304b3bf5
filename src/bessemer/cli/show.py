"""`bessemer show`."""


def show() -> None:
    """Print and draw anything: a run, a corpus, a tokenizer, token shards, a model."""
