"""Runs in a gs:// bucket, by real processes against gcp-storage-emulator: tests/gcs_emulator.py."""

import json
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import forks
import gcs_emulator
import pytest
import torture_faults
from torture import MODEL, WALL_TIMES

REPO = pathlib.Path(__file__).resolve().parents[2]
STEPS = 12
CONFIG = f"""{MODEL}VOCABULARY = "bytes"
TRAIN_FILES = "gs://bucket/data/*.jsonl"
EVAL_FILES = "gs://bucket/eval.jsonl"
TASK_FEATURE_LENGTHS = {{"inputs": 48, "targets": 24}}
BATCH_SIZE = 4
TRAIN_STEPS = {STEPS}
LOG_PERIOD = 1
EVAL_PERIOD = {STEPS}
CHECKPOINT_PERIOD = 3
KEEP_LAST = 2
DROPOUT_RATE = 0.1
DTYPE = "float32"
WARMUP_STEPS = 10
LEARNING_RATE = 0.1
"""
pytestmark = pytest.mark.slow


def rows(first: int, end: int) -> str:
    return "".join(
        json.dumps({"inputs": f"double {n} please", "targets": str(2 * n)}) + "\n" for n in range(first, end)
    )


class Bucket(gcs_emulator.Emulator):
    """The emulator, with the data of the runs in it."""

    folder: pathlib.Path

    def start(self, *command: str) -> subprocess.Popen:
        environment = os.environ | self.environment | forks.devices(1)
        environment |= {
            "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return subprocess.Popen(
            [*forks.python(), *command],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, run: str, fault: str = "never", count: int = 1, *flags: str) -> subprocess.Popen:
        """Start a run in gs://bucket/RUN, which kills itself at a point of torture_faults."""
        flags = ("--gin_file=bucket.gin", f"--gin.MODEL_DIR='gs://bucket/{run}'", *flags)
        return self.start(torture_faults.__file__, fault, str(count), *flags)

    def steps(self, run: str) -> list[int]:
        """The finished checkpoints."""
        prefix = f"{run}/checkpoints/"
        finished = [
            name for name in self.names(prefix) if name.count("/") == 1 and name.endswith("/commit_success.txt")
        ]
        return sorted(int(name.split("/")[0]) for name in finished)

    def curve(self, run: str) -> list[dict[str, Any]]:
        records = map(json.loads, self.read(f"{run}/metrics.jsonl").decode().splitlines())
        return [{key: value for key, value in record.items() if key not in WALL_TIMES} for record in records]


