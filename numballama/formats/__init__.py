"""Readers and writers of checkpoint formats, a package for each family."""
