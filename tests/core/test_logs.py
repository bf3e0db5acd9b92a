"""metric_logger.py: what lands in the files, what survives a crash and a restart, and the FLOPs that MFU counts."""

import json
import logging
import math
import os
import pathlib
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest
import torture

from t5x_lite import storage
from t5x_lite.metrics import metric_logger
from t5x_lite.model.t5 import T5Config
from t5x_lite.t5_model import T5Model

ROOT = pathlib.Path(__file__).parents[2]
STEP = {"loss": 2.5, "cross_ent_loss": 2.25, "input_tokens": 30.0, "target_tokens": 10.0}


def lines(storage: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (storage / "metrics.jsonl").read_text().splitlines()]


def events(storage: pathlib.Path) -> list:
    """All events of all files, in the order in which TensorBoard reads them."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    found = []
    for path in sorted(storage.glob("events.out.tfevents.*")):
        reader = PyRecordReader_New(str(path))
        while True:
            try:
                reader.GetNext()
            except Exception:  # the reader's own class, at the end of the file
                break
            found.append(Event.FromString(reader.record()))
    return found


def test_records_of_steps_and_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_logger, "peak_flops", lambda device: 100.0 / jax.device_count())
    logger = metric_logger.MetricLogger(tmp_path / "new" / "run", total_steps=3, flops_per_step=60.0)
    logger.train(1, STEP, seconds=0.0)
    logger.train(2, STEP | {"loss": float(np.float32(0.1))}, seconds=2.0)
    # Each line is in the file as soon as it has been said, not only at close.
    assert len(lines(tmp_path / "new" / "run")) == 2
    logger.evaluation(2, {"glue_cola_v002": {"matthews_corrcoef": 0.25}, "squad": {"loss": math.nan, "em": math.inf}})
    logger.close()
    rates = {"seconds_per_step": 2.0, "tokens_per_second": 20.0, "mfu": 0.3}
    assert lines(tmp_path / "new" / "run") == [
        {"step": 1, "split": "train", **STEP},
        {"step": 2, "split": "train", **STEP, **rates, "loss": float(np.float32(0.1))},
        {"step": 2, "split": "validation", "task": "glue_cola_v002", "matthews_corrcoef": 0.25},
        {"step": 2, "split": "validation", "task": "squad", "loss": None, "em": None},
    ]


def test_no_mfu_on_an_unknown_chip(tmp_path):
    assert metric_logger.peak_flops(jax.devices("cpu")[0]) is None
    logger = metric_logger.MetricLogger(tmp_path, total_steps=3, flops_per_step=60.0)
    logger.train(1, STEP, seconds=1.0)
    logger.close()
    assert "tokens_per_second" in lines(tmp_path)[0]
    assert "mfu" not in lines(tmp_path)[0]


def test_resume_says_each_step_once(tmp_path):
    def train(first: int, last: int, resume: int) -> None:
        logger = metric_logger.MetricLogger(tmp_path, total_steps=6)
        logger.resume(resume)
        for step in range(first, last + 1):
            logger.train(step, STEP | {"loss": 1 / step + 1e-9 * resume}, seconds=0.5)
        logger.evaluation(last, {"task": {"loss": 1.0}})
        logger.close()

    train(1, 5, resume=0)
    before = (tmp_path / "metrics.jsonl").read_text()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "split": "tr')
    train(4, 6, resume=3)
    after = (tmp_path / "metrics.jsonl").read_text()
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 6]
    assert after.splitlines()[:3] == before.splitlines()[:3]
    assert after.splitlines()[3] != before.splitlines()[3]
    assert sorted(path.name for path in tmp_path.iterdir() if "tfevents" not in path.name) == ["metrics.jsonl"]


def test_an_evaluation_that_is_owed_is_said_once(tmp_path):
    """Told to stop at step 2, where an evaluation was due, and killed twice in going on."""

    def train(first: int, last: int, resume: int, evaluated: bool) -> None:
        logger = metric_logger.MetricLogger(tmp_path, total_steps=4)
        logger.resume(resume, evaluated)
        if not evaluated:
            logger.evaluation(2, {"a": {"loss": 1.0}, "b": {"loss": 2.0}})
        for step in range(first, last + 1):
            logger.train(step, STEP | {"loss": 1 / step}, seconds=0.5)
        logger.close()

    train(1, 2, resume=0, evaluated=True)
    train(3, 3, resume=2, evaluated=False)
    train(3, 4, resume=2, evaluated=False)
    said = [(record["step"], record["split"], record.get("task")) for record in lines(tmp_path)]
    assert said == [*((step, "train", None) for step in (1, 2)), (2, "validation", "a"), (2, "validation", "b"),
                    *((step, "train", None) for step in (3, 4))]  # fmt: skip
    shown = torture.events(tmp_path)
    assert shown["train/loss"] == [(step, float(np.float32(1 / step))) for step in (1, 2, 3, 4)]
    assert shown["validation/a/loss"] == [(2, 1.0)] and shown["validation/b/loss"] == [(2, 2.0)]


def test_a_full_disk_costs_no_line(tmp_path, caplog):
    """The kernel's own refusal, in the middle of a line. By a limit, which stands for a full disk."""
    logger = metric_logger.MetricLogger(tmp_path, total_steps=5)
    logger.train(1, STEP, seconds=0.5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) + 5, limits[1]))
    try:
        for step in (2, 3, 4):
            logger.train(step, STEP, seconds=0.5)
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written \(.*File too large.*make room"):
            logger.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 0 < len(metric_logger.read_metrics(tmp_path)) < 4, "a torn last line does not count"
    said = [record.message for record in caplog.records if record.name == "t5x_lite.storage"]
    assert [message.count("cannot be written") for message in said] == [1, 1], "once for each file"
    logger.train(5, STEP, seconds=0.5)
    logger.flush()
    logger.close()
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert [step for step, _ in torture.events(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5]


def test_what_a_full_disk_never_takes_is_said_to_be_lost(caplog):
    file = storage.AppendOnlyFile(pathlib.Path("/dev/full"))
    file.write(b"a line\n")
    with pytest.raises(OSError, match=r"/dev/full cannot be written .*No space left"):
        file.flush()
    file.close()
    assert "The last 7 bytes of /dev/full are lost" in caplog.text


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path):
    for _ in range(2):
        logger = metric_logger.MetricLogger(tmp_path, total_steps=2)
        logger.resume(0)
        logger.train(1, STEP, seconds=0.0)
        logger.close()
    assert len(lines(tmp_path)) == 1


def test_torn_line_is_cut_off_before_adding(tmp_path):
    """As --mode=eval does after a crash: it adds to the file without taking anything back."""
    whole = '{"step": 9, "split": "train", "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 10, "sp')
    assert metric_logger.read_metrics(tmp_path) == [json.loads(whole)]
    logger = metric_logger.MetricLogger(tmp_path, total_steps=9)
    logger.evaluation(9, {"task": {"loss": 2.0}})
    logger.close()
    assert [record["split"] for record in lines(tmp_path)] == ["train", "validation"]


