"""Noise and objectives against TensorFlow's own draws, the paper's Table 3 and t5's outputs."""

import gzip
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

from tasks import blocks, c4, noise, objectives

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)  # 359 ids: sentinels 358, 357, ...
SEEDS = np.array([[1, 2], [3, -4], [2**32 - 1, 7], [123_456_789, 987_654_321]], np.int64)


@pytest.mark.parametrize("count", [1, 4, 7, 100])
def test_draws_are_tensorflows(count):
    drawn = noise.uniform(SEEDS, count), noise.integers(SEEDS, count, 3, 32_100), noise.split(SEEDS, count)
    for i, seed in enumerate(SEEDS):
        assert np.array_equal(drawn[0][i], tf.random.stateless_uniform([count], seed))
        assert np.array_equal(drawn[1][i], tf.random.stateless_uniform([count], seed, 3, 32_100, tf.int32))
        assert np.array_equal(drawn[2][i], tf.random.split(tf.constant(seed), count))
        assert np.array_equal(noise._permutations(count, SEEDS)[i], seqio.stateless_shuffle(tf.range(count), seed))
    assert len(np.unique(drawn[0])) == drawn[0].size


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
    assert objectives.random_spans_helper(*settings) == expected


TABLE_3 = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]


def encoded(function, tokens, mask, vocabulary=VOCABULARY, seeds=None):
    bits = np.array([[bit == "1" for bit in mask]])
    values, kept = function(np.array([tokens], np.int32), bits, vocabulary, seeds)
    return values[kept].tolist()


def words(function, mask, sentinels="XYZ"):
    """Applies an encoding to the paper's sentence: word k is token k + 3, and sentinels are written <X>, <Y>, <Z>."""
    tokens = encoded(function, range(3, 3 + len(TABLE_3)), mask)
    return " ".join(TABLE_3[t - 3] if t < 300 else f"<{sentinels[358 - t]}>" for t in tokens)


def test_table_3_of_the_paper():
    iid, spans = "00110000100", "00111011100"
    inputs, targets = noise.noise_span_to_unique_sentinel, noise.nonnoise_span_to_unique_sentinel
    assert words(inputs, iid) == "Thank you <X> me to your party <Y> week ."
    assert words(targets, iid) == "<X> for inviting <Y> last <Z>"
    assert words(inputs, spans) == "Thank you <X> to <Y> week ."
    assert words(targets, spans) == "<X> for inviting me <Y> your party last <Z>"
    assert words(noise.drop_noise_tokens, iid) == "Thank you me to your party week ."
    assert words(noise.drop_nonnoise_tokens, iid) == "for inviting last"
    assert words(noise.noise_token_to_sentinel, iid) == "Thank you <X> <X> me to your party <X> week ."


def span_mask(length, seeds, **settings):
    return noise.random_spans_noise_mask(length, 0.15, np.array([seeds], np.int64), **settings)[0]


def test_span_masks_begin_with_text_and_end_with_noise():
    seen = set()
    for seed in range(20):
        mask = span_mask(568, [[seed, 1], [2, seed]])
        starts = np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1)
        assert (mask.sum(), len(starts)) == (85, 28)
        assert not mask[0]
        assert mask[-1]
        seen.add(mask.tobytes())
    assert len(seen) == 20
    assert not span_mask(1, [[1, 2], [3, 4]]).any()


def test_objectives_agree_with_t5(golden_json):
    reference = golden_json("pretraining_objectives")
    for *settings, raw, targets in reference["random_spans_helper"]["rows"]:
        assert objectives.random_spans_helper(*settings) == (raw, targets), settings
    for length, count, spans in reference["noise_counts_density0.15_span3"]["rows"]:
        if length > 1:
            assert noise.noise_counts(length, 0.15, 3.0) == (count, spans)
    for case in reference["random_spans_noise_mask"]:
        assert case["noise_density"] == 0.15
        for expected, roll in ((case["mask"], False), (case["mask_random_roll"], True)):
            settings = {"mean_noise_span_length": case["mean_noise_span_length"], "random_roll": roll}
            found = span_mask(case["length"], case["seeds"], **settings)
            assert "".join(map(str, found.astype(int))) == expected

    class Size:
        vocab_size = reference["vocab_size"]

    for case in reference["encodings"]:
        for name, expected in case.items():
            if name not in ("tokens", "mask"):
                assert encoded(getattr(noise, name), case["tokens"], case["mask"], Size) == expected, name


