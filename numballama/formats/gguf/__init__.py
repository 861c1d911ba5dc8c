"""GGUF: header, split files, reader, writer, and the tokenizer inside."""