def test_unreadable_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 .*'not json"):
        metric_logger.MetricLogger(tmp_path, total_steps=3).resume(1)


def test_tensorboard_events(tmp_path):
    for resumed_at in (0, 1, None):
        logger = metric_logger.MetricLogger(tmp_path, total_steps=3)
        if resumed_at is not None:
            logger.resume(resumed_at)
        logger.train(2, {**STEP, "loss": 7.5}, seconds=0.0)
        logger.evaluation(2, {"cola": {"accuracy": 0.5}})
        logger.close()
    found = events(tmp_path)
    starts = [event.step for event in found if event.HasField("session_log")]
    assert starts == [1, 2]  # none by the logger that took nothing back
    scalars = {(event.step, v.tag): v.simple_value for event in found for v in event.summary.value}
    assert scalars[2, "train/loss"] == 7.5
    assert scalars[2, "validation/cola/accuracy"] == 0.5
    assert [event.file_version for event in found if event.file_version] == ["brain.Event:2"] * 3


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    logger = metric_logger.MetricLogger(tmp_path, total_steps=3)
    with caplog.at_level(logging.WARNING, "t5x_lite"):
        logger.train(1, STEP, seconds=0.0)
        logger.train(2, STEP, seconds=0.0)
    logger.close()
    assert len(caplog.messages) == 1
    assert "pip install tensorboard" in caplog.text
    assert len(lines(tmp_path)) == 2
    assert not events(tmp_path)


@pytest.mark.slow
def test_neither_events_nor_plot_load_tensorflow(tmp_path):
    script = (
        "import sys; from t5x_lite.metrics import metric_logger; logger = metric_logger.MetricLogger(sys.argv[1], 2);"
        f"logger.train(1, {STEP}, 0.0); logger.close(); metric_logger.plot_losses(sys.argv[1]);"
        "assert logger is not None and 'tensorboard' in sys.modules and 'tensorflow' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True, timeout=120)


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    logger = metric_logger.MetricLogger(tmp_path, total_steps=3)
    logger.resume(0)
    logger.train(1, STEP, seconds=0.0)
    logger.evaluation(1, {"task": {"loss": 1.0}})
    logger.close()
    assert not list(tmp_path.iterdir())


def test_a_bucket_gets_what_is_written_and_gives_it_back(tmp_path, monkeypatch):
    # The bucket is a folder: only the way there is not the real one.
    monkeypatch.setattr(storage.epath, "Path", lambda url: pathlib.Path(str(url).replace("gs://", f"{tmp_path}/")))
    first = storage.MirroredDirectory("gs://bucket/run", bring=(metric_logger.METRICS_FILE,))
    logger = metric_logger.MetricLogger(first.path, 3, publish=first.publish)
    logger.train(1, STEP, 0.0)
    assert not (tmp_path / "bucket").exists(), "once a minute, and not at each step"
    logger.evaluation(1, {"a": {"loss": 2.0}})
    assert len(metric_logger.read_metrics(tmp_path / "bucket/run")) == 2
    logger.train(2, STEP, 0.5)
    assert len(metric_logger.read_metrics(tmp_path / "bucket/run")) == 2
    logger.flush()
    assert len(metric_logger.read_metrics(tmp_path / "bucket/run")) == 3, "before a checkpoint counts"
    logger.close()
    events = sorted(path.name for path in (tmp_path / "bucket/run").glob("events*"))
    assert len(metric_logger.read_metrics(tmp_path / "bucket/run")) == 3 and len(events) == 1

    second = storage.MirroredDirectory("gs://bucket/run", bring=(metric_logger.METRICS_FILE,))
    assert second.path != first.path and str(second) != str(second.path)
    other = storage.MirroredDirectory("gs://bucket/run", bring=(metric_logger.METRICS_FILE,))
    (other.path / "batch-3.1.npz").touch()  # of another host, which has an old metrics.jsonl and adds nothing to it
    (tmp_path / "bucket/run/metrics.jsonl").write_text("newer")
    other.publish()
    assert (tmp_path / "bucket/run/batch-3.1.npz").exists()
    assert (tmp_path / "bucket/run/metrics.jsonl").read_text() == "newer"
    logger = metric_logger.MetricLogger(second.path, 3, publish=second.publish)
    logger.resume(1)
    logger.close()
    assert [record["step"] for record in metric_logger.read_metrics(tmp_path / "bucket/run")] == [1, 1]
    assert storage.MirroredDirectory(tmp_path / "local").path == tmp_path / "local"


def test_plain_lines_come_at_intervals(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(metric_logger.time, "monotonic", lambda: next(clock))
    logger = metric_logger.MetricLogger(tmp_path, total_steps=100)
    with caplog.at_level(logging.INFO, "t5x_lite"):
        for step in (1, 2, 3, 4, 100):
            logger.train(step, STEP, seconds=0.5 if step > 1 else 0.0)
    logger.close()
    assert caplog.messages == [
        "step 1/100  loss 2.5000",
        "step 3/100  loss 2.5000, 80 tokens/s, ETA 00:48",
        "step 100/100  loss 2.5000, 80 tokens/s, ETA 00:00",
    ]


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = metric_logger.MetricLogger(tmp_path, total_steps=20)
    logger.resume(5)
    logger.train(10, STEP, seconds=2.0)
    logger.close()
    drawn = capsys.readouterr().err
    assert "10/20 steps, loss 2.5000, 20 tokens/s, ETA 00:20" in drawn
    assert "50%" in drawn


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("cpu", None),
        ("TPU v3", None),
    ],
)
def test_peak_flops(kind, peak):
    class Device:
        device_kind = kind

    assert metric_logger.peak_flops(Device()) == peak


