"""Meta's checkpoints: params.json and consolidated.*.pth."""
