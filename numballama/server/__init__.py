"""The HTTP server: OpenAI's and Anthropic's interfaces over a model's engine. `numballama serve` runs it.

Its modules need the extra `serve`. Importing this package needs nothing.
"""
