"""Weight types and conversions between them: one table of types, blocks, activations."""
