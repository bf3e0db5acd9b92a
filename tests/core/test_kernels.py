"""Fused kernels are checked before they are used: one that fails, differs or is slow does not stop a run."""

import json
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.model import attention, kernel_checks
from t5x_lite.model.attention import AttentionMask, dot_product_attention

WHAT = {"product": [64, 32]}


def arguments(dtype=np.float32):
    random = np.random.default_rng(0)
    return [random.standard_normal((64, 32), np.float32).astype(dtype) for _ in range(2)] + [None, np.arange(64)]


def right(a, b, unused, numbers):
    return a @ b.T + numbers.astype(a.dtype)


def slow(a, b, unused, numbers):
    def body(_, x):
        return x @ jnp.eye(64, dtype=x.dtype)

    return jax.lax.fori_loop(0, 300, body, right(a, b, unused, numbers))


def wrong(a, b, unused, numbers):
    return right(a, b, unused, numbers).at[0, 0].add(20.0)


@jax.custom_vjp
def wrong_gradient(a, b, unused, numbers):
    return right(a, b, unused, numbers)


wrong_gradient.defvjp(
    lambda *args: (right(*args), args), lambda args, d: (1.1 * (d @ args[1]), d.T @ args[0], None, np.zeros(64, bool))
)


def not_a_number(a, b, unused, numbers):
    return right(a, b, unused, numbers) * jnp.nan


def raising(*args):
    raise NotImplementedError("no such instruction\non this chip")


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_checks, "_choices", {})
    monkeypatch.setattr(kernel_checks, "cache_folder", lambda: str(tmp_path))


def choose(**candidates):
    return kernel_checks.fastest(WHAT, {"reference": right, **candidates}, arguments)


@pytest.mark.parametrize(
    "kernel, reason",
    [
        (raising, "NotImplementedError: no such instruction"),
        (wrong, "differs"),
        (wrong_gradient, "differs"),
        (not_a_number, "differs"),
    ],
)
def test_a_kernel_that_fails_or_differs_is_dropped_with_one_line(kernel, reason, caplog):
    assert choose(fused=kernel) == "reference"
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "fused" in line and reason in line and "\n" not in line


def test_the_fastest_of_the_sound_is_taken(caplog):
    caplog.set_level(logging.INFO)
    assert kernel_checks.fastest(WHAT, {"reference": slow, "fused": right, "broken": raising}, arguments) == "fused"
    assert kernel_checks.fastest({"other": 1}, {"reference": right, "fused": slow}, arguments) == "reference"
    assert sum(": using " in r.getMessage() for r in caplog.records) == 2


def test_bfloat16_is_compared_with_exact_values():
    def in_eighths(*args):  # off by less than eight bits can tell
        return (1 + 2**-9) * right(*args)

    def off(*args):
        return 1.1 * right(*args)

    def bfloat16():
        return arguments(jnp.bfloat16)

    assert kernel_checks.fastest(WHAT, {"reference": slow, "fused": in_eighths}, bfloat16) == "fused"
    assert kernel_checks.fastest({"other": 1}, {"reference": slow, "fused": off}, bfloat16) == "reference"


def test_a_choice_is_kept_beside_the_compilation_cache(tmp_path):
    assert kernel_checks.fastest(WHAT, {"reference": slow, "fused": right}, arguments) == "fused"
    kernel_checks._choices.clear()

    def unused():
        raise AssertionError("checked again")

    assert kernel_checks.fastest(WHAT, {"reference": slow, "fused": right}, unused) == "fused"
    (file,) = tmp_path.glob("t5x_lite-kernels-*.json")
    assert json.loads(file.read_text())["choice"] == "fused"
    kernel_checks._choices.clear()
    file.write_text('{"choice": "fus')  # cut short: checked again
    assert kernel_checks.fastest(WHAT, {"reference": slow, "fused": right}, arguments) == "fused"
    assert kernel_checks.fastest(WHAT, {"reference": slow, "fused": right}, arguments, version="2") == "fused"
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_a_lack_of_memory_is_not_kept(tmp_path):
    def too_large(*args):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    assert choose(fused=too_large) == "reference"
    kernel_checks._choices.clear()
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["choice"] is None


