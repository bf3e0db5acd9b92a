"""Exported programs, called where this code cannot be imported."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from core.test_decoder_only import PREFIX_LM, init

import t5x_lite
from t5x_lite import export
from t5x_lite.convert import tensors
from t5x_lite.inference import decode
from t5x_lite.inference.pretrained import LoadedModel

CALL = """
import pathlib, sys
import numpy as np
sys.modules["t5x_lite"] = None
{snippet}
assert program.platforms == ("cpu", "cuda", "tpu")
inputs = np.load("inputs.npy")
for n, rows in enumerate((inputs, inputs[:3, :40])):
    for name, values in zip(("tokens", "scores"), predict(params, rows{seed})):
        np.save(name + str(n), values)
"""


def called(folder, inputs):
    """What the program gives for four rows, and for three narrower ones: (tokens, scores) of each."""
    np.save(folder / "inputs", inputs)
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    seed = ", np.uint32(0)" if "np.uint32(0)" in snippet else ""
    code = CALL.format(snippet=snippet, seed=seed)
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return [[np.load(folder / f"{name}{n}.npy") for name in ("tokens", "scores")] for n in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"method": "beam", "num_decodes": 2}, {"method": "sample", "num_decodes": 3}])
def test_a_program_alone_gives_what_the_model_gives(golden_dir, golden_t5, tmp_path, options, unchecked_types):
    folder, source = tmp_path / "program", golden_dir / "hf_t5_v11"
    said = [f"--{name}={value}" for name, value in options.items()]
    assert export.main([str(source), str(folder), "--max_length=9", *said]) == 0
    inputs = np.asarray(golden_t5.io["input_ids"] * golden_t5.io["attention_mask"], np.int32)
    model = t5x_lite.load(source)
    for rows, (tokens, scores) in zip((inputs, inputs[:3, :40]), called(folder, inputs), strict=True):
        expected, expected_scores = model.generate(rows, max_length=9, **options)
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
    assert tokens.shape == (3, options.get("num_decodes", 1), 9)
    assert len(np.unique(tokens)) > 5
    said = "exists and is not empty"
    with pytest.raises(FileExistsError, match=said):
        export.export(source, folder, 9, decode.Decoding())


@pytest.mark.slow
def test_a_decoder_alone_is_exported_too(unchecked_types):
    model = LoadedModel(PREFIX_LM, init(PREFIX_LM))
    rows = np.array([[11, 12, 13], [21, 0, 0]], np.int32)
    program = jax.export.deserialize(export.program(model, 4, decode.Decoding()).serialize())
    tokens, _ = jax.jit(program.call)(tensors.flat(model.params), rows)
    expected, _ = model.generate(rows, max_length=4)
    np.testing.assert_array_equal(tokens, expected)
