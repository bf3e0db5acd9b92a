"""`make transfer`: its tables, its file of results, what it does without the model, and a few steps of a run."""

import dataclasses
import math
import re
import statistics

import flax.linen as nn
import gin
import jax
import numpy as np
import pytest

from benchmarks import transfer
from benchmarks.transfer import Job, Results, Sample
from t5x_lite import checkpoint, convert
from t5x_lite.bert import BertConfig
from t5x_lite.bert.huggingface import NAMES
from t5x_lite.bert.model import BertModel
from t5x_lite.checkpoint import saving
from t5x_lite.cli import main as run_py
from t5x_lite.cli import task_setup

OURS, THEIRS = Job("ours", "full", "mrpc", 0, 344), Job("theirs", "full", "mrpc", 0, 344)


def result(f1, accuracy=70.0, seconds=100.0):
    scores = {"f1": f1, "accuracy": accuracy}
    costs = {"train_seconds": seconds, "total_seconds": 2 * seconds, "peak_rss_gb": 1.5, "trained_parameters": None}
    return {"scores": scores, **costs}


def seed(job, number):
    return dataclasses.replace(job, seed=number)


def test_the_standard_error_of_a_difference_of_means():
    ours, theirs = Sample((80.0, 82.0, 87.0)), Sample((81.0, 83.0))
    apart, error = transfer.difference(ours, theirs)
    assert apart == pytest.approx(1.0)
    # Variances 13 and 2, divided by 3 and 2 seeds.
    assert error == pytest.approx(math.sqrt(13 / 3 + 2 / 2))
    assert math.isnan(transfer.difference(ours, Sample((81.0,)))[1])
    assert str(ours) == f"83.0 ± {statistics.stdev((80, 82, 87)):.1f} (3)" and str(Sample((81.0,))) == "81.0 (1)"


def test_the_table_has_both_sides_and_what_trains():
    results = {seed(OURS, i): result(f1, seconds=100 + i) for i, f1 in enumerate((80.0, 82.0, 87.0))}
    results |= {seed(THEIRS, i): result(f1, seconds=60) for i, f1 in enumerate((81.0, 83.0))}
    frozen = dataclasses.replace(OURS, adapt="frozen", steps=5)
    results[frozen] = result(60.0) | {"trained_parameters": 148610}
    lines = transfer.tables(results).splitlines()
    (f1,) = (line for line in lines if "| full | MRPC | 344 | f1 |" in line)
    assert f1.endswith("| 83.0 ± 3.6 (3) | 82.0 ± 1.4 (2) | +1.0 ± 2.3 | 101 / 60 | 202 / 120 | 1.50 / 1.50 |")
    assert not any("| frozen | MRPC |" in line for line in lines)  # no other side
    assert "| what trains | parameters | MRPC (5 steps) | MRPC |" in lines
    assert "| frozen | 148,610 | 65.0 (1), 100 s |  |" in lines
    whole = "| full | all |  | 76.5 ± 1.8 (3), 101 s |"
    assert whole in lines


