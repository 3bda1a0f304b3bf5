"""OpenAI's and Anthropic's API, and who may use it."""
