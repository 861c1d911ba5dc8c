"""Bounds on what a header may claim, where the size of the file does not bound it."""

MAX_LAYERS = 1024
"""Objects are made for each layer before its weights are looked for."""

MAX_CONTEXT = 1 << 24
"""Tokens. Tables as long as the context are computed from it."""