def documents(lengths):
    """Documents of distinct tokens, so that where each token went can be told."""
    tokens = np.arange(3, 3 + sum(lengths), dtype=np.int32)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    return tf.data.Dataset.from_generator(
        lambda: ({"targets": p} for p in parts), output_signature={"targets": tf.TensorSpec([None], tf.int32)}
    )


def pieces(dataset):
    return [x["targets"].tolist() for x in dataset.as_numpy_iterator()]


def test_documents_are_joined_and_cut_without_loss():
    joined = pieces(objectives.split_documents(documents([5, 0, 7, 3]), 4))
    assert [len(p) for p in joined] == [4, 4, 4, 3]
    assert np.concatenate(joined).tolist() == list(range(3, 18))
    assert [len(p) for p in pieces(objectives.split_documents(documents([5, 0, 7]), 4, concatenate=False))] == [
        *(4, 1),
        *(4, 3),
    ]
    assert pieces(objectives.split_documents(documents([2, 3]), 4, eos=1)) == [[3, 4, 1, 5], [6, 7, 1]]


def test_blocks_of_any_size_are_regrouped():
    """As many examples as fit, in order; the same as those of a dataset that remembers no blocks."""
    sizes = [0, 3, 200, 0, 127, 300, 1]
    parts = np.split(np.arange(3, 3 + sum(sizes), dtype=np.int32), np.cumsum(sizes)[:-1])
    signature = {"targets": tf.RaggedTensorSpec([None, None], tf.int32, 1)}
    ragged = ({"targets": blocks.ragged(tf.constant(x), tf.ones(len(x), tf.int64))} for x in parts)
    examples = blocks.examples(tf.data.Dataset.from_generator(lambda: ragged, output_signature=signature))
    regrouped = [x["targets"] for x in blocks.in_blocks(examples, ["targets"])]
    assert [int(x.nrows()) for x in regrouped] == [128, 128, 128, 128, 119]
    assert np.concatenate([x.values for x in regrouped]).tolist() == np.concatenate(parts).tolist()


def test_long_documents_give_one_chunk(monkeypatch):
    monkeypatch.setattr(objectives, "_CHUNK", 4)
    with seqio.utils.map_seed_manager(1):
        chunks = pieces(objectives.split_documents(documents([10, 4] * 8), 4, concatenate=False))
    long = {tuple(np.array(c) - c[0]) for c in chunks[::2]}
    assert long == {(0, 1, 2, 3), (0, 1)}  # two of its chunks are whole, the last is the rest
    assert {(c[0] - 3) % 14 for c in chunks[::2]} == {0, 4, 8}
    assert all(len(c) == 4 for c in chunks[1::2])


def features(vocabulary):
    return {k: seqio.Feature(vocabulary) for k in ("inputs", "targets")}


def test_span_corruption_fills_the_inputs_and_loses_no_token():
    lengths = {"inputs": 64, "targets": 14}
    made = list(objectives.span_corruption(documents([140]), lengths, features(VOCABULARY)).as_numpy_iterator())
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
    with seqio.utils.map_seed_manager(11):
        dataset = objectives.span_corruption(documents([70]), {"inputs": 64, "targets": 14}, features(VOCABULARY))
    (x,) = dataset.as_numpy_iterator()
    assert x["targets"].tolist() == [358, 5, 6, 7, 8, 9, 10, 11, 357, 32, 33, 356, 72]  # by t5 0.9.4
    assert x["inputs"].tolist() == [*range(3, 5), 358, *range(12, 32), 357, *range(34, 72), 356]


