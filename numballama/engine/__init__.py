"""The engine: requests in, tokens out. It knows no device, no text format and no HTTP; see docs/engine.md."""
