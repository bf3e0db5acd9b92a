"""Write scalars as TensorBoard events, by the tensorboard package's record writer.

Its `summary.Writer` is not used, because it imports TensorFlow (10 s) if that is installed.
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


def tagged(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of a record of metrics.jsonl under split/[task/]name."""
    prefix = "/".join(str(record[key]) for key in ("split", "task") if key in record)
    return {f"{prefix}/{name}": x for name, x in record.items() if name not in ("step", "split", "task")}


class EventFile(AppendOnlyFile):
    """A new event file in `folder`.

    Args:
      drop_from: TensorBoard drops the events of earlier files from this step on.

    Raises ModuleNotFoundError if tensorboard is not installed.
    """

    def __init__(self, folder: Path, drop_from: int | None):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads files in the order of their names.
        super().__init__(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}")
        self._proto: Any = event_pb2
        self._records = RecordWriter(self)
        self._add(file_version="brain.Event:2")
        if drop_from is not None:
            self._add(step=drop_from, session_log=self._proto.SessionLog(status=self._proto.SessionLog.START))

    def scalars(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the records of one step, in the form of metrics.jsonl, as one event. Tags are split/[task/]name."""
        values = []
        for record in records:
            for tag, number in tagged(record).items():
                values.append({"tag": tag, "simple_value": math.nan if number is None else number})
        if records:
            self._add(step=records[0]["step"], summary={"value": values})

    def _add(self, **fields: Any) -> None:
        self._records.write(self._proto.Event(wall_time=time.time(), **fields).SerializeToString())


def open_events(folder: Path, drop_from: int | None) -> EventFile | None:
    """Open a new event file; return None and log a warning if tensorboard is not installed."""
    try:
        return EventFile(folder, drop_from)
    except ModuleNotFoundError as error:
        log.warning("no TensorBoard events: %s (pip install tensorboard); metrics.jsonl has everything", error)
        return None
