"""Kinds of tokenizers, a module each."""
