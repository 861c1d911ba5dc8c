"""Hugging Face directories: config.json, safetensors, tokenizer and chat template."""