def test_a_cache_that_cannot_be_written_costs_no_run(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(kernel_checks, "cache_folder", lambda: str(file / "folder"))
    assert kernel_checks.fastest(WHAT, {"reference": slow, "fused": right}, arguments) == "fused"
    monkeypatch.setattr(kernel_checks, "cache_folder", lambda: None)
    kernel_checks._choices.clear()
    assert kernel_checks.fastest(WHAT, {"reference": slow, "fused": right}, arguments) == "fused"


def test_arguments_that_cannot_be_made_leave_the_reference(caplog):
    def failing():
        raise ValueError("no memory for them")

    assert kernel_checks.fastest(WHAT, {"reference": right, "fused": right}, failing) == "reference"
    assert "no memory for them" in caplog.text


CRASHING = """
import os
from t5x_lite.model import kernel_checks
from tests.core import test_kernels as t
kernel_checks.cache_folder = lambda: os.environ["CACHE"]
def crashing(*args):
    os.abort()
t.choose(fused=crashing)
"""


@pytest.mark.slow
def test_a_kernel_that_ended_two_processes_is_not_tried_again(tmp_path, caplog):
    environment = os.environ | {"CACHE": str(tmp_path), "PYTHONPATH": os.getcwd()}
    for _ in range(kernel_checks.CRASHES):  # one may have been a kill
        ended = subprocess.run([sys.executable, "-c", CRASHING], env=environment, capture_output=True, timeout=300)
        assert ended.returncode < 0, ended.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    for _ in range(2):  # nor at any later start
        assert choose(fused=right) == "reference"
        assert "processes ended while it was checked" in caplog.text
        caplog.clear()
        kernel_checks._choices.clear()
        content = json.loads(file.read_text())
        assert content["crashed"] == ["fused", "fused"] and content["choice"] == "reference"
        file.write_text(json.dumps({"crashed": content["crashed"]}))


def test_a_process_that_does_not_hear_of_the_choice_does_not_make_one(monkeypatch):
    def unheard(key, make):
        raise TimeoutError(key)

    monkeypatch.setattr(kernel_checks.distributed, "broadcast", unheard)
    with pytest.raises(TimeoutError):
        choose(fused=right)


def test_the_question_to_the_others_does_not_depend_on_this_machine(monkeypatch):
    keys = []
    monkeypatch.setattr(kernel_checks.distributed, "broadcast", lambda key, make: keys.append(key) or "reference")
    for version in ("0.10.2", "0.12.0"):
        monkeypatch.setattr(jax, "__version__", version)
        choose(fused=right)
        kernel_checks._choices.clear()
    assert len(set(keys)) == 1


def test_a_cache_folder_of_an_unknown_kind_costs_no_kernel(monkeypatch):
    monkeypatch.setattr(kernel_checks, "cache_folder", lambda: "nothing-known://bucket/folder")
    assert kernel_checks.fastest(WHAT, {"reference": slow, "fused": right}, arguments) == "fused"


def test_a_check_that_another_process_is_doing_is_no_crash(tmp_path):
    assert choose(fused=right) in ("fused", "reference")
    kernel_checks._choices.clear()
    (file,) = tmp_path.glob("*.json")
    for process in (
        {"host": "another", "process": 1},
        {"host": kernel_checks.socket.gethostname(), "process": os.getppid()},
    ):
        file.write_text(json.dumps({"trying": {"candidate": "fused", **process}}))
        assert kernel_checks.Record(file.name.split("-")[-1].removesuffix(".json"))._crashed == []


# Attention


def shapes(dtype=jnp.bfloat16, queries=16, keys=16):
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape, np.float32), dtype)

    return normal(4, queries, 2, 8), normal(4, keys, 2, 8), normal(4, keys, 2, 8), normal(2, 9)


