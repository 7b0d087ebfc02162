"""The model over HTTP: OpenAI's and Anthropic's protocols, sessions, keys, metrics and a page to talk on."""