def test_flops_by_counting_products():
    """Every matrix product of the model written out as (rows, inner, columns)."""
    B, S, T = 2, 7, 3
    config = T5Config(
        d_model=5, d_ff=11, num_heads=3, head_dim=4, num_encoder_layers=2, num_decoder_layers=1, vocab_size=13
    )
    D, F, HK, V = 5, 11, 12, 13

    def attention(queries: int, keys: int) -> list:
        return [
            (queries, D, HK),
            (keys, D, HK),
            (keys, D, HK),
            (queries, HK, keys),
            (queries, keys, HK),
            (queries, HK, D),
        ]

    def mlp(tokens: int) -> list:
        return [(tokens, D, F), (tokens, D, F), (tokens, F, D)]

    products = 2 * [*attention(S, S), *mlp(S)] + [*attention(T, T), *attention(T, S), *mlp(T), (T, D, V)]
    expected = 3 * B * sum(2 * m * k * n for m, k, n in products)
    assert T5Model(config).flops(B, {"inputs": S, "targets": T}) == expected
    assert T5Model(config).flops(B, {"inputs": T, "targets": S}) != expected


def test_plot(tmp_path):
    logger = metric_logger.MetricLogger(tmp_path, total_steps=60)
    for step in range(1, 61):
        logger.train(step, STEP | {"cross_ent_loss": 9 / step + 1}, seconds=0.1)
    logger.evaluation(30, {"glue_cola_v002": {"loss": 2.0, "accuracy": 0.5}, "squad": {"f1": 1.0}})
    logger.close()
    path = metric_logger.plot_losses(tmp_path, {"unigram entropy": 6.5})
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_losses_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl does not exist"):
        metric_logger.plot_losses(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "validation", "task": "squad", "f1": 1.0}\n')
    with pytest.raises(ValueError, match="no loss to plot"):
        metric_logger.plot_losses(tmp_path)


def test_smoothing_is_centred_and_keeps_length():
    ramp = np.arange(200.0)
    np.testing.assert_allclose(metric_logger._smoothed(list(ramp))[4:-4], ramp[4:-4])
    np.testing.assert_array_equal(metric_logger._smoothed([3.0, 1.0]), [3.0, 1.0])


def test_setup_logging_is_one_line_and_quiets_others(capsys, monkeypatch):
    names = (None, "absl", "t5x_lite", "tasks", "run", "__main__")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    try:
        metric_logger.setup_logging()
        for name in ("t5x_lite", "absl", "some.library"):
            logging.getLogger(name).info("info of %s", name)
            logging.getLogger(name).warning("warning of %s", name)
        said = capsys.readouterr().err.splitlines()
    finally:
        for logger, (level, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.handlers[:] = handlers
    assert [line.split(" ", 1)[1] for line in said] == [
        "info of t5x_lite",
        "warning of t5x_lite",
        "warning of absl",
        "warning of some.library",
    ]
