"""A plan's batch, made without TensorFlow, against the one that training reads."""

import dataclasses

import numpy as np
import pytest
import seqio
import tensorflow as tf
from core.test_run import configured

from t5x_lite import data, plan
from t5x_lite.machine import Machine

TASK = "plan_test_task"
MODEL = {"d_model": 16, "d_ff": 24, "num_heads": 4, "vocab_size": 384}
T5 = {"head_dim": 6, "num_encoder_layers": 1, "num_decoder_layers": 1}


@pytest.fixture(scope="module", autouse=True)
def task():
    def read(split, shuffle_files, seed=None):
        row = dict.fromkeys(("inputs", "targets", "segments"), np.full((40, 6), 7, np.int32))
        return tf.data.Dataset.from_tensor_slices(row | dict.fromkeys(("random", "label"), np.ones((40, 1), np.int32)))

    features = ("inputs", "targets", "segments", "random", "label")
    seqio.TaskRegistry.add(
        TASK,
        source=seqio.FunctionDataSource(read, splits=["train"]),
        preprocessors=[],
        output_features={k: seqio.Feature(seqio.ByteVocabulary(), add_eos=False) for k in features},
    )
    yield
    seqio.TaskRegistry.remove(TASK)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder", "encoder", "classifier"])
def test_the_batch_of_a_plan_is_that_of_training(layout, pack):
    is_bert = layout in ("encoder", "classifier")
    sizes = MODEL | {"num_layers": 1} if is_bert else MODEL | T5
    if layout == "classifier":
        sizes["heads"] = ("pooler", "classify")
    if layout == "decoder":
        sizes["num_encoder_layers"] = 0
    part = "BertConfig" if is_bert else "T5Config"
    lengths = {"inputs": 12} if is_bert else {"inputs": 12, "targets": 10}
    bindings = [f"--gin.{part}.{name}={value}" for name, value in sizes.items()]
    run = configured(
        *bindings, f"--gin.Run.model=@{part}()", f"--gin.TASK_FEATURE_LENGTHS={lengths}", "--gin.BATCH_SIZE=8"
    )
    run = dataclasses.replace(run, pack=pack)
    assert run.model.layout == layout
    read = data.TrainBatches(TASK, lengths, batch_size=8, seed=0, layout=layout, pack=pack)
    planned = plan.abstract_batch(run, Machine(run))
    assert {name: x.shape for name, x in planned.items()} == read.shapes
    assert {name: x.dtype for name, x in planned.items()} == {name: x.dtype for name, x in next(read).items()}
