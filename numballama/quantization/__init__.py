"""Weight types and conversions between them: the table of types, GGUF's blocks, and int8 activations."""
