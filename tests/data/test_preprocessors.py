"""Text and objectives against hand-written values, the paper's Table 3 and t5's outputs."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from tasks import glue, preprocessors

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)  # 359 ids: sentinels 358, 357, ...


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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((512, 0.15, 3.0), (568, 114)),
        ((512, 0.15, 10.0), (591, 99)),
        ((114, 0.15, 3.0), (126, 26)),
        ((512, 0.5, 3.0), (766, 512)),
    ],
)
def test_raw_tokens_that_fill_the_inputs(settings, expected):
    assert preprocessors.random_spans_helper(*settings) == expected


def test_noise_counts():
    assert preprocessors.noise_counts(568, 0.15, 3.0) == (85, 28)


TABLE_3 = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]


def words(function, mask, sentinels="XYZ"):
    """Applies an encoding to the paper's sentence: word k is token k + 3, and sentinels are written <X>, <Y>, <Z>."""
    noise = tf.constant([bit == "1" for bit in mask])
    tokens = function(tf.range(3, 3 + len(TABLE_3)), noise, VOCABULARY).numpy()
    return " ".join(TABLE_3[t - 3] if t < 300 else f"<{sentinels[358 - t]}>" for t in tokens)


def test_table_3_of_the_paper():
    iid, spans = "00110000100", "00111011100"
    inputs, targets = preprocessors.noise_span_to_unique_sentinel, preprocessors.nonnoise_span_to_unique_sentinel
    assert words(inputs, iid) == "Thank you <X> me to your party <Y> week ."
    assert words(targets, iid) == "<X> for inviting <Y> last <Z>"
    assert words(inputs, spans) == "Thank you <X> to <Y> week ."
    assert words(targets, spans) == "<X> for inviting me <Y> your party last <Z>"
    assert words(preprocessors.drop_noise_tokens, iid) == "Thank you me to your party week ."
    assert words(preprocessors.drop_nonnoise_tokens, iid) == "for inviting last"
    assert words(preprocessors.noise_token_to_sentinel, iid) == "Thank you <X> <X> me to your party <X> week ."


def mask(length, seeds, **settings):
    return preprocessors.random_spans_noise_mask(tf.constant(length), 0.15, tf.constant(seeds), **settings).numpy()


def test_span_masks_begin_with_text_and_end_with_noise():
    seen = set()
    for seed in range(20):
        noise = mask(568, [[seed, 1], [2, seed]])
        starts = np.flatnonzero(np.diff(np.concatenate([[False], noise]).astype(int)) == 1)
        assert (noise.sum(), len(starts)) == (85, 28)
        assert not noise[0]
        assert noise[-1]
        seen.add(noise.tobytes())
    assert len(seen) == 20
    assert not mask(1, [[1, 2], [3, 4]]).any()


def test_objectives_agree_with_t5(golden_json):
    reference = golden_json("pretraining_objectives")
    for *settings, raw, targets in reference["random_spans_helper"]["rows"]:
        assert preprocessors.random_spans_helper(*settings) == (raw, targets), settings
    for length, noise, spans in reference["noise_counts_density0.15_span3"]["rows"]:
        if length > 1:
            assert preprocessors.noise_counts(length, 0.15, 3.0) == (noise, spans)
    for case in reference["random_spans_noise_mask"]:
        assert case["noise_density"] == 0.15
        for expected, roll in ((case["mask"], False), (case["mask_random_roll"], True)):
            settings = {"mean_noise_span_length": case["mean_noise_span_length"], "random_roll": roll}
            found = mask(case["length"], case["seeds"], **settings)
            assert "".join(map(str, found.astype(int))) == expected

    class Size:
        vocab_size = reference["vocab_size"]

    for case in reference["encodings"]:
        noise = tf.constant([bit == "1" for bit in case["mask"]])
        for name, expected in case.items():
            if name not in ("tokens", "mask"):
                found = getattr(preprocessors, name)(tf.constant(case["tokens"]), noise, Size)
                assert found.numpy().tolist() == expected, name


def documents(lengths):
    """Documents of distinct tokens, so that where each token went can be told."""
    tokens = np.arange(3, 3 + sum(lengths), dtype=np.int32)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    return tf.data.Dataset.from_generator(
        lambda: ({"targets": p} for p in parts), output_signature={"targets": tf.TensorSpec([None], tf.int32)}
    )


def test_documents_are_concatenated_and_cut_without_loss():
    dataset = preprocessors.reduce_concat_tokens(documents([5, 0, 7, 3]), documents=3)
    pieces = [x["targets"] for x in preprocessors.split_tokens(dataset, max_length=5).as_numpy_iterator()]
    assert [len(p) for p in pieces] == [5, 5, 2, 3]
    assert np.concatenate(pieces).tolist() == list(range(3, 18))


def test_long_documents_give_one_chunk():
    chunks = [x["targets"] for x in preprocessors.select_random_chunk(documents([10, 4]), 4).as_numpy_iterator()]
    assert chunks[0].tolist() in ([3, 4, 5, 6], [7, 8, 9, 10], [11, 12])
    assert chunks[1].tolist() == [13, 14, 15, 16]


def features(vocabulary):
    return {k: seqio.Feature(vocabulary) for k in ("inputs", "targets")}


def test_span_corruption_fills_the_inputs_and_loses_no_token():
    lengths = {"inputs": 64, "targets": 14}
    text = tf.data.Dataset.from_tensors({"targets": tf.range(3, 3 + 140)})
    made = list(preprocessors.span_corruption(text, lengths, features(VOCABULARY)).as_numpy_iterator())
    assert len(made) == 2  # 140 tokens are two pieces of 70
    for x in made:
        assert (len(x["inputs"]), len(x["targets"])) == (63, 13)  # EOS comes later
        together = np.concatenate([x["inputs"], x["targets"]])
        sentinels = together[together >= 259]
        assert sorted(sentinels) == sorted(2 * list(range(356, 359)))
        words = np.sort(together[together < 259])
        assert (np.diff(words) == 1).all()
        assert len(words) == 70


def test_span_corruption_draws_what_t5_draws_from_the_same_seed():
    text = tf.data.Dataset.from_tensors({"targets": tf.range(3, 73)})
    with seqio.utils.map_seed_manager(11):
        dataset = preprocessors.span_corruption(text, {"inputs": 64, "targets": 14}, features(VOCABULARY))
    (x,) = dataset.as_numpy_iterator()
    assert x["targets"].tolist() == [358, 5, 6, 7, 8, 9, 10, 11, 357, 32, 33, 356, 72]  # by t5 0.9.4
    assert x["inputs"].tolist() == [*range(3, 5), 358, *range(12, 32), 357, *range(34, 72), 356]


def test_span_corruption_says_what_is_wrong():
    text = documents([70])
    with pytest.raises(ValueError, match="targets' length to 14"):
        preprocessors.span_corruption(text, {"inputs": 64, "targets": 13}, features(VOCABULARY))
    with pytest.raises(ValueError, match="extra_ids=3 or more"):
        preprocessors.span_corruption(text, {"inputs": 64, "targets": 14}, features(seqio.ByteVocabulary()))
    with pytest.raises(ValueError, match="TASK_FEATURE_LENGTHS"):
        preprocessors.span_corruption(text, None, features(VOCABULARY))
