"""Speculative decoding: proposers of draft tokens, their verification, the draft length."""