def test_the_other_objectives_are_what_their_names_say():
    lengths, text = {"inputs": 51, "targets": 51}, list(range(3, 53))
    made = {}
    for name in (
        *("iid_denoising", "iid_drop_tokens", "mass_style_denoising", "bert_style_denoising"),
        *("deshuffling", "prefix_lm", "lm", "full_lm"),
    ):
        with seqio.utils.map_seed_manager(3):
            dataset = getattr(objectives, name)(documents([50]), lengths, features(VOCABULARY))
        (x,) = dataset.as_numpy_iterator()
        made[name] = x.get("inputs", np.zeros(0)).tolist(), x["targets"].tolist()

    inputs, targets = made["iid_drop_tokens"]  # the same mask as in the next three
    assert sorted(inputs + targets) == text
    assert 0 < len(targets) < 25
    assert [t for t in made["iid_denoising"][0] if t < 259] == inputs
    assert [t for t in made["iid_denoising"][1] if t < 259] == targets
    masked = [358 if t in targets else t for t in text]
    assert made["mass_style_denoising"] == (masked, text)
    assert made["bert_style_denoising"][1] == text
    assert [t for t, m in zip(made["bert_style_denoising"][0], masked, strict=True) if m != 358] == inputs
    shuffled, ordered = made["deshuffling"]
    assert ordered == text != shuffled
    assert sorted(shuffled) == text
    first, rest = made["prefix_lm"]
    assert first + rest == text
    assert first
    assert rest
    assert made["lm"] == ([], text)
    assert made["full_lm"] == ([], [*text, 1])


def test_bert_style_draws_a_tenth_at_random():
    tokens, mask = np.full((1, 20_000), 5, np.int32), np.ones((1, 20_000), bool)
    values, _ = noise.noise_token_to_random_token_or_sentinel(tokens, mask, VOCABULARY, SEEDS[None, :2])
    share = np.mean(values != 358)
    assert abs(share - 0.1 * 355 / 356) < 5 * np.sqrt(0.09 / 20_000)
    drawn = values[values != 358]
    assert drawn.min() == 3
    assert drawn.max() == 357


def test_objectives_say_what_is_wrong():
    text = documents([70])
    with pytest.raises(ValueError, match="targets' length to 14"):
        objectives.span_corruption(text, {"inputs": 64, "targets": 13}, features(VOCABULARY))
    with pytest.raises(ValueError, match="VOCABULARY_EXTRA_IDS = 3"):
        objectives.span_corruption(text, {"inputs": 64, "targets": 14}, features(seqio.PassThroughVocabulary(300)))
    with pytest.raises(ValueError, match="TASK_FEATURE_LENGTHS must give inputs, targets"):
        objectives.span_corruption(text, None, features(VOCABULARY))
    with pytest.raises(ValueError, match="TASK_FEATURE_LENGTHS must give targets"):
        objectives.lm(text, {"inputs": 64}, features(VOCABULARY))


FAST = ("c4_v020_unsupervised", "c4_v220_prefix_lm", "c4_v220_span_corruption")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in sorted(c4.OBJECTIVES)],
)
def test_every_c4_task_reads_files(name, corpus, bytes_vocabulary):
    (corpus / "c4").mkdir()
    with gzip.open(corpus / "c4/c4-train.00000-of-00001.json.gz", "wt") as file:
        for text in ("The house is wonderful.", "Thank you for inviting me to your party last week."):
            file.write(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n")
    lengths = {"inputs": 32, "targets": 48}
    task = seqio.TaskRegistry.get(name)
    assert task._cache_step_idx == 2  # as in t5: SeqIO's seeds for what follows depend on it
    examples = list(task.get_dataset(lengths, "train", shuffle=False, seed=0))
    again = list(seqio.TaskRegistry.get(name).get_dataset(lengths, "train", shuffle=False, seed=0))
    assert examples
    for x, y in zip(examples, again, strict=True):
        for feature in x:
            assert 0 < len(x[feature]) <= lengths[feature]
            assert x[feature].dtype == tf.int32
            assert np.array_equal(x[feature], y[feature])
        if not name.endswith("full_lm"):
            assert x["targets"][-1] == 1
