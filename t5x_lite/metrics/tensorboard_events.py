"""Scalars as TensorBoard reads them, through the tensorboard package's own record writer.

Its `summary.Writer` would do, were it not to load TensorFlow where it is installed: 10 s, and what this must not do.
"""

import logging
import math
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.storage import AppendOnlyFile

log = logging.getLogger("t5x_lite")


class EventFile(AppendOnlyFile):
    """A new file of events in `folder`.

    Args:
      drop_from: the step from which on TensorBoard drops what earlier files hold.

    Raises ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, drop_from: int | None):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        super().__init__(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}")  # read in this order
        self._proto: Any = event_pb2
        self._records = RecordWriter(self)
        self._add(file_version="brain.Event:2")
        if drop_from is not None:
            self._add(step=drop_from, session_log=self._proto.SessionLog(status=self._proto.SessionLog.START))

    def scalars(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds records of one step, as those of metrics.jsonl, in one piece. Tags are split/[task/]name."""
        values = []
        for record in records:
            under = "/".join(str(record[key]) for key in ("split", "task") if key in record)
            for name in record.keys() - {"step", "split", "task"}:
                number = math.nan if record[name] is None else record[name]
                values.append({"tag": f"{under}/{name}", "simple_value": number})
        if records:
            self._add(step=records[0]["step"], summary={"value": values})

    def _add(self, **fields: Any) -> None:
        self._records.write(self._proto.Event(wall_time=time.time(), **fields).SerializeToString())


def open_events(folder: Path, drop_from: int | None) -> EventFile | None:
    """None, and a line in the log, where tensorboard is not installed."""
    try:
        return EventFile(folder, drop_from)
    except ModuleNotFoundError as error:
        log.warning("no TensorBoard events: %s (pip install tensorboard); metrics.jsonl has everything", error)
        return None
