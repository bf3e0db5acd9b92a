"""What is said of the progress, with and without a terminal."""

import io
import logging
import sys

from t5x_lite.inference import jsonl
from t5x_lite.metrics import metric_logger


def test_without_a_terminal_a_line_now_and_then(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = iter([100.0, 110.0, 131.0, 140.0])
    monkeypatch.setattr(jsonl.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with jsonl.Progress(done=10, total=1000) as progress:
        for _ in range(3):
            progress.add(31)
    assert metric_logger.SECONDS_BETWEEN_LINES == 30
    assert [record.message for record in caplog.records] == ["72 of 1000 lines, 2.0 lines/s, ETA 07:44"]
    assert "|" not in sys.stderr.getvalue()  # no bar; the line may be there, where logging has been set up


def test_on_a_terminal_a_bar(monkeypatch, caplog):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with jsonl.Progress(done=10, total=40) as progress:
        progress.add(30)
    assert "40/40" in terminal.getvalue() and "lines/s" in terminal.getvalue()
    assert not caplog.records
