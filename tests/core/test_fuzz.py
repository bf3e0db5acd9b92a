"""Whatever is bound to whatever name, the command has an answer or says in one line what is wrong: no traceback."""

import re

import pytest

from t5x_lite import options, run_config
from t5x_lite.cli import main as run

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

NAMES = re.findall(r"^([A-Z_]+) *=", options.gin_defaults(), re.MULTILINE)
NAMES += ["T5Config.d_model", "T5Config.mlp_activations", "adafactor.decay_rate", "make_optimizer.clip_norm"]
ODD = [
    "@adafactor()",
    "@adafactor",
    "@T5Config()",
    "@Run()",
    "@absent",
    "%BATCH_SIZE",
    "%ABSENT",
    "1e999",
    "1j",
    "",
    "(((",
]
ODD += [
    "%gin.REQUIRED",
    "lambda: 1",
    "import os",
    "1\nBATCH_SIZE = 2",
    "'open",
    "\0",
    "{'inputs': %BATCH_SIZE}",
    "1 2",
    "#",
]

literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=2),
    max_leaves=5,
)
bindings = st.tuples(st.sampled_from(NAMES), literals.map(repr) | st.sampled_from(ODD) | st.text(max_size=8))
files = st.sampled_from(["runs/finetune.gin", "runs/pretrain.gin", "quickstart.gin"])


@pytest.mark.slow
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.lists(bindings, min_size=1, max_size=3), files)
def test_any_bindings_give_a_run_or_a_refusal(bound, file):
    try:
        found = run.configure(["models/t5_1_1/small.gin", file], [f"{name} = {value}" for name, value in bound])
        run_config.last_step(found)
    except Exception as error:
        if not isinstance(error, run._user_errors()):
            raise
