"""`runs/speedrun.sh`: what is measured is text, and a recipe is several runs with one clock."""

import json
import math
import subprocess
import sys

import pytest

from benchmarks import speedrun, study

TEXTS = ["\n".join(f"w{i}ö" for i in range(400)), "too short to be a row", " ".join("abc" for _ in range(10))]


def test_rows_are_text_of_which_each_word_is_on_one_side():
    rows = list(speedrun.rows(TEXTS))
    assert len(rows) == 4 and all(len(row["inputs"]) <= 1100 for row in rows)
    words, cut_out = [], 0
    for row in rows:
        inputs, targets = (row[side].split() for side in ("inputs", "targets"))
        sentinels = [word for word in targets if word.startswith("<extra_id_")]
        assert sentinels == [f"<extra_id_{i}>" for i in range(len(sentinels))]
        spans = " ".join(targets).split("<extra_id_")[1:-1]  # after the last one there is nothing
        spans = [span.partition("> ")[2].strip() for span in spans]
        assert row["bytes"] == sum(len(span.encode()) for span in spans) and all(spans)
        cut_out += sum(len(span.split()) for span in spans)
        for word in inputs:
            number = word.removeprefix("<extra_id_").removesuffix(">")
            words += spans[int(number)].split() if word != number else [word]
    assert words == [*TEXTS[0].split(), *TEXTS[2].split()]
    assert cut_out == pytest.approx(0.15 * 410, abs=3)
    assert list(speedrun.rows(TEXTS)) == rows


def test_bits_per_byte_do_not_depend_on_the_tokens():
    few, many = (speedrun.costs([-8.0 * math.log(2), -math.log(2)], 6, tokens) for tokens in (3, 9))
    assert few["bits_per_byte"] == many["bits_per_byte"] == pytest.approx(1.5)
    assert few["nats_per_token"] == pytest.approx(3 * many["nats_per_token"]) == pytest.approx(3 * math.log(2))


def test_a_recipe_is_runs_that_start_from_one_another(tmp_path, monkeypatch, capsys):
    calls = []

    def call(flags, log, seconds=None, compiled=None):
        calls.append((flags, seconds))
        return 100.0

    monkeypatch.setenv("T5X_LITE_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(speedrun, "call", call)
    monkeypatch.setattr(study, "prepare", lambda out, pieces: None)
    monkeypatch.setattr(speedrun, "measure", lambda out, model: speedrun.costs([-12.0], 4, 3))
    asked = ["twice", f"--out={tmp_path}", "--pieces=4092", "--minutes=5", "--gin.A=1", "--", "--gin.B=2", "--gin.A=1"]
    assert speedrun.main(asked) == 0
    (first, most), (second, left) = calls
    assert "--gin.A=1" in first and "--gin.B=2" not in first and second.count("--gin.A=1") == 1
    assert "--gin.INITIAL_CHECKPOINT_PATH=None" in first and "--gin.T5Config.vocab_size=4192" in first
    assert f"--gin.INITIAL_CHECKPOINT_PATH={str(tmp_path / 'twice' / '0')!r}" in second
    assert (most, left) == (300, 200)
    assert "| 3.3 | 4.328 | 4.000 |" in capsys.readouterr().out
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["flags"] == ["--gin.A=1", "--", "--gin.B=2", "--gin.A=1"]
    assert speedrun.main(asked) == 0 and len(calls) == 2


def test_a_run_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    started, real = [], subprocess.Popen

    def popen(command, **options):
        started.append(real([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[0]

    monkeypatch.setattr(speedrun.subprocess, "Popen", popen)
    with pytest.raises(RuntimeError, match="more than its time"):
        speedrun.call([], tmp_path / "0.log", seconds=0.2)
    assert started[0].returncode
