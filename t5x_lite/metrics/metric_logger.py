"""Log a run: metrics.jsonl, TensorBoard events, an optional tracker, a progress bar or plain lines, and loss.png.

The logger takes numbers that have been fetched from the devices. It uses the metrics `loss`, `input_tokens` and
`target_tokens` of a step; it must not know the step, the data or TensorFlow.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from tqdm import tqdm

from t5x_lite.errors import MissingFileError, UserError
from t5x_lite.metrics import hardware, tensorboard_events
from t5x_lite.storage import AppendOnlyFile

log = logging.getLogger("t5x_lite")

METRICS_FILE = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 30.0  # if there is neither a terminal nor a notebook to show a progress bar in
SECONDS_BETWEEN_COPIES = 60.0  # of metrics to a bucket

Record = dict[str, Any]


@runtime_checkable
class Tracker(Protocol):
    def scalars(self, records: Sequence[Mapping[str, Any]]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def peak_flops(device: Any) -> float | None:
    """Peak dense bfloat16 FLOP/s of one `jax.Device`; None if it is not in the table of chips."""
    chip = hardware.of_device(device)
    return None if chip is None else chip.flops


class MetricLogger:
    """Writes the metrics of a run. Only process 0 writes; on the others every method returns at once.

    Each record is one line of MODEL_DIR/metrics.jsonl: `step`, `split` ("train" or "validation"), `task` if it has one,
    then named floats (null for NaN and infinities, which JSON lacks). TensorBoard gets the same under
    split/[task/]name, through the tensorboard package's own record writer and without TensorFlow. If a write fails, the
    data is kept and written later: no step is lost, and training continues.

    Args:
      model_dir: a local folder; made if absent.
      total_steps: the step at which training ends.
      flops_per_step: of all devices together; gives MFU where the devices' peak is known.
      publish: `MirroredDirectory.publish`, called after evaluations, by `flush`, at the end, and once a minute.
      open_tracker: called on process 0 with the first record; returns another place for the records (`Tracker`).
    """

    def __init__(
        self,
        model_dir: str | os.PathLike,
        total_steps: int,
        flops_per_step: float | None = None,
        publish: Callable[..., None] = lambda every=0.0: None,
        open_tracker: Callable[[], Tracker] | None = None,
    ):
        self._dir = Path(model_dir)
        self._publish = publish
        self._total_steps = total_steps
        self._flops = flops_per_step
        self._peak = (peak_flops(jax.devices()[0]) or 0.0) * jax.device_count()
        self._resumed_at: int | None = None
        self._drop_from: int | None = None  # the step from which on TensorBoard is to drop what it has
        self._again: list[Record] = []  # records that it drops and gets once more
        self._writes = jax.process_index() == 0
        self._lines = self._events = self._tracker = self._bar = None
        self._open_tracker = open_tracker
        self._seconds = math.nan  # a step takes, smoothed
        self._line_due = 0.0

    def resume(self, step: int, evaluated: bool = True) -> None:
        """Removes the records after `step`, so that a resumed run logs each step once.

        The file is replaced atomically. A last line torn by a crash is removed, too.

        Args:
          evaluated: False also removes the evaluation of `step`.

        Raises:
          ValueError: another line is not JSON; the message names file and line.
        """
        if not self._writes:
            return
        self._resumed_at, self._drop_from = step, step + evaluated
        path = self._dir / METRICS_FILE
        if path.exists():
            records = [
                record
                for record in read_metrics(self._dir)
                if record["step"] < step or (record["step"] == step and (evaluated or record["split"] == "train"))
            ]
            self._again = [record for record in records if record["step"] >= self._drop_from]
            temporary = path.with_suffix(".tmp")
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)

    def train(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Records a training step.

        Args:
          step: number of updates done, this one included.
          metrics: as from `train_step`, fetched.
          seconds: wall time of one step, averaged since the last record, without evaluation and saving; 0 if not known
            (the first step, which compiles), and then no rates are given.
        """
        if not self._writes:
            return
        rates = {}
        if seconds > 0:
            rates["seconds_per_step"] = seconds
            rates["tokens_per_second"] = (metrics["input_tokens"] + metrics["target_tokens"]) / seconds
            if self._flops and self._peak:
                rates["mfu"] = self._flops / seconds / self._peak
            self._seconds = seconds if math.isnan(self._seconds) else 0.9 * self._seconds + 0.1 * seconds
        self._write(_record(step, "train", None, {**metrics, **rates}))
        self._show(step, metrics, rates)
        self._try_to_publish(every=SECONDS_BETWEEN_COPIES)

    def evaluation(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Records validation metrics, {task: {name: value}}, of the model after `step` updates."""
        if not self._writes:
            return
        for task, metrics in scores.items():
            log.info("step %d  %s: %s", step, task, ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        self._write(*(_record(step, "validation", task, metrics) for task, metrics in scores.items()))
        self._try_to_publish()

    def data_began_anew(self, step: int) -> None:
        """Records that the data began at its start again when the run resumed at `step`."""
        if self._writes:
            self._write(_record(step, "data", None, {"began_anew": 1.0}))

    def has_evaluation(self, step: int) -> bool:
        """Returns whether metrics.jsonl already has validation metrics of `step`."""
        records = read_metrics(self._dir) if (self._dir / METRICS_FILE).exists() else []
        return any(record["step"] == step and record["split"] == "validation" for record in records)

    def flush(self) -> None:
        """Waits until all records are on the disk or in the bucket. A checkpoint waits for this, because a resumed run
        does not log the steps before it again. May be called by another thread.

        Raises OSError if a file cannot be written, and the errors of the bucket's library.
        """
        for part in (self._lines, self._events, self._tracker):
            if part is not None:
                part.flush()
        if self._writes:
            self._publish()

    def close(self) -> None:
        for part in (self._bar, self._lines, self._events, self._tracker):
            if part is not None:
                part.close()
        self._lines = self._events = self._tracker = self._bar = None
        if self._writes:
            self._try_to_publish()

    def _try_to_publish(self, **options: float) -> None:
        try:
            self._publish(**options)
        except Exception as error:  # each library for buckets has errors of its own
            log.warning("The metrics could not be copied to the bucket, which is tried again (%s).", error)

    def _write(self, *records: Record) -> None:
        """Writes the records in one call, so that a kill leaves all of them or none."""
        if self._lines is None:
            self._lines = _open_lines(self._dir)
            self._events = tensorboard_events.open_events(self._dir, self._drop_from)
            if self._events is not None:
                self._events.scalars(self._again)
            if self._open_tracker is not None:
                self._tracker = self._open_tracker()
        self._lines.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode())
        for part in (self._events, self._tracker):
            if part is not None:
                part.scalars(records)

    def _show(self, step: int, metrics: Mapping[str, float], rates: Mapping[str, float]) -> None:
        parts = [f"loss {metrics['loss']:.4f}"]
        if rates:
            parts.append(f"{rates['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in rates:
            parts.append(f"MFU {rates['mfu']:.1%}")
        if not math.isnan(self._seconds):
            parts.append(f"ETA {tqdm.format_interval((self._total_steps - step) * self._seconds)}")
        if sys.stderr.isatty() or in_notebook():
            if self._bar is None:
                self._bar = tqdm(
                    total=self._total_steps,
                    initial=self._resumed_at or 0,
                    dynamic_ncols=not in_notebook(),
                    ncols=100,
                    bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}",
                )
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step == self._total_steps or time.monotonic() >= self._line_due:
            log.info("step %d/%d  %s", step, self._total_steps, ", ".join(parts))
            self._line_due = time.monotonic() + SECONDS_BETWEEN_LINES


def in_notebook() -> bool:
    """Returns whether the process is a notebook's kernel (Jupyter, Colab, Kaggle), which can redraw a progress bar."""
    return "ipykernel" in sys.modules and getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)() is not None


