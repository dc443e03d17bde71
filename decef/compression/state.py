"""How far a compression is: what makes it go on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from decef.files import write_json
from decef.training.checkpoint import load_checkpoint

PLAN, FORMS, STATE, CHECKPOINT = "plan.yaml", "forms.json", "state.json", "checkpoint.pt"
TUNING = {"finetune", "lr"}  # what is asked of fine-tuning alone


class State:
    """What is done, in a JSON file that is written after every step.

    What is only planned may be planned anew, and what is not fine-tuned yet may be fine-tuned in another way.

    Args:
        folder: of the compression.
        asked: what determines the result.

    Raises:
        ValueError: the folder holds another compression, or files of something else under the names of these.
    """

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self._path, self.asked = folder / STATE, asked
        others = [name for name in (PLAN, FORMS, CHECKPOINT) if (folder / name).exists()]
        if others and not self._path.is_file():
            raise ValueError(f"{folder} has a {others[0]} that is not of a compression: give another folder")
        self._known: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}
        before = self._known.get("asked", {})
        changed = {k: f"{k} {before.get(k)!r}, not {v!r}" for k, v in asked.items() if before.get(k) != v}
        saved = load_checkpoint(folder / CHECKPOINT) if (folder / CHECKPOINT).is_file() else None
        if saved and changed and (saved["training"] or not TUNING.issuperset(changed)):
            words = "; ".join(changed.values())
            raise ValueError(f"{folder} holds another compression ({words}): give another folder")
        if changed and not saved:
            folder.mkdir(parents=True, exist_ok=True)
            for planned in (PLAN, FORMS):
                (folder / planned).unlink(missing_ok=True)
            self._known = {}
        if changed:
            self["asked"] = asked

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._known[key] = value
        write_json(self._path, self._known)

    def get(self, key: str, default: Any) -> Any:
        return self._known.get(key, default)
