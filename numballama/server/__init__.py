"""The HTTP server: an API like OpenAI's, and a page to chat on."""
