"""Speculative decoding: proposers of draft tokens, their verification, and the draft length."""
