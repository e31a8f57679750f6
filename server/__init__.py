"""HTTP: OpenAI's chat completions, completions and responses, Anthropic's messages, over one engine thread."""