def test_a_result_is_kept_and_a_torn_line_is_not(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    assert results.read() == {}
    results.add(OURS, result(80.0))
    with results.path.open("a") as file:
        file.write('{"side": "theirs", "ada')  # killed here
    assert [*results.read()] == [OURS]
    results.add(THEIRS, result(81.0))
    assert results.read()[THEIRS]["scores"]["f1"] == 81.0 and len(results.read()) == 2


def test_jobs_that_are_done_are_not_done_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("T5X_LITE_DATA_DIR", str(tmp_path))
    (tmp_path / "glue/WNLI").mkdir(parents=True)
    (tmp_path / "glue/WNLI/dev.tsv").write_text(
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t0\n1\ta\tc\t1\n2\ta\td\t0\n"
    )
    ran = []

    def run(self, job):
        if len(ran) == 2:
            raise RuntimeError("killed")
        ran.append(job)
        return result(80.0)

    monkeypatch.setattr(transfer.Bench, "run", run)
    monkeypatch.setattr(transfer.Bench, "check_tokenizer", lambda self, job: None)
    asked = [f"--out={tmp_path}", f"--model={tmp_path}", "--torch=python", "--tasks=mrpc", "--adapt=full,frozen"]
    assert transfer.main([*asked, "--seeds=0"]) == 1
    assert ran == [OURS, THEIRS] and "killed" in capsys.readouterr().err
    ran.clear()
    assert transfer.main([*asked, "--seeds=0"]) == 0
    assert [(job.side, job.adapt) for job in ran] == [("ours", "frozen"), ("theirs", "frozen")]
    assert "WNLI's majority class: 66.7." in capsys.readouterr().out
    assert transfer.main([*asked, "--seeds=0", "--table"]) == 0
    assert "| frozen | MRPC | 344 | accuracy |" in capsys.readouterr().out


def test_a_slow_task_has_fewer_seeds_and_a_t5_no_peer():
    jobs = [*transfer.jobs(["sst2", "rte"], ["full", "t5_lora"], None, None, peer=True)]
    assert [(job.task, job.adapt, job.side) for job in jobs if job.seed == 2] == [
        ("rte", "full", "ours"),
        ("rte", "full", "theirs"),
        ("rte", "t5_lora", "ours"),
    ]
    assert {job.steps for job in jobs} == {2105, 233}
    assert {job.steps for job in transfer.jobs(["rte"], ["full"], [5], 3, peer=False)} == {3}


def test_without_the_package_one_line_and_no_error(monkeypatch, capsys):
    monkeypatch.setattr(transfer, "PACKAGE", "no_such_package")
    assert transfer.main([]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("transfer: skipped") and said.out.count("\n") == 1 and not said.err


def test_wnli_without_the_training_rows_that_dev_rows_share(tmp_path):
    head = "index\tsentence1\tsentence2\tlabel"
    train = ['0\tAnn met "Bo".\tBo met.\t1', "1\tAnn left.\tBo left.\t0", "2\tIt rained.\tIt fell.\t1"]
    (tmp_path / "train.tsv").write_text("\n".join([head, *train]) + "\n")
    (tmp_path / "dev.tsv").write_text(f"{head}\n0\tann met Bo .\tAnn met.\t0\n")
    assert transfer.write_safe_wnli(tmp_path, tmp_path / "safe") == 1
    assert (tmp_path / "safe/train.tsv").read_text().splitlines() == [head, *train[1:]]
    assert (tmp_path / "safe/dev.tsv").read_text() == (tmp_path / "dev.tsv").read_text()


def test_scores_are_those_of_the_task():
    assert transfer.scores(transfer.TASKS["mrpc"], [1, 1, 0, 0], [1, 0, 0, 1]) == {"f1": 50.0, "accuracy": 50.0}
    numbers = transfer.scores(transfer.TASKS["stsb"], [0.0, 1.0, 2.0], [0.0, 1.0, 8.0])
    assert numbers["spearman_corrcoef"] == pytest.approx(100) and 80 < numbers["pearson_corrcoef"] < 95
    assert transfer.scores(transfer.TASKS["cola"], [1, 0], [0, 1])["matthews_corrcoef"] == -100


def hugging_face_bert(folder, monkeypatch):
    """A random BERT of two layers, in the place of the packaged one."""
    monkeypatch.chdir(folder)
    config = BertConfig(d_model=16, d_ff=32, num_heads=2, num_layers=2, vocab_size=64, max_length=32, heads=("pooler",))
    params = nn.unbox(BertModel(config).init(jax.random.key(0)))
    saving.save_params("checkpoint", params, info=convert.info(config))
    convert.convert("checkpoint", "hub", "huggingface")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "."]
    (folder / "hub/vocab.txt").write_text("\n".join(pieces) + "\n")
    return folder / "hub"


def write_wnli(folder):
    head = "index\tsentence1\tsentence2\tlabel"
    train = [f"{i}\t{'ab' * (i % 9 + 1)} c.\td{'e' * (i % 5)}.\t{i % 2}" for i in range(40)]
    dev = [f"{i}\t{'fg' * (i + 1)}.\th.\t{i % 2}" for i in range(8)]
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text("\n".join([head, *train]) + "\n")
    (folder / "dev.tsv").write_text("\n".join([head, *dev]) + "\n")


@pytest.mark.exhaustive
def test_a_small_bert_is_converted_trained_and_scored(tmp_path, monkeypatch, capsys, same_root_logger):
    hub, out = hugging_face_bert(tmp_path, monkeypatch), tmp_path / "out"
    write_wnli(tmp_path / "data/glue/WNLI")
    monkeypatch.setenv("T5X_LITE_DATA_DIR", str(tmp_path / "data"))
    small = dataclasses.replace(transfer.TASKS["wnli"], length=16)
    monkeypatch.setitem(transfer.TASKS, "wnli", small)
    asked = [f"--out={out}", f"--model={hub}", "--tasks=wnli", "--seeds=0", "--steps=2"]
    assert transfer.main([*asked, "--adapt=frozen"]) == 0
    (job,) = transfer.Results(out / "results.jsonl").read()
    said = capsys.readouterr().out
    assert "ours-frozen-wnli-0-2: accuracy" in said and "| frozen | 306 |" in said  # a pooler of 16 and two classes
    assert not (out / "runs" / job.name / "checkpoints").exists()

    bench = transfer.Bench(out, hub, None, None)
    with np.load(bench.rows(job)) as rows:
        assert rows["train_inputs"].shape == rows["train_segments"].shape == (64, 16)
        assert rows["widths"].shape == (2,) and len(rows["dev_label"]) == 8
        assert rows["dev_first"][1] == "fgfg." and rows["dev_second"][1] == "h."
        assert rows["dev_inputs"][0, :8].tolist() == [2, 10, 37, 57, 3, 12, 57, 3]
    trained = {}
    for adapt in ("full", "bias_norm", "frozen"):
        gin.clear_config()
        options = run_py.parse_flags(["run.py", *bench.flags(dataclasses.replace(job, adapt=adapt))])
        run = run_py.configure(options.gin_file, options.gin_bindings, options.gin_search_paths)
        params = task_setup.partitioner(run, devices=jax.devices()[:1]).abstract.params
        names = checkpoint.flat(run.optimizer.trainable.partition(params)[0])
        assert {"classify/kernel", "classify/bias", "pooler/bias"} <= names.keys()
        theirs = [
            name for name in checkpoint.flat(params) if re.search(transfer.ADAPTATIONS[adapt].theirs, hub_name(name))
        ]
        assert sorted(names) == sorted(theirs)
        trained[adapt] = len(names)
    assert trained["frozen"] < trained["bias_norm"] < trained["full"]


def hub_name(name):
    theirs = NAMES[name]
    return theirs if theirs.startswith("classifier") else f"bert.{theirs}"
