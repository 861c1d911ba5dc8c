"""The golden models in Hugging Face's format, and changes to their JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HF = Path(__file__).parents[1] / "golden" / "hf"


def edit(folder: Path, changes: dict[str, Any], name: str = "config.json") -> Path:
    """Replace keys of a JSON file; None removes a key."""
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder
