"""Strategies of a decode step: plain, multi-token, speculative and asynchronous."""
