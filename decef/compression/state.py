"""How far a compression is: what makes it go on after a stop."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from decef.files import write_json
from decef.models.released import NETWORK
from decef.plans import Plan
from decef.training.checkpoint import load_checkpoint

log = logging.getLogger(__name__)

PLAN, FORMS, STATE, CHECKPOINT, REPORT = "plan.yaml", "forms.json", "state.json", "checkpoint.pt", "report.md"
#: The files that a compression is made for, with what each is in its report.
FILES = {
    f"{NETWORK}.safetensors": "the small network with its plan, to use or train in Python",
    f"{NETWORK}.onnx": "for ONNX Runtime and others, each layer in the form above",
    f"{NETWORK}.pt2": "for torch.export.load, each layer in the form above",
    PLAN: "the plan",
}
TUNING = {"finetune", "lr"}  # what is asked of fine-tuning alone
AFTER_PLANNING = TUNING | {"images", "seed"}  # what a plan doesn't depend on
BEFORE = "plan-before.yaml"


def digest(plan: Plan) -> str:
    """What a plan says to do, in brief."""
    rows = [(row.name, row.action, row.layer, row.rank) for row in plan.rows]
    said = json.dumps([plan.layer, rows, plan.options], sort_keys=True, default=str)
    return hashlib.md5(said.encode(), usedforsecurity=False).hexdigest()


class State:
    """What is done, in a JSON file that is written after every step.

    What is only planned may be planned anew, and what is not fine-tuned yet may be fine-tuned in another way. A plan
    that was edited is kept as plan-before.yaml when another is made.

    Args:
        folder: of the compression.
        asked: what determines the result.

    Raises:
        ValueError: the folder holds another compression, or files of something else under the names of these.
    """

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self._folder, self._path, self.asked = folder, folder / STATE, asked
        self._known = self._read()
        self._changed()

    def begin(self) -> None:
        """Read what is done, which may have changed since, and drop what is not of this compression.

        Raises:
            ValueError: as above.
        """
        self._known = self._read()
        changed = self._changed()
        if changed and not AFTER_PLANNING.issuperset(changed):
            if (self._folder / PLAN).is_file() and self._may_be_edited():
                (self._folder / PLAN).replace(self._folder / BEFORE)
                log.info("%s was edited: it is now %s, and another is made", PLAN, BEFORE)
            for planned in (PLAN, FORMS):
                (self._folder / planned).unlink(missing_ok=True)
            self._known = {}
        if changed:
            self["asked"] = self.asked

    def _read(self) -> dict[str, Any]:
        """What the file says; empty if there is none. Raises ValueError for files of something else, see the class."""
        written = (*FILES, FORMS, CHECKPOINT, REPORT, Path(REPORT).with_suffix(".json").name)
        others = [name for name in written if (self._folder / name).exists()]
        if others and not self._path.is_file():
            raise ValueError(f"{self._folder} has a {others[0]} that is not of a compression: give another folder")
        return json.loads(self._path.read_text()) if self._path.is_file() else {}

    def _changed(self) -> dict[str, str]:
        """What was asked before that is asked otherwise now, in words by argument."""
        before = self._known.get("asked", {})
        changed = {k: f"{k} {before.get(k)!r}, not {v!r}" for k, v in self.asked.items() if before.get(k) != v}
        path = self._folder / CHECKPOINT
        saved = load_checkpoint(path) if changed and path.is_file() else None
        if saved and (saved["training"] or not TUNING.issuperset(changed)):
            words = "; ".join(changed.values())
            raise ValueError(f"{self._folder} holds another compression ({words}): give another folder")
        return changed

    def edited(self, plan: Plan) -> bool:
        """Whether the folder's plan says something else than when it was made."""
        return self._known.get("planned", digest(plan)) != digest(plan)

    def _may_be_edited(self) -> bool:
        try:
            return "planned" not in self._known or self.edited(Plan.load(self._folder / PLAN))
        except ValueError:  # it can't be read any more
            return True

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._known[key] = value
        write_json(self._path, self._known)

    def get(self, key: str, default: Any) -> Any:
        return self._known.get(key, default)
