"""The status of a run, from its folder."""

import json
from pathlib import Path


def status(folder: Path) -> str:
    """The status of the run: "complete", "diverged", "unfinished" or "not begun"."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))["status"]
    except FileNotFoundError:
        return "unfinished" if (folder / "checkpoint.pt").exists() else "not begun"
