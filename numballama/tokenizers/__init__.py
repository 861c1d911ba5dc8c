"""Tokenizers, text ↔ ids: a module for each kind. `numballama.formats.tokenizer_files` opens their files."""
