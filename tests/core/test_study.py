"""`make study`: its runs are ones that run.py takes, and its table says what their metrics say."""

import csv
import json
import logging

import gin
import pytest

import run
from benchmarks import study
from t5x_lite.machine import Machine


@pytest.fixture(autouse=True)
def _same_root_logger():
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers


def test_every_run_is_one_that_the_command_takes(tmp_path):
    experiments = [*study.experiments(tmp_path, 0), *study.experiments(tmp_path, 1)]
    names = [experiment.name for experiment in experiments]
    assert len(set(names)) == len(names) and names[0] == "pretrain" and names.count("pretrain") == 1
    trained = {}
    for experiment in experiments:
        gin.clear_config()
        options = run.parse_flags(["run.py", *study.flags(experiment, tmp_path)])
        found = run.configure(options.gin_file, options.gin_bindings, options.gin_search_paths)
        assert found.model_dir == str(tmp_path / experiment.name)
        if experiment.name != "pretrain":
            assert found.random_seed == int(experiment.name[-1])
            pretrained = None if "random" in experiment.name else str(tmp_path / "pretrain")
            assert found.initial_checkpoint_path == pretrained
        machine = Machine(found, devices=None)
        trained[experiment.name] = found.optimizer.trainable.count(machine.abstract.params)
    assert trained["full-0"] == trained["equal-0"] == 16_094_976
    assert trained["bias_norm-0"] < trained["lora-0"] < trained["adapters-0"] < trained["frozen_encoder-0"]


def test_the_table_has_the_last_and_the_best_score_of_each_task(tmp_path):
    for name, finished in (("full-0", True), ("lora-0", False)):
        (tmp_path / name).mkdir()
        rows = [
            {"step": 1, "split": "train", "loss": 2.0, "trainable_params": 123.0},
            {"step": 5, "split": "validation", "task": "glue_mrpc_v002", "loss": 1.0, "f1": 80.0, "accuracy": 70.0},
            {"step": 9, "split": "validation", "task": "glue_mrpc_v002", "loss": 1.0, "f1": 70.0, "accuracy": 64.0},
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished:
            (tmp_path / name / "done").touch()
    study.write_tables(tmp_path, {"majority": {"glue_mrpc_v002": 74.75, "glue_rte_v002": 52.7}})
    with (tmp_path / "study.csv").open() as file:
        head, majority, full = csv.reader(file)
    assert head[2:] == ["glue_mrpc_v002/last", "glue_mrpc_v002/best", "glue_rte_v002/last", "glue_rte_v002/best"]
    assert majority == ["majority", "", "74.75", "74.75", "52.7", "52.7"]
    assert full == ["full-0", "123", "67.0", "75.0", "", ""]
    assert "| full-0 | 123 | 67.0 (75.0) |  |" in (tmp_path / "study.md").read_text()
