"""The text of tasks against hand-written values and t5's outputs."""

import numpy as np
import tensorflow as tf

from tasks import glue, preprocessors


def one(preprocess, example):
    dataset = tf.data.Dataset.from_tensors(tf.nest.map_structure(tf.constant, example))
    (result,) = preprocess(dataset).as_numpy_iterator()
    return {k: plain(v) for k, v in result.items()}


def plain(value):
    if isinstance(value, bytes):
        return value.decode()
    value = value.tolist()
    return [v.decode() if isinstance(v, bytes) else v for v in value] if isinstance(value, list) else value


def to_text(config_name):
    (config,) = (c for c in glue.CONFIGS if c.name == config_name)
    return glue._text_preprocessor(config)


def test_stsb_rounds_half_to_even():
    scores = tf.constant([2.5, 3.25, 2.57, 0.1, 4.5, 5.0])
    assert [s.decode() for s in preprocessors.stsb_label(scores).numpy()] == ["2.4", "3.2", "2.6", "0.0", "4.4", "5.0"]


def test_glue_text_sorts_features_and_keeps_spaces():
    found = one(to_text("mnli"), {"premise": "p ", "hypothesis": "h", "label": 2, "idx": 7})
    assert found == {"inputs": "mnli hypothesis: h premise: p ", "targets": "contradiction", "idx": 7}
    assert one(to_text("ax"), {"premise": "p", "hypothesis": "h", "label": -1, "idx": 0})["targets"] == "<unk>"


def test_squad_padded_and_not():
    example = {
        "id": "1",
        "title": "t",
        "context": "It cost $3.5 billion.",
        "question": "How much?",
        "answers": {"text": ["$3.5 billion", "3.5"], "answer_start": [8, 9]},
    }
    padded = one(preprocessors.squad, example)
    assert padded["inputs"] == "question: How much ? context: It cost $ 3 . 5 billion . "
    assert padded["targets"] == " $ 3 . 5 billion"
    assert padded["answers"] == [" $ 3 . 5 billion", "3 . 5"]
    plain_text = one(preprocessors.squad_unpadded, example)
    assert plain_text["inputs"] == "question: How much? context: It cost $3.5 billion."
    assert plain_text["targets"] == "$3.5 billion"
    assert one(preprocessors.squad_context_free, example)["inputs"] == "squad trivia question: How much ? "


def test_text_agrees_with_t5(golden_json):
    reference = golden_json("text_preprocessors")
    for name, cases in reference["glue"].items():
        for case in cases:
            example = case["example"] | ({"label": np.float32(case["example"]["label"])} if name == "stsb" else {})
            assert one(to_text(name), example) == case["output"][0]
    for config in glue.CONFIGS:
        assert list(config.labels) == (reference["label_classes"][config.name] or [])
    rounding = reference["stsb_rounding"]
    labels = tf.constant(np.array(rounding["labels_hundredths"]) / 100, tf.float32)
    assert [s.decode() for s in preprocessors.stsb_label(labels).numpy()] == rounding["strings"]
    for case in reference["pad_punctuation"]:
        assert preprocessors.pad_punctuation(tf.constant(case["text"])).numpy().decode() == case["output"]
    for name, function in (
        ("squad_v010_allanswers", preprocessors.squad),
        ("squad_v010_context_free", preprocessors.squad_context_free),
    ):
        for case in reference[name]:
            assert one(function, case["example"]) == case["output"][0]
