"""Tokenizers, text ↔ ids: a module for each type. `numballama.formats.tokenizer_files` opens their files."""