def _record(step: int, split: str, task: str | None, metrics: Mapping[str, float]) -> Record:
    values = {name: float(value) for name, value in metrics.items()}
    record: Record = {"step": step, "split": split} | ({} if task is None else {"task": task})
    return record | {name: value if math.isfinite(value) else None for name, value in values.items()}


def _open_lines(folder: Path) -> AppendOnlyFile:
    """Opens metrics.jsonl to append to, without a last line that a crash has torn."""
    path = folder / METRICS_FILE
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return AppendOnlyFile(path)


def read_metrics(model_dir: str | os.PathLike) -> list[Record]:
    """Returns the records of MODEL_DIR/metrics.jsonl, without a last line that a crash has torn.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another line is not JSON; names file and line.
    """
    path = Path(model_dir) / METRICS_FILE
    if not path.exists():
        raise MissingFileError(f"{path} does not exist: nothing has been trained or evaluated in this MODEL_DIR yet")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) or line.endswith("\n"):
                raise UserError(f"{path}, line {number} is not JSON: {line[:60]!r}; remove it") from None
    return records


def plot_losses(
    model_dir: str | os.PathLike, baselines: Mapping[str, float] | None = None, title: str | None = None
) -> Path:
    """Draws MODEL_DIR/loss.png: training loss, raw and smoothed, and each task's validation loss, over steps.

    Args:
      model_dir: where metrics.jsonl is; of a step that it has twice, the later line counts.
      baselines: {label: loss in nats a target token} drawn as horizontal lines.
      title: of the picture; None is the folder's name.

    Raises:
      FileNotFoundError, ValueError: there are no metrics, or none with a loss.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    train: dict[int, float] = {}
    tasks: dict[str, dict[int, float]] = {}
    for record in read_metrics(model_dir):
        # Without z-loss, so that the curves and the baselines can be compared.
        value = record.get("cross_ent_loss", record.get("loss"))
        if value is not None:
            series = train if record["split"] == "train" else tasks.setdefault(record.get("task", "validation"), {})
            series[record["step"]] = value
    if not train and not tasks:
        raise UserError(f"{Path(model_dir) / METRICS_FILE} has no loss to plot")

    legend_rows = (len(tasks) + len(baselines or {})) // 2 + 1
    figure, axes = pyplot.subplots(figsize=(9, 5 + 0.2 * legend_rows), layout="constrained")
    tops = []
    if train:
        steps, raw = zip(*sorted(train.items()), strict=True)
        smooth = _smoothed(raw)
        axes.plot(steps, raw, color="C0", alpha=0.3, linewidth=0.8)
        axes.plot(steps, smooth, color="C0", linewidth=2, label=f"training: {smooth[-1]:.3f}")
        tops.append(max(smooth))
    for index, (task, series) in enumerate(sorted(tasks.items())):
        steps, values = zip(*sorted(series.items()), strict=True)
        style = {"color": f"C{1 + index % 9}", "marker": "osD^v"[index // 9 % 5], "markersize": 4, "linewidth": 1}
        axes.plot(steps, values, label=f"validation, {task}: {values[-1]:.3f}", **style)
        tops.append(max(values))
    for index, (label, value) in enumerate((baselines or {}).items()):
        style = ("--", ":", "-.")[index % 3]
        axes.axhline(value, color="0.35", linewidth=1.2, linestyle=style, label=f"{label}: {value:.3f}")
        tops.append(value)
    axes.set(xlabel="step", ylabel="cross entropy, nats a target token", title=title or Path(model_dir).resolve().name)
    axes.set_ylim(0, 1.08 * max(tops))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    path = Path(model_dir) / "loss.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """Mean over a window of about a twenty-fifth of the points, centred so as not to lag; cut off at the ends."""
    window = np.ones(2 * (len(values) // 50) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


class _Console(logging.Handler):
    """Writes above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(info: bool = True) -> None:
    """One line a message on stderr, with the time: ours from INFO, everybody else's from WARNING.

    To be called once absl has started the program: its own handler, which would say everything again, is taken off.

    Args:
      info: False leaves ours, too, at WARNING: for processes other than 0.
    """
    console = _Console()
    console.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [console]
    for name in (None, "absl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("t5x_lite", "tasks", "run", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if info else logging.WARNING)
