"""benchmarks/accelerator.py: parts that fail, take too long or are killed lose only what they were measuring."""

import collections
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import forks
import numpy as np
import pytest

from benchmarks import accelerator
from benchmarks.accelerator_parts import parity, shapes, summary, train
from benchmarks.accelerator_parts.results import Results, is_result
from benchmarks.train_step import DoesNotFit

ROOT = Path(__file__).resolve().parents[2]

FAKE_PART = """
import os, subprocess, sys, time
from pathlib import Path
from benchmarks.accelerator_parts.child import Item, Unavailable

def items(settings):
    def calm():
        return {"process": os.getpid()}

    def wait():
        here = settings.out
        (here / "waiting").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        while not (here / "open").exists():
            time.sleep(0.02)
        return {}

    def fail():
        raise ValueError("a bad shape")

    def crash():
        os.abort()

    def unavailable():
        raise Unavailable("no such library")

    FUNCTIONS
"""


def fake_part(name, functions, folder):
    """A part with the module of the same name; `functions` is its `return`, or what it does instead."""
    (folder / f"{name}.py").write_text(FAKE_PART.replace("FUNCTIONS", functions))
    return accelerator.Part(name, name, 1.0)


ONE, TWO = 'Item("one", calm)', 'Item("two", calm)'


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Runs the command with fake parts: {name: the list of their items}; returns the lines without starts."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(accelerator, "LEAST_SECONDS", 2.0)
    out = tmp_path / "out"

    def run(parts, *flags):
        made = tuple(fake_part(name, functions, tmp_path) for name, functions in parts.items())
        monkeypatch.setattr(accelerator, "PARTS", made)
        assert accelerator.main([f"--out={out}", *flags]) == 0
        return ends(out)

    run.out = out
    return run


def ends(out):
    return [line for line in Results(out, "").lines() if "started" not in line]


def names(lines):
    return [(line["part"], line.get("key")) for line in lines]


def test_what_is_measured_is_not_measured_again(measure):
    parts = {"a": f"return [{ONE}, {TWO}]", "b": f"return [{ONE}]"}
    lines = measure(parts)
    assert names(lines) == [("a", "one"), ("a", "two"), ("b", "one")] and all(map(is_result, lines))
    assert measure(parts) == lines


def test_items_of_another_process_are_measured_in_another(measure):
    lines = measure({"a": f'return [{ONE}, Item("other", calm, "x"), {TWO}]'})
    processes = {line["key"]: line["process"] for line in lines}
    assert processes["one"] == processes["two"] != processes["other"]


def test_only_measures_the_parts_named(measure):
    lines = measure(dict.fromkeys("abc", f"return [{ONE}]"), "--only=c,a")
    assert names(lines) == [("a", "one"), ("c", "one")]


def test_a_failure_says_so_and_is_tried_once_more(measure):
    parts = {
        "a": f'return [Item("bad", fail), {ONE}]',
        "b": 'raise ValueError("no such device")',
        "c": f"return [{ONE}]",
    }
    lines = measure(parts)
    assert names(lines) == [("a", "bad"), ("a", "one"), ("b", None), ("c", "one")]
    assert [line.get("error") for line in lines] == [
        "ValueError: a bad shape",
        None,
        "ValueError: no such device",
        None,
    ]
    again = measure(parts)[len(lines) :]
    assert names(again) == [("a", "bad"), ("b", None)]
    assert names(measure(parts)[len(lines) + 2 :]) == [("b", None)]


def test_a_part_that_cannot_be_imported_says_so(measure):
    lines = measure({"a": "return [", "b": f"return [{ONE}]"})
    assert names(lines) == [("a", None), ("b", "one")] and "SyntaxError" in lines[0]["error"]


def test_a_crash_loses_one_measurement(measure):
    lines = measure({"a": f'return [{ONE}, Item("bad", crash), {TWO}]'})
    assert names(lines) == [("a", "one"), ("a", "bad"), ("a", "two")]
    assert "SIGABRT" in lines[1]["error"] and lines[0]["process"] != lines[2]["process"]


def test_what_is_not_installed_is_skipped(measure):
    (line,) = measure({"a": "return unavailable()"})
    assert line["skipped"] == "no such library" and "error" not in line


