"""The modes of the command, end to end, on files of one's own."""

import json
import logging
import pathlib
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import seqio
import torture

from t5x_lite.checkpoint import saving
from t5x_lite.cli import main as run
from t5x_lite.metrics import metric_logger
from t5x_lite.training import monitors

LINES = [{"inputs": f"reverse: {word}", "targets": word[::-1]} for word in "one two three four five six seven".split()]

# All sizes differ; 359 byte ids are padded to 384.
MODEL = """
T5Config:
    d_model = 16
    d_ff = 24
    num_heads = 2
    head_dim = 6
    num_encoder_layers = 1
    num_decoder_layers = 2
    vocab_size = 384

VOCABULARY = "bytes"
TASK_FEATURE_LENGTHS = {"inputs": 20, "targets": 9}
BATCH_SIZE = 8
DTYPE = "float32"
DROPOUT_RATE = 0.1
SCHEDULE = @optim.constant()
LEARNING_RATE = 0.01
WARMUP_STEPS = 0
EVAL_PERIOD = 3
CHECKPOINT_PERIOD = 3
LOG_PERIOD = 1
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, bytes_vocabulary):
    """Runs the command in a folder with `mine.gin` and files of one's own; gives what it prints."""
    monkeypatch.chdir(tmp_path)
    handlers = logging.getLogger().handlers[:]
    rows = "".join(json.dumps(line) + "\n" for line in LINES)
    for name in ("train.jsonl", "valid.jsonl"):
        pathlib.Path(name).write_text(rows)
    files = "TRAIN_FILES = 'train.jsonl'\nEVAL_FILES = 'valid.jsonl'\n"
    pathlib.Path("mine.gin").write_text(MODEL + files)

    def execute(*arguments: str, code: int = 0) -> str:
        assert run.main(["run.py", "--gin_file=mine.gin", *arguments]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    yield execute
    logging.getLogger().handlers[:] = handlers


def records(model_dir: str, split: str) -> list[dict]:
    lines = pathlib.Path(model_dir, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def test_inspect_shows_a_batch_as_text(command):
    said = command("--mode=inspect")
    assert "reverse: seven" in said
    assert "packing efficiency" in said


def test_dry_run_builds_all_and_writes_nothing(command):
    before = sorted(pathlib.Path().iterdir())
    said = command("--dry_run", "--gin.TRAIN_STEPS=5")
    for part in ("parameters", "data=8, fsdp=1, tensor=1", "encoder_input_tokens [8, 20]", "100.000% files"):
        assert part in said
    assert sorted(pathlib.Path().iterdir()) == before


def test_unknown_names_are_refused_with_the_nearest(command):
    said = command("--gin.TRAIN_STEPS=5", "--gin.TRAIN_FILES=None", "--gin.EVAL_FILES=None",
                   "--gin.MIXTURE_OR_TASK_NAME='glue_mrcp_v002'", code=2)  # fmt: skip
    assert "glue_mrcp_v002" in said
    assert "glue_mrpc_v002" in said
    said = command("--gin.TRAIN_STEPS=5", "--gin.MIXTURE_OR_TASK_MODULE='absent.tasks'", code=2)
    assert "'absent'" in said
    said = command("--gin.TRAIN_STEPS=5", "--gin.TRAIN_FILES='absent*.jsonl'", code=2)
    assert "absent*.jsonl" in said
    said = command("--gin.TRAIN_STEPS=5", "--gin.T5Config.vocab_size=256", code=2)
    assert "256" in said
    assert "384" in said


def test_what_the_users_tasks_raise_keeps_its_traceback(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tasks_of_mine.py").write_text("raise ValueError('mine')\n")
    with pytest.raises(ValueError, match="mine"):
        command("--gin.TRAIN_STEPS=5", "--gin.MIXTURE_OR_TASK_MODULE='tasks_of_mine'")


@pytest.mark.slow
def test_train_stop_resume_evaluate_infer_and_score(command):
    said = command("--gin.TRAIN_STEPS=6", "--gin.MODEL_DIR='whole'")
    assert "token_accuracy" in said
    assert pathlib.Path("whole/loss.png").stat().st_size > 0
    assert "TRAIN_STEPS = 6" in pathlib.Path("whole/config.gin").read_text()

    # Stopped after step 3 and gone on, with the same losses to the bit; the data position counts, not only the state.
    command("--gin.TRAIN_STEPS=3", "--gin.MODEL_DIR='parts'")
    command("--gin.TRAIN_STEPS=6", "--gin.MODEL_DIR='parts'")
    losses = {name: {r["step"]: r["loss"] for r in records(name, "train")} for name in ("whole", "parts")}
    assert losses["parts"] == losses["whole"]
    assert list(losses["whole"]) == [1, 2, 3, 4, 5, 6]
    assert len(set(losses["whole"].values())) == 6

    said = command("--gin.TRAIN_STEPS=9", "--gin.MODEL_DIR='parts'", "--gin.T5Config.relative_max_distance=64",
                   "--dry_run", code=2)  # fmt: skip
    assert "T5Config.relative_max_distance: was 128, is 64" in said

    # Evaluated during training and afterwards, from the file that the run has left: the same scores.
    (during,) = [r for r in records("whole", "validation") if r["step"] == 6]
    said = command("--gin_file=whole/config.gin", "--mode=eval")
    assert records("whole", "validation")[-1] == during
    assert "files" in said
    predictions = pathlib.Path("whole/predictions/files-6.jsonl").read_text().splitlines()
    assert [json.loads(line)["targets"] for line in predictions] == [line["targets"] for line in LINES]
    page = pathlib.Path("whole/report.html").read_text()
    assert "<h1>whole</h1>" in page and f"{len(LINES)} predictions at step 6" in page and "for a browser" in said

    # Nothing is left to train, and the scores are said again.
    assert "token_accuracy" in command("--gin_file=whole/config.gin")

    pathlib.Path("questions.txt").write_text("reverse: six\n\nreverse: ten\n")
    command("--gin_file=whole/config.gin", "--mode=infer", "--gin.INFER_INPUT='questions.txt'")
    answers = [json.loads(line) for line in pathlib.Path("whole/infer/questions-6.jsonl").read_text().splitlines()]
    assert [answer["inputs"] for answer in answers] == ["reverse: six", "", "reverse: ten"]

    command("--gin_file=whole/config.gin", "--mode=infer", "--gin.INFER_INPUT='questions.txt'",
            "--gin.INFER_OUTPUT='three.jsonl'", "--gin.DECODE_METHOD='beam'", "--gin.NUM_DECODES=3")  # fmt: skip
    for line in pathlib.Path("three.jsonl").read_text().splitlines():
        assert len(json.loads(line)["predictions"]) == len(json.loads(line)["scores"]) in (1, 2, 3)
    said = command("--gin_file=whole/config.gin", "--mode=infer", "--gin.NUM_DECODES=2", code=2)
    assert "NUM_DECODES 2: greedy gives 1 to 1" in said
    command("--gin_file=whole/config.gin", "--mode=score", "--gin.INFER_OUTPUT='scores.jsonl'")
    scores = [json.loads(line) for line in pathlib.Path("scores.jsonl").read_text().splitlines()]
    assert [score["targets"] for score in scores] == [line["targets"] for line in LINES]
    tokens = sum(len(line["targets"]) + 1 for line in LINES)
    assert -sum(score["score"] for score in scores) / tokens == pytest.approx(during["loss"], rel=1e-5)

    # From these parameters, with a fresh optimizer and steps that count from 0.
    command("--gin.TRAIN_STEPS=3", "--gin.INITIAL_CHECKPOINT_PATH='whole'", "--gin.MODEL_DIR='tuned'")
    tuned = {r["step"]: r["loss"] for r in records("tuned", "train")}
    assert list(tuned) == [1, 2, 3]
    assert tuned[1] < losses["whole"][1]


def steps(model_dir: str) -> list[int]:
    return [record["step"] for record in records(model_dir, "train")]


@pytest.mark.slow
def test_a_resumed_run_on_other_data_is_an_error_or_begins_the_data_anew(command):
    three = ("--gin.TRAIN_STEPS=3", "--gin.MODEL_DIR='m'", "--gin.EVAL_PERIOD=0")
    six = ("--gin.TRAIN_STEPS=6", *three[1:])
    command(*three)
    pathlib.Path("other.jsonl").write_text(pathlib.Path("train.jsonl").read_text().replace("one", "two"))
    differences = {
        "--gin.TRAIN_FILES='other.jsonl'": r"files of files \(train\): was train\.jsonl, \d+ bytes.* is other\.jsonl",
        "--gin.EVAL_FILES='other.jsonl'": r"files of files \(validation\): was valid\.jsonl",
        "--gin.FILES_INPUTS_TEMPLATE='x {inputs}'": r"FILES_INPUTS_TEMPLATE: was '\{inputs\}', is 'x \{inputs\}'",
        "--gin.BATCH_SIZE=16": "BATCH_SIZE: was 8, is 16",
    }
    error = command(*six, *differences, code=2)
    assert all(re.search(message, error) for message in differences.values()), error
    error = command(*six, "--gin.T5Config.mlp_activations=('silu', 'linear')", code=2)
    assert re.search(r"T5Config\.mlp_activations: was .*gelu.* is .*silu", error)
    rows = pathlib.Path("train.jsonl").read_text()
    pathlib.Path("train.jsonl").write_text(rows.replace("seven", "eight"))
    assert "md5" in command(*six, code=2), "a file that was edited, of the same size"
    assert steps("m") == [1, 2, 3]
    command(*six, "--gin.RESUME_WITH_OTHER_DATA=True")
    assert steps("m") == [1, 2, 3, 4, 5, 6]
    assert records("m", "data") == [{"step": 3, "split": "data", "began_anew": 1.0}]
    command("--gin.TRAIN_STEPS=7", *three[1:])  # the new data is now the run's own
    assert steps("m") == [1, 2, 3, 4, 5, 6, 7]


PYTHON_TASK = """
import seqio, tensorflow as tf
def read(split, shuffle_files, seed=None):
    rows = [{"inputs": f"say {i}", "targets": str(i)} for i in range(20)]
    signature = {k: tf.TensorSpec((), tf.string) for k in rows[0]}
    return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=signature)
seqio.TaskRegistry.add(
    "from_python",
    source=seqio.FunctionDataSource(read, ["train", "validation"], num_input_examples={"train": 20, "validation": 20}),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    output_features={k: seqio.Feature(seqio.ByteVocabulary()) for k in ("inputs", "targets")},
)
seqio.TaskRegistry.add("glue_cola_v002", source=None, preprocessors=[], output_features={})
"""


@pytest.mark.slow
def test_data_made_by_python_trains_and_says_that_its_position_is_lost(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    messages: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: messages.append(record.getMessage()))
    logging.getLogger("t5x_lite").addHandler(handler)
    (tmp_path / "python_task.py").write_text(PYTHON_TASK)
    flags = ("--gin.TRAIN_FILES=None", "--gin.EVAL_FILES=None", "--gin.MODEL_DIR='m'", "--gin.EVAL_PERIOD=0",
             "--gin.MIXTURE_OR_TASK_MODULE='python_task'", "--gin.MIXTURE_OR_TASK_NAME='from_python'")  # fmt: skip
    try:
        command(*flags, "--gin.TRAIN_STEPS=3")
        command(*flags, "--gin.TRAIN_STEPS=6")
    finally:
        logging.getLogger("t5x_lite").removeHandler(handler)
        seqio.TaskRegistry.remove("from_python")
    logged = "\n".join(messages)
    assert "position in this data cannot be saved: it uses PyFunc" in logged
    assert "glue_cola_v002 again: the definitions of t5x_lite are kept" in logged
    assert "The data begins anew" in logged
    assert steps("m") == [1, 2, 3, 4, 5, 6] and len(records("m", "data")) == 1


@pytest.mark.slow
def test_a_metric_that_nobody_measures_is_said_before_the_first_step(command):
    for metric, cure in (("files/exactmatch", "Did you mean files/exact_match"), ("mine/f1", "files/f1")):
        said = command("--gin.TRAIN_STEPS=3", f"--gin.KEEP_BEST_METRIC='{metric}'", "--gin.MODEL_DIR='m'", code=2)
        assert f"KEEP_BEST_METRIC = '{metric}' is not measured." in said and cure in said
    assert not pathlib.Path("m/metrics.jsonl").exists()


def test_a_split_that_does_not_exist_is_said_before_the_first_step(command):
    said = command("--gin.TRAIN_STEPS=3", "--gin.EVAL_SPLIT='validaton'", code=2)
    assert "EVAL_SPLIT = 'validaton': files has no such split. Did you mean validation?" in said


@pytest.mark.slow
def test_a_moved_model_dir_is_enough_to_infer(command, golden):
    model = pathlib.Path("own.model")
    model.write_bytes(golden("spm/unigram.model").read_bytes())
    command("--gin.TRAIN_STEPS=3", "--gin.MODEL_DIR='m'", "--gin.VOCABULARY='own.model'")
    pathlib.Path("m").rename("moved")
    for name in ("own.model", "train.jsonl", "valid.jsonl"):
        pathlib.Path(name).unlink()
    pathlib.Path("ask.csv").write_text("inputs\nreverse: one\n")
    infer = ("--mode=infer", "--gin_file=moved/config.gin", "--gin.INFER_INPUT='ask.csv'")
    command(*infer, "--gin.INFER_OUTPUT='out.jsonl'")
    assert json.loads(pathlib.Path("out.jsonl").read_text())["inputs"] == "reverse: one"


@pytest.mark.slow
def test_told_to_stop_when_an_evaluation_is_due_it_is_done_by_the_run_that_goes_on(command, monkeypatch):
    flushed, flush = [], metric_logger.MetricLogger.flush
    monkeypatch.setattr(
        metric_logger.MetricLogger,
        "flush",
        lambda self: flushed.append(threading.current_thread().name) or flush(self),
    )
    heard, close = [], saving.Checkpointer.close
    monkeypatch.setattr(
        saving.Checkpointer, "close", lambda self: heard.append(signal.getsignal(signal.SIGTERM)) or close(self)
    )
    command("--gin.TRAIN_STEPS=5", "--gin.MODEL_DIR='whole'")
    assert len([name for name in flushed if name != "MainThread"]) == 2, "before each checkpoint counts"
    assert callable(heard[-1]), "SIGTERM would cut the last save"
    with monkeypatch.context() as told:
        told.setattr(monitors.PreemptionSignal, "__call__", lambda self, step: step == 3)
        with pytest.raises(SystemExit) as stopped:
            command("--gin.TRAIN_STEPS=5", "--gin.MODEL_DIR='parts'")
    assert stopped.value.code == monitors.PREEMPTED
    assert [r["step"] for r in records("parts", "train")] == [1, 2, 3] and not records("parts", "validation")
    command("--gin.TRAIN_STEPS=5", "--gin.MODEL_DIR='parts'")
    assert [r["step"] for r in records("parts", "validation")] == [3, 5]
    curves = [torture.curve(pathlib.Path(name)) for name in ("whole", "parts")]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_a_full_disk_ends_training_in_one_line_and_loses_nothing(command):
    """By a limit on the size of files, which stands for a full disk: the kernel refuses in the middle of them."""
    often = "--gin.CHECKPOINT_PERIOD=1"
    command(often, "--gin.TRAIN_STEPS=7", "--gin.MODEL_DIR='whole'")
    command(often, "--gin.TRAIN_STEPS=3", "--gin.MODEL_DIR='parts'")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, says in (
        (1_000, r"File too large\. The checkpoints in .*'parts' are as they"),
        (9_000, "3 saves in a row"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            said = command(often, "--gin.TRAIN_STEPS=7", "--gin.MODEL_DIR='parts'", code=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert re.search(says, said) and "Traceback" not in said
        assert sorted(path.name for path in pathlib.Path("parts/checkpoints").iterdir()) == ["1", "2", "3"]
    command(often, "--gin.TRAIN_STEPS=7", "--gin.MODEL_DIR='parts'")
    whole, parts = ([r for r in torture.curve(pathlib.Path(name)) if r["step"] > 3] for name in ("whole", "parts"))
    assert parts == whole and len(parts) == 6


@pytest.mark.slow
def test_inference_that_is_killed_goes_on_to_the_same_bytes(command):
    command("--gin.TRAIN_STEPS=1", "--gin.MODEL_DIR='m'")
    pathlib.Path("in.txt").write_text("".join(f"reverse: {i:x}{'-' * (i % 11)}\n" for i in range(3000)))
    options = [
        *("--gin_file=m/config.gin", "--mode=infer", "--gin.INFER_INPUT='in.txt'", "--gin.DECODE_METHOD='sample'"),
        *("--gin.NUM_DECODES=2", "--gin.EVAL_BATCH_SIZE=16"),
    ]
    command(*options, "--gin.INFER_OUTPUT='whole.jsonl'")
    repository = pathlib.Path(run.__file__).parents[2]
    arguments = [sys.executable, repository / "run.py", *options, "--gin.INFER_OUTPUT='parts.jsonl'"]
    partial, kept = pathlib.Path("parts.jsonl.partial"), 0
    for _ in range(2):
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
        while process.poll() is None and (not partial.exists() or partial.stat().st_size <= kept):
            time.sleep(0.01)
        process.kill()
        said = process.communicate()[1].decode()
        assert process.returncode == -signal.SIGKILL, said
        assert not pathlib.Path("parts.jsonl").exists()
        assert ("resuming after its first" in said) == (kept > 0)
        kept = partial.stat().st_size
    command(*options, "--gin.INFER_OUTPUT='parts.jsonl'")
    assert pathlib.Path("parts.jsonl").read_bytes() == pathlib.Path("whole.jsonl").read_bytes()
    assert pathlib.Path("whole.jsonl").read_bytes().count(b"\n") == 3000
    assert not partial.exists()
