"""OpenAI-compatible API and a chat page."""
