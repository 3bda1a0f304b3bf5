"""OpenAI's chat completions, completions and embeddings, with vLLM's extensions."""
