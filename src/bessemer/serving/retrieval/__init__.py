"""Retrieval over the API: indexes and clients' files as vector stores, answers from them with citations, and reranking."""
