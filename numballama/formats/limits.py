"""Limits on values of a header that the size of the file does not limit."""

MAX_LAYERS = 1024
"""Maximum number of layers. Objects are made for each layer before its weights are looked up."""

MAX_CONTEXT = 1 << 24
"""Maximum context in tokens. Some tables have one row for each position."""
