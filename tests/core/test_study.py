"""`make study`: its runs are ones that run.py takes, and its table says what their metrics say."""

import csv
import json
import os
import threading

import gin
import jax
import pytest
from matplotlib import pyplot

from benchmarks import study
from t5x_lite.cli import main as run
from t5x_lite.cli import task_setup

pytestmark = pytest.mark.usefixtures("same_root_logger")


@pytest.mark.slow
def test_every_run_is_one_that_the_command_takes(tmp_path):
    experiments = [*study.pretraining(tmp_path), *study.finetuning(tmp_path, 0), *study.finetuning(tmp_path, 1)]
    names = [experiment.name for experiment in experiments]
    assert len(set(names)) == len(names) and names[:2] == ["short_rows", "pretrain"]
    trained = {}
    for experiment in experiments:
        gin.clear_config()
        options = run.parse_flags(["run.py", *study.flags(experiment, tmp_path)])
        found = run.configure(options.gin_file, options.gin_bindings, options.gin_search_paths)
        assert found.model_dir == str(tmp_path / experiment.name)
        if experiment.name not in names[:2]:
            assert found.random_seed == int(experiment.name[-1])
        none = experiment.name == "short_rows" or "random" in experiment.name
        start = None if none else str(tmp_path / ("short_rows" if experiment.name == "pretrain" else "pretrain"))
        assert found.initial_checkpoint_path == start
        partitioner = task_setup.partitioner(found, devices=jax.devices()[:1])
        trained[experiment.name] = found.optimizer.trainable.count(partitioner.abstract.params)
    assert trained["full-0"] == trained["equal-0"] == 11_540_224
    assert trained["bias_norm-0"] < trained["lora-0"] < trained["adapters-0"] < trained["frozen_encoder-0"]


def test_the_table_has_the_last_and_the_best_score_of_each_task(tmp_path):
    def row(step, task, f1, accuracy):
        return {"step": step, "split": "validation", "task": task, "loss": 1.0, "f1": f1, "accuracy": accuracy}

    for name, finished in (("full-0", True), ("lora-0", False), ("full-1", True)):
        (tmp_path / name).mkdir()
        rows = [
            {"step": 1, "split": "train", "loss": 2.0} | ({"trainable_params": 123.0} if name == "full-0" else {}),
            row(5, "glue_mrpc_v002", 80.0, 70.0),
            row(9, "glue_mrpc_v002", 70.0, 64.0),
            *([row(5, "glue_rte_v002", 50.0, 51.0), row(9, "glue_rte_v002", 60.0, 50.0)] if name == "full-1" else []),
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished:
            (tmp_path / name / "done").touch()
    study.write_tables(tmp_path, {"majority": {"glue_mrpc_v002": 74.5, "glue_rte_v002": 52.5}})
    with (tmp_path / "study.csv").open() as file:
        head, *found = csv.reader(file)
    columns = [
        f"{task}/{which}" for task in ("glue_mrpc_v002", "glue_rte_v002", "average") for which in ("last", "best")
    ]
    assert head == ["run", "trained", *columns]
    assert found == [
        ["majority", "", "74.5", "74.5", "52.5", "52.5", "63.5", "63.5"],
        ["full-0", "123", "67.0", "75.0", "", "", "", ""],
        ["full-1", "all", "67.0", "75.0", "55.0", "55.0", "61.0", "62.75"],
    ]
    assert "| full-0 | 123 | 67.0 (75.0) |  |  |" in (tmp_path / "study.md").read_text()


def test_the_picture_has_a_panel_for_each_task_and_a_line_for_each_seed(tmp_path, monkeypatch):
    for name, scores in (("full-0", [60.0, 70.0]), ("full-1", [61.0, 71.0]), ("equal-0", [55.0])):
        (tmp_path / name).mkdir()
        rows = [
            {"step": 3 * (n + 1), "split": "validation", "task": "glue_rte_v002", "loss": 1.0, "accuracy": score}
            for n, score in enumerate(scores)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    baselines = {"glue_rte_v002": 52.5, "glue_mrpc_v002": 74.5}
    study.draw(tmp_path, {"majority": baselines, "bag_of_words": baselines})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    rte, mrpc = figure.axes
    assert (rte.get_title(), mrpc.get_title()) == ("glue_rte_v002", "glue_mrpc_v002")
    one, other, equal = rte.lines[2:]
    assert one.get_color() == other.get_color() != equal.get_color()
    assert [[*map(tuple, line.get_xydata())] for line in (one, other, equal)] == [
        [(3, 60), (6, 70)],
        [(3, 61), (6, 71)],
        [(3, 55)],
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["majority", "bag of words", "proportional", "equal"]


def test_runs_side_by_side_have_cores_of_their_own(tmp_path, monkeypatch):
    together = threading.Barrier(2, timeout=60)
    cores = {}

    def run(experiment, out):
        together.wait()
        cores[experiment.name] = os.sched_getaffinity(0)
        return experiment.name

    monkeypatch.setattr(study, "run", run)
    here = os.sched_getaffinity(0)
    four = [study.Experiment(name, (), {}) for name in "abcd"]
    assert sorted(study.side_by_side(four, tmp_path, jobs=2)) == list("abcd")
    assert os.sched_getaffinity(0) == here
    if len(here) > 1:
        one, other = set(map(frozenset, cores.values()))
        assert one | other == here and not one & other


@pytest.mark.slow
def test_a_run_that_fails_is_said_with_the_end_of_its_log_and_not_taken_for_done(tmp_path):
    wrong = study.Experiment("wrong", ("study/finetune.gin",), {"DROPOUT_RATTE": 1})
    with pytest.raises(RuntimeError, match=r"(?s)wrong ended with 2; .*wrong\.log ends.*DROPOUT_RATTE"):
        list(study.side_by_side([wrong], tmp_path, jobs=1))
    assert not (tmp_path / "wrong").exists()
