"""Hugging Face directories: config.json, safetensors, what they say about text."""