def ended(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Wait for a process, and return what it wrote."""
    try:
        out, log = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == code, log
    return out, log


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[Bucket]:
    folder = tmp_path_factory.mktemp("bucket")
    (folder / "bucket.gin").write_text(CONFIG)
    with gcs_emulator.running(folder, Bucket) as emulator:
        emulator.folder = folder
        emulator.write("data/1.jsonl", rows(0, 40))
        emulator.write("data/2.jsonl", rows(40, 90))
        emulator.write("eval.jsonl", rows(90, 97))
        yield emulator


@pytest.fixture(scope="module")
def whole(bucket) -> tuple[str, str]:
    """What a run writes that is left alone."""
    return ended(bucket.train("whole"))


def test_a_run_leaves_all_of_its_files_in_the_bucket(bucket, whole):
    out, log = whole
    assert bucket.steps("whole") == [9, STEPS]
    names = set(bucket.names("whole/"))
    assert {"config.gin", "metrics.jsonl", "loss.png", "report.html", "tokenizer_config.json"} <= names
    assert any(name.startswith("events.out.tfevents.") for name in names)
    assert {f"checkpoints/{STEPS}/{part}" for part in ("checksums.json", "data/stream.json", "info/metadata")} <= names
    assert len(bucket.read(f"whole/predictions/files-{STEPS}.jsonl").splitlines()) == 7
    train = [record for record in bucket.curve("whole") if record["split"] == "train"]
    assert [record["step"] for record in train] == list(range(1, STEPS + 1)) and train[0]["loss"] != train[-1]["loss"]
    assert f"--gin_file=gs://bucket/whole/config.gin --gin.TRAIN_STEPS={2 * STEPS}" in out, "not of a local copy"
    assert "/t5x_lite-" not in out + log


def test_killed_and_damaged_run_resumes_exactly(bucket, whole):
    ended(bucket.train("killed", "save written", 3), -signal.SIGKILL)
    assert bucket.steps("killed") == [3, 6]
    name = next(name for name in bucket.names() if name.startswith("killed/checkpoints/6/params/ocdbt.process_0/d/"))
    content = bytearray(bucket.read(name))
    content[-1] ^= 1
    bucket.write(name, bytes(content))
    _, log = ended(bucket.train("killed"))
    assert "gs://bucket/killed/checkpoints/6 is damaged" in log and "Resuming at step 3" in log
    assert bucket.curve("killed") == bucket.curve("whole")
    assert bucket.steps("killed") == [9, STEPS]
    assert "6/checksums.json" in bucket.names("killed/damaged/")
    assert not [name for name in bucket.names("killed/checkpoints/") if not name.startswith(("9/", f"{STEPS}/"))]


@pytest.mark.exhaustive
def test_run_without_rights_ends_in_one_line_and_resumes(bucket, whole):
    flags = ("--gin_file=bucket.gin", "--gin.MODEL_DIR='gs://bucket/barred'")
    process = bucket.start(str(REPO / "run.py"), *flags, "--gin.TRAIN_STEPS=100000", "--gin.EVAL_PERIOD=0")
    while process.poll() is None and not bucket.steps("barred"):
        time.sleep(0.2)
    with bucket.refusing():
        _, log = ended(process, 2)
    *_, last = log.splitlines()
    assert "saves in a row have failed" in last and "gs://bucket/barred/checkpoints" in last and "403" in last, log
    saved = bucket.steps("barred")[-1]
    ended(bucket.train("barred", "never", 1, f"--gin.TRAIN_STEPS={saved + 3}", f"--gin.EVAL_PERIOD={STEPS}"))
    steps = [record["step"] for record in bucket.curve("barred") if record["split"] == "train"]
    assert steps == list(range(1, saved + 4))
    kept = tuple(f"{step}/" for step in bucket.steps("barred"))
    assert all(name.startswith(kept) for name in bucket.names("barred/checkpoints/")), "failed saves leave nothing"


MODES = """
import sys
from t5x_lite import convert, load
from t5x_lite.cli import main

run = ["run.py", "--gin_file=gs://bucket/whole/config.gin"]
assert main.main([*run, "--mode=eval"]) == 0
assert main.main([*run, "--mode=infer", "--gin.INFER_INPUT='gs://bucket/questions.jsonl'"]) == 0
start = ["--gin.INITIAL_CHECKPOINT_PATH='gs://bucket/whole'", "--gin.VOCABULARY=None", "--gin.MODEL_DIR='next'"]
assert main.main([*run, "--mode=score", "--gin.INFER_INPUT='gs://bucket/questions.jsonl'", *start]) == 0
print("loaded:", load("gs://bucket/whole").predict(["double 4 please"]))
print("loaded:", load("gs://bucket/whole/checkpoints/9").score(["double 4 please"], ["8"]))
convert.convert("gs://bucket/whole", "converted", "huggingface")
convert.convert("gs://bucket/whole/checkpoints/9", "own", "t5x_lite")
print("loaded:", load("converted").predict(["double 4 please"]))
"""


def test_modes_load_and_conversion_read_the_bucket(bucket, whole):
    bucket.write("questions.jsonl", rows(20, 25))
    before = bucket.curve("whole")
    out, log = ended(bucket.start("-c", MODES))
    scores = bucket.curve("whole")[len(before) :]
    assert scores == before[-len(scores) :] and scores[0]["split"] == "validation"
    assert bucket.read(f"whole/infer/questions-{STEPS}.jsonl").count(b'"prediction"') == 5
    assert (bucket.folder / "next" / "score" / f"questions-{STEPS}.jsonl").read_text().count('"score"') == 5
    assert "the run uses bytes, which lies with the checkpoint" in log
    ours, _, theirs = [line for line in out.splitlines() if line.startswith("loaded:")]
    assert ours == theirs
    assert {"model.safetensors", "tokenizer_config.json"} <= set(os.listdir(bucket.folder / "converted"))
    assert json.loads((bucket.folder / "own" / "info" / "metadata").read_text())["step"] == 9


MISTAKES = """
import os
from t5x_lite import storage
from t5x_lite.cli import main
from t5x_lite.convert import __main__ as convert
from t5x_lite.inference import pretrained

def run(*flags):
    assert main.main(["run.py", "--gin_file=bucket.gin", "--gin.MODEL_DIR='gs://bucket/new'", *flags]) == 2

for option in ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "TRAIN_FILES"):
    for place in ("missing", "private"):
        run(f"--gin.{option}='gs://{place}/{option}.jsonl'")
run("--mode=infer", "--gin.INFER_INPUT='gs://bucket/absent.jsonl'", "--gin.INITIAL_CHECKPOINT_PATH='gs://bucket/whole'")
assert main.main(["run.py", "--gin_file=gs://bucket/absent.gin"]) == 2
assert pretrained.main(["gs://private/load"]) == 2
assert convert.main(["gs://bucket/whole", "gs://bucket/converted", "--to=huggingface"]) == 2
os.environ["https_proxy"] = "http://127.0.0.1:1"  # where nobody answers
storage.PATIENCE_SECONDS = 1
run("--gin.MODEL_DIR='gs://bucket/gone'")
"""


def test_mistakes_and_missing_servers_are_said_in_one_line(bucket, whole):
    process, lines = bucket.start("-c", MISTAKES), []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "Still waiting for gs://bucket/gone/checkpoints" in line:
                break
    finally:
        process.kill()
        process.communicate()
    text = "".join(lines)
    assert "Still waiting" in text and "Traceback" not in text, text
    said = [line for line in lines if line.startswith(("run.py: ", "t5x_lite."))]
    expected = [
        "there is no bucket gs://missing: make it",
        "gs://private/MODEL_DIR.jsonl/checkpoints cannot be reached .*403.*login",
        "INITIAL_CHECKPOINT_PATH 'gs://missing/.*' cannot be read: there is no bucket gs://missing",
        "INITIAL_CHECKPOINT_PATH 'gs://private/.*' cannot be read: .*403.*login",
        r"TRAIN_FILES: gs://missing/TRAIN_FILES\.jsonl cannot be reached .*404",
        r"TRAIN_FILES: gs://private/TRAIN_FILES\.jsonl cannot be reached .*403.*login",
        r"INFER_INPUT = 'gs://bucket/absent\.jsonl' does not exist",
        r"no gin file gs://bucket/absent\.gin",
        "gs://private/load cannot be reached .*no access.*login",
        "gs://bucket/converted is not a local folder: .*gcloud storage cp",
    ]
    assert len(said) == len(expected), text
    for line, pattern in zip(said, expected, strict=True):
        assert re.search(pattern, line), (pattern, line)