@pytest.fixture
def flash_on_cpu(monkeypatch):
    """The CPU has the TPU's kernel for its own, interpreted, at any size."""
    monkeypatch.setitem(attention.PLATFORM_KERNELS, "cpu", "flash")
    monkeypatch.setattr(attention, "FLASH_LOGITS", 0)


SEGMENTS = jnp.asarray(np.repeat([[1, 2, 2, 0]], 4, 0).repeat(4, 1))
CASES = [
    AttentionMask(),
    AttentionMask(causal=True),
    AttentionMask(SEGMENTS, SEGMENTS),
    AttentionMask(SEGMENTS, SEGMENTS, causal=True),
    AttentionMask(None, SEGMENTS),
    AttentionMask(SEGMENTS, SEGMENTS, SEGMENTS % 2, causal=True),
]


def named(attention_mask):
    return ",".join(name for name, x in vars(attention_mask).items() if x is not None)


@pytest.mark.parametrize(
    "attention_mask",
    [pytest.param(case, id=named(case), marks=[] if i == 5 else [pytest.mark.slow]) for i, case in enumerate(CASES)],
)
def test_a_sound_kernel_passes_the_check_at_every_mask(attention_mask, flash_on_cpu, monkeypatch, caplog):
    monkeypatch.setattr(kernel_checks, "FASTER", 1e6)  # though interpreted
    query, key, _, bias = shapes()
    assert attention.choose(None, query, key, bias, attention_mask) == "flash"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_broken_kernel_leaves_attention_to_xla_inside_a_traced_step(flash_on_cpu, monkeypatch, caplog):
    monkeypatch.setitem(attention.KERNELS, "flash", lambda *args, **options: raising())
    arrays, attention_mask = shapes(), AttentionMask(SEGMENTS, SEGMENTS)

    def loss(query, *others, implementation=None):
        y = dot_product_attention(query, *others, attention_mask, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    gradient = jax.jit(jax.grad(lambda *args: loss(*args)))
    batch = jax.jit(jax.grad(lambda *args: loss(*args, implementation="batch")))
    with jax.transfer_guard("disallow"):
        np.testing.assert_array_equal(gradient(*arrays), batch(*arrays))
    assert "no such instruction" in caplog.text
    with pytest.raises(NotImplementedError):  # what is asked for by name is not replaced
        jax.eval_shape(lambda *args: loss(*args, implementation="flash"), *arrays)


@pytest.mark.slow
def test_a_kernel_that_ignores_the_mask_is_dropped(flash_on_cpu, monkeypatch, caplog):
    monkeypatch.setattr(kernel_checks, "FASTER", 1e6)
    sound = attention.KERNELS["flash"]

    def unmasked(query, key, value, bias, *masks, **options):
        return sound(query, key, value, bias, None, None, *masks[2:], **options)

    monkeypatch.setitem(attention.KERNELS, "flash", unmasked)
    query, key, _, bias = shapes()
    assert attention.choose(None, query, key, bias, AttentionMask(None, SEGMENTS)) == "batch"
    assert "differs" in caplog.text
    assert attention.choose(None, query, key, bias, AttentionMask()) == "flash"  # another mask is another check


def test_only_so_much_is_checked_as_the_reference_has_room_for(flash_on_cpu, monkeypatch):
    monkeypatch.setattr(attention, "CHECKED_LOGITS", 2 * 16 * 16)
    checked = []
    monkeypatch.setattr(kernel_checks, "fastest", lambda what, *_, **options: checked.append(what) or "batch")
    query, key, _, bias = shapes()
    attention.choose(None, query, key, bias, AttentionMask())
    monkeypatch.setattr(attention, "CHECKED_LOGITS", 16)
    attention.choose(None, query, key, bias, AttentionMask())
    assert [what["attention"] for what in checked] == [[1, 16, 2, 8], [1, 16, 1, 8]]
