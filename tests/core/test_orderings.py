"""`make orderings`: its runs are ones that run.py takes, and its verdicts follow from the seeds' scores."""

import dataclasses
import json
import math

import gin
import pytest
import scipy.stats

from benchmarks import orderings, study
from benchmarks.orderings import PRETRAIN, RANDOM, Job
from benchmarks.transfer import Sample
from t5x_lite.cli import main as run

BUDGET = (20, 30)


def result(loss, accuracy=None, minutes=1.0):
    metrics = {"loss": loss} if accuracy is None else {"loss": loss, "accuracy": accuracy}
    costs = {"input_tokens": 2000.0, "target_tokens": 460.0, "seconds_per_step": 0.5, "minutes": minutes}
    return {"metrics": metrics, **costs}


def test_a_verdict_needs_the_sign_and_the_seeds():
    low, high = Sample((1.0, 1.2, 1.1)), Sample((2.0, 2.3, 2.0))
    apart, error, p, word = orderings.verdict(-1, low, high)
    assert apart == pytest.approx(-1.0) and word == "holds"
    assert error == pytest.approx(math.sqrt((0.01 + 0.03) / 3))  # variances of the seeds
    t = apart / error
    freedom = (0.04 / 3) ** 2 / ((0.01 / 3) ** 2 / 2 + (0.03 / 3) ** 2 / 2)  # Welch's
    assert p == pytest.approx(2 * scipy.stats.t.cdf(t, freedom))
    assert orderings.verdict(1, low, high)[3] == "does not hold"
    assert orderings.verdict(-1, high, low)[3] == "does not hold"
    assert orderings.verdict(-1, low, Sample((0.0, 2.0, 4.0)))[3] == "undecided"
    one_seed = orderings.verdict(-1, Sample((1.0,)), Sample((9.0,)))
    assert math.isnan(one_seed[2]) and one_seed[3] == "undecided"


def test_the_table_is_of_one_budget():
    results = {}
    for seed, noise in enumerate((0.0, 0.1, 0.2)):
        results[Job("span_corruption", PRETRAIN, seed, 20)] = result(5.5 + noise, minutes=2.0)
        results[Job("span_corruption", "squad", seed, 20, 20)] = result(4.0 + noise)
        results[Job(RANDOM, "squad", seed, 0, 20)] = result(6.0 + noise)
        results[Job("span_corruption", "sst2", seed, 20, 30)] = result(0.5, 70.0 + 10 * noise)
        results[Job("span_corruption", "squad", seed, 99, 20)] = result(1.0)  # of a longer pre-training
    lines = orderings.tables(results, BUDGET).splitlines()
    (line,) = (line for line in lines if line.startswith("| pre-trained >> random"))  # SST-2 lacks the other start
    assert line.endswith("| span_corruption 4.1 (3) | random 6.1 (3) | -2.000 ± 0.082 | 0.000 | holds |")
    assert "| span_corruption | 2,000 | 460 | 0.50 | 5.600 | 2.0 | 1.0 | 1.0 |" in lines
    assert "| random |  |  |  |  |  |  | 1.0 |" in lines
    assert lines[-1] == "12 runs, 15 minutes one after the other."


def test_every_start_is_pretrained_before_it_is_finetuned():
    done = set()
    counts = []
    for independent in orderings.jobs([0, 1], *BUDGET):
        for job in independent:
            assert job.task == PRETRAIN or job.start == RANDOM or job.pretrained in done, job
        done |= {job.name for job in independent}
        counts.append(len(independent))
    assert counts == [4, 10, 4, 10] and len(done) == 28


@pytest.mark.usefixtures("same_root_logger")
def test_every_run_is_one_that_the_command_takes(tmp_path):
    models = set()
    for job in (job for independent in orderings.jobs([7], *BUDGET) for job in independent):
        gin.clear_config()
        options = run.parse_flags(["run.py", *study.flags(orderings.experiment(job, tmp_path), tmp_path)])
        config = run.configure(options.gin_file, options.gin_bindings, options.gin_search_paths)
        models.add(dataclasses.replace(config.model, dropout_rate=0.0))
        assert config.random_seed == 7 and config.model_dir == str(tmp_path / job.name)
        if job.task == PRETRAIN:
            one = orderings.OBJECTIVES[job.start]
            name = {"iid_denoising": "c4_v220_iid_denoising", "prefix_lm": "c4_v220_prefix_lm"}.get(job.start, one.name)
            assert config.mixture_or_task_name == name and config.train_steps == 20
            assert config.initial_checkpoint_path is None
        else:
            start = None if job.start == RANDOM else str(tmp_path / f"{job.start}-7-20")
            assert config.initial_checkpoint_path == start
            assert config.train_steps == (30 if job.task == "sst2" else 20)
    assert len(models) == 1


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    ran = []

    def fake(experiment, out):
        if len(ran) == 6:
            raise RuntimeError("killed")
        folder = out / experiment.name
        (folder / "checkpoints").mkdir(parents=True)
        train = {"split": "train", "input_tokens": 9.0, "target_tokens": 3.0, "seconds_per_step": 2.0}
        scores = {"step": 3, "split": "validation", "task": "some", "loss": 5.0, "accuracy": 60.0}
        rows = [{"step": 1} | train, {"step": 3} | train, scores]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / study.DONE).write_text("90.0\n")
        ran.append(experiment.name)
        return experiment.name

    monkeypatch.setenv("T5X_LITE_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(orderings, "prepare", lambda out, corpora: corpora)
    monkeypatch.setattr(study, "run", fake)
    asked = [f"--out={tmp_path}", "--seeds=0", "--jobs=1", "--pretrain_steps=3", "--finetune_steps=3"]
    assert orderings.main(asked) == 1 and "killed" in capsys.readouterr().err
    first, ran[:] = [*ran], []
    assert orderings.main(asked) == 1
    second, ran[:] = [*ran], []
    assert orderings.main(asked) == 0
    assert len({*first, *second, *ran}) == 14 and len(first + second + ran) == 14
    assert "14 runs, 21 minutes" in capsys.readouterr().out
    assert (tmp_path / "ul2-0-3/checkpoints").exists() and not (tmp_path / "ul2-0-3-sst2-3/checkpoints").exists()
    assert len((tmp_path / "commands.txt").read_text().splitlines()) == 14
