"""Kinds of tokenizers, a module each; `numballama.tokenizer` is the front door."""