@pytest.mark.slow
def test_a_part_over_its_limit_is_ended_with_its_children(measure):
    parts = {"a": f'return [{ONE}, Item("slow", wait), {TWO}]', "b": f"return [{ONE}]"}
    lines = measure(parts, "--minutes=0.1")
    assert names(lines) == [("a", "one"), ("a", "slow"), ("b", "one")]
    assert lines[1]["error"] == "time limit"
    assert has_ended(int((measure.out / "waiting").read_text()))
    (measure.out / "open").touch()
    assert names(measure(parts)[len(lines) :]) == [("a", "two"), ("a", "slow")]  # what took too long comes last


def has_ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "nothing has come"
        time.sleep(0.02)


def test_killed_and_given_again_it_resumes(measure, tmp_path):
    part = fake_part("a", f'return [{ONE}, Item("slow", wait), {TWO}]', tmp_path)
    command = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from benchmarks import accelerator
        accelerator.PARTS = (accelerator.{part!r},)
        accelerator.main(["--out={measure.out}"])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(command)], stdout=subprocess.DEVNULL)
    results = Results(measure.out, "")
    wait_for((measure.out / "waiting").exists)
    child = results.measured("a")["one"]["process"]
    assert not has_ended(child)
    process.kill()
    process.wait()
    wait_for(lambda: has_ended(child))
    with (measure.out / "results.jsonl").open("a") as file:
        file.write('{"part": "a", "key": "tw')  # half a line
    (measure.out / "open").touch()
    lines = measure({"a": f'return [{ONE}, Item("slow", wait), {TWO}]'})
    assert names(lines) == [("a", "one"), ("a", "two"), ("a", "slow")] and lines[0]["process"] == child


@pytest.mark.slow
def test_rows_are_halved_until_they_fit():
    def measure_rows(rows):
        if rows > 100:
            raise DoesNotFit
        if rows > 40:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return {"step_seconds": 1.0}

    assert train.largest_that_fits(measure_rows, 128) == {
        "batch_size": 32,
        "too_large": [128, 64],
        "step_seconds": 1.0,
    }
    with pytest.raises(DoesNotFit):
        train.largest_that_fits(lambda rows: measure_rows(128), 128)
    with pytest.raises(ZeroDivisionError):
        train.largest_that_fits(lambda rows: {"step_seconds": rows / 0}, 128)


def test_rows_to_begin_with_grow_with_the_memory():
    rows, needed = shapes.PUBLISHED.memory["none"]["base"]
    first = [shapes.first_rows(shapes.PUBLISHED, "base", "none", gib) for gib in (None, needed + 1, 2 * needed, 0.1)]
    assert first == [rows, rows, 2 * rows, 1]


def test_parity_sees_a_wrong_gradient_and_takes_nothing_for_another(monkeypatch):
    real = parity.outputs_and_gradients
    (sizes,), case = parity.TOY, parity.CASES["segments"]

    def fake(name, *args):
        if name == "cudnn":
            return real(name, *args)
        if name == "flash":
            raise ValueError("no such kernel")
        arrays = [np.ones(3, np.float32) for _ in parity.ARRAYS]
        if name == "blocks":
            arrays[2] = np.array([1, 1, np.nan if args[0][0].dtype == "float32" else 1.1], np.float32)
        return arrays

    monkeypatch.setattr(parity, "outputs_and_gradients", fake)
    result = parity.compare(sizes, 5, 7, case)
    errors = result["errors"]
    assert not result["ok"] and errors["batch, float32"]["ok"] and errors["batch, bfloat16"]["ok"]
    assert (
        not errors["blocks, float32"]["ok"]
        and not errors["blocks, bfloat16"]["ok"]
        and not errors["flash, float32"]["ok"]
    )
    assert errors["blocks, bfloat16"]["output"] == 0 < errors["blocks, bfloat16"]["key"]
    assert errors["cudnn, float32"] == errors["cudnn, bfloat16"] == "not available"


def test_every_published_figure_has_a_source():
    published = json.loads(summary.PUBLISHED.read_text())
    for figure in [*published["training"], published["decoding"]]:
        assert figure["source"] and figure["recalled"] in (True, False)
    sizes = {figure["size"] for figure in published["training"]}
    assert {"small", "base", "large", "xl"} <= sizes


