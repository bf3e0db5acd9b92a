"""The data half of every model's contract: what a pipeline makes is what `FeatureConverter.batch` says."""

import numpy as np
import pytest
import seqio
import tensorflow as tf
from models import CONFIGS, lengths

from t5x_lite.data import pipeline
from t5x_lite.model.families import model_of

TASK = "models_test_task"


@pytest.fixture(scope="module", autouse=True)
def task():
    def read(split, shuffle_files, seed=None):
        row = dict.fromkeys(("inputs", "targets", "segments"), np.full((40, 6), 7, np.int32))
        return tf.data.Dataset.from_tensor_slices(row | dict.fromkeys(("random", "label"), np.ones((40, 1), np.int32)))

    seqio.TaskRegistry.add(
        TASK,
        source=seqio.FunctionDataSource(read, splits=["train"]),
        preprocessors=[],
        output_features={
            feature: seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
            for feature in ("inputs", "targets", "segments", "random", "label")
        },
    )
    yield
    seqio.TaskRegistry.remove(TASK)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_batches_have_the_shapes_that_the_converter_says(config, pack):
    converter = model_of(config).feature_converter(pack)
    stream = pipeline.TrainBatches(TASK, lengths(config), batch_size=8, seed=0, converter=converter)
    said, batch = converter.batch(lengths(config), 8), next(stream)
    assert stream.shapes == {name: shape for name, (shape, _) in said.items()}
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == said
