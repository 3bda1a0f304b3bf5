"""From logits to tokens and text: sampling, penalties, grammars, beam search, stop strings."""
