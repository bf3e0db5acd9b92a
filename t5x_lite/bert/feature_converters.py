"""BERT's feature converters: turn the examples of its tasks into rows. Must not depend on text or datasets."""

from t5x_lite.data import feature_converters
from t5x_lite.data.feature_converters import RowFeatureConverter


class PretrainingFeatureConverter(RowFeatureConverter):
    """Pads the features of tasks/bert.py."""

    features = ("inputs", "targets", "segments", "random")
    scalars = ("random",)


class ClassifierFeatureConverter(feature_converters.ClassifierFeatureConverter):
    features = ("inputs", "segments", "label")