def test_summary_has_published_figures_next_to_ours(tmp_path, capsys):
    results = Results(tmp_path, "now")
    step = {"step_seconds": 0.25, "sequences_per_second": 200.0, "tokens_per_second": 125_200, "peak_device_gb": 60.0}
    step |= {
        "size": "large",
        "batch_size": 64,
        "needed_gb": 59.5,
        "mfu": 0.3,
        "remat": "minimal",
        "device": "NVIDIA H100",
    }
    step |= {"fused_attention_calls": 6}
    key = train.Variant("large").key
    results.append("train", key, **step)
    results.append("plan", key, needed_gb=58.0, bound_sequences_per_second=251.0)
    torch = step | {"precision": "autocast", "attention": "sdpa"}
    for form, rate in (("not compiled", 70.0), ("compiled", 100.0)):
        results.append("torch_train", f"large, autocast, {form}", **torch | {"sequences_per_second": rate})
    call = {"size": "base", "method": "beam", "batch_size": 8, "inputs": 128, "tokens": 128, "complete": True}
    results.append("decode", "base, beam, batch 8", **call, tokens_per_second=3000.0)
    results.append("train", "xl, unrolled", error="time limit")
    results.append("parity", started=1)
    assert accelerator.main([f"--summary={tmp_path}"]) == 0
    text = (tmp_path / "summary.md").read_text()
    assert capsys.readouterr().out == text
    row = next(line for line in text.splitlines() if line.startswith(f"| {key}"))
    assert row.split(" | ")[1:] == [
        *("64", "0.2500", "200.0", "125,200", "30.0%", "6", "59.5", "60.0", "58.0", "251.0", "178"),
        "2.00 |",
    ]
    assert "| base, beam, batch 8 | 128 / 128 | 3,000.0 |  |  | 76 | 1,418 |" in text
    assert "| T5X by NVIDIA, large | 64 x H100 fp8 | 174.1 sequences/s |" in text
    assert "- train: xl, unrolled: time limit" in text


# What a machine with an accelerator need not have.
ABSENT = (
    *("gin", "tensorflow", "tensorflow_text", "seqio", "beartype", "jaxtyping", "matplotlib", "tensorboard"),
    *("sentencepiece", "safetensors", "wadler_lindig", "torch"),
)
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        stands_in = name == "jaxtyping" and any(folder.endswith("stand_ins") for folder in sys.path)
        return PathFinder.find_spec(name, path, target) if stands_in or name not in {ABSENT!r} else None

sys.meta_path[sys.meta_path.index(PathFinder)] = Absent
"""


@pytest.mark.exhaustive  # two minutes: what is rehearsed before the script goes to a device
def test_toy_run_survives_a_kill_and_missing_packages(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    out, environment = tmp_path / "out", os.environ | forks.devices(1) | {"PYTHONPATH": str(tmp_path)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # parts in processes of their own share a step
    command = [sys.executable, str(ROOT / "benchmarks" / "accelerator.py"), f"--out={out}", "--toy", "--minutes=10"]
    results = Results(out, "")
    process = subprocess.Popen(command, env=environment, process_group=0)
    try:
        wait_for(lambda: len(results.measured("parity")) > 1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = ends(out)
    assert len(before) > 2
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = ends(out)
    assert lines[: len(before)] == before
    assert max(collections.Counter(names(lines)).values()) == 1
    assert [line for line in lines if "error" in line] == []
    skipped = {line["part"]: line["skipped"] for line in lines if "skipped" in line}
    assert skipped.keys() == {"torch_train", "torch_decode"}
    measured = {part.name: results.measured(part.name) for part in accelerator.PARTS}
    assert all(measured[name] for name in measured.keys() - skipped.keys())
    assert all(line["ok"] for line in measured["parity"].values())
    assert measured["plan"].keys() == measured["train"].keys()
    assert all(line["complete"] for line in measured["decode"].values())
    assert len(measured["profile"]["toy, trace"]["operations"]) == 10
    text = summary.summary(results)
    assert "| toy, beam, batch 2 |" in text and "NOT OK" not in text
