"""DIR/results.jsonl: one JSON object a line, appended as soon as something has been measured.

Every line has `part`, `run` (the time at which the command was started) and, but for the part as a whole, `key`. A line
with `started` says that a measurement has begun; it ends with a line of results, or one with `error`. This module knows
no parts and imports neither JAX nor torch.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
TIME_LIMIT = "time limit"
MAX_FAILURES = 2

Line = dict[str, Any]


class Results:
    """The lines of one DIR. Only one process at a time may write."""

    def __init__(self, folder: Path, run: str):
        self.folder, self.run = folder, run
        self._path = folder / FILE

    def repair(self) -> None:
        """Removes what a kill has left of a last line."""
        if self._path.exists():
            content = self._path.read_bytes()
            os.truncate(self._path, content.rfind(b"\n") + 1)

    def append(self, part: str, key: str | None = None, **fields: Any) -> None:
        line = {"part": part} | ({} if key is None else {"key": key}) | {"run": self.run} | fields
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:  # one write: a kill leaves all of a line or none
            file.write((json.dumps(line) + "\n").encode())

    def lines(self, part: str | None = None) -> list[Line]:
        """Returns all lines, or those of one part."""
        if not self._path.exists():
            return []
        complete, _, _ = self._path.read_text().rpartition("\n")
        lines = [json.loads(line) for line in complete.splitlines()]
        return [line for line in lines if part in (None, line["part"])]

    def measured(self, part: str) -> dict[str, Line]:
        """Returns the results of a part by key, without errors; of a key measured twice the last counts."""
        return {line["key"]: line for line in self.lines(part) if is_result(line)}

    def running(self, part: str) -> str | None:
        """Returns the key of the measurement of this run that has begun and not ended."""
        lines = [line for line in self.lines(part) if line["run"] == self.run and "key" in line]
        return lines[-1]["key"] if lines and "started" in lines[-1] else None

    def pending(self, part: str, keys: Sequence[str]) -> list[str]:
        """Returns those of `keys` that are still to be measured, in the order to do so.

        What failed is tried once more by the next run, and then no more. What a time limit ended, or a kill of the
        command, is tried again by every run, after what has not been tried yet: it may take all the time there is.
        """
        lines = self.lines(part)
        done = self.measured(part).keys()
        errors = [line for line in lines if "error" in line and "key" in line]
        failures = Counter(line["key"] for line in errors if line["error"] != TIME_LIMIT)
        failures_of_run = {line["key"] for line in errors if line["run"] == self.run}
        attempts = Counter(line["key"] for line in lines if "started" in line)
        pending = [key for key in keys if key not in done and key not in failures_of_run]
        return sorted((key for key in pending if failures[key] < MAX_FAILURES), key=attempts.__getitem__)


def is_result(line: Line) -> bool:
    return "key" in line and "error" not in line and "started" not in line
