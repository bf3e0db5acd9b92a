"""Batches: an order that one seed fixes, a position that can be gone back to, and errors before anything is read."""

import logging

import numpy as np
import pytest
import seqio
import tensorflow as tf

import tasks  # noqa: F401  registers C4
from t5x_lite import convert
from t5x_lite.data import inspection, packing, pipeline
from t5x_lite.data.feature_converters import DecoderFeatureConverter, EncDecFeatureConverter
from t5x_lite.errors import UserError
from tasks import vocabulary

VOCABULARY = seqio.ByteVocabulary(extra_ids=10)
LENGTHS = {"inputs": 24, "targets": 12}


@seqio.map_over_dataset(num_seeds=1)
def with_noise(example, seed):
    number = tf.strings.as_string(tf.random.stateless_uniform([], seed, 0, 1000, tf.int32))
    return {**example, "inputs": tf.strings.join([example["inputs"], " ", number])}


def in_memory(prefix: str, sizes: dict[str, int]) -> seqio.FunctionDataSource:
    def read(split, shuffle_files, seed=None):
        numbers = [str(i) for i in range(sizes[split])]
        return tf.data.Dataset.from_tensor_slices({"inputs": [f"{prefix} {i}" for i in numbers], "targets": numbers})

    return seqio.FunctionDataSource(read, splits=list(sizes), num_input_examples=sizes)


def register(name: str, sizes: dict[str, int]) -> None:
    seqio.TaskRegistry.add(
        name,
        source=in_memory(name.removeprefix("data_test_"), sizes),
        preprocessors=[
            seqio.CacheDatasetPlaceholder(),
            with_noise,
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={k: seqio.Feature(VOCABULARY, add_eos=True) for k in LENGTHS},
        shuffle_buffer_size=20,
    )


@pytest.fixture(scope="module", autouse=True)
def registered():
    register("data_test_long", {"train": 90, "validation": 7})
    register("data_test_short", {"train": 30})
    seqio.MixtureRegistry.add("data_test_mix", [("data_test_long", 3), ("data_test_short", 1)])
    seqio.MixtureRegistry.add("data_test_nothing", [("data_test_long", 0), ("data_test_short", 0)])
    yield
    for name in ("data_test_mix", "data_test_nothing"):
        seqio.MixtureRegistry.remove(name)
    for name in ("data_test_long", "data_test_short"):
        seqio.TaskRegistry.remove(name)


def batches(seed=5, **changes) -> pipeline.TrainBatches:
    return pipeline.TrainBatches("data_test_mix", LENGTHS, **{"batch_size": 4, "seed": seed, **changes})


def take(stream, count):
    return [next(stream) for _ in range(count)]


def equal(a, b) -> bool:
    return all(x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


def test_batches_have_the_agreed_names_shapes_and_dtype():
    (batch,) = take(batches(), 1)
    inputs = {"encoder_input_tokens", "encoder_segment_ids", "encoder_positions"}
    targets = {"decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"}
    targets |= {"decoder_segment_ids", "decoder_positions"}
    assert {k: v.shape for k, v in batch.items()} == dict.fromkeys(inputs, (4, 24)) | dict.fromkeys(targets, (4, 12))
    assert {v.dtype for v in batch.values()} == {np.dtype(np.int32)}
    assert batch["encoder_segment_ids"].max() > 1, "packed"
    assert batches().shapes == {k: v.shape for k, v in batch.items()}
    (unpacked,) = take(batches(converter=pipeline.UNPACKED), 1)
    assert set(unpacked) == {"encoder_input_tokens"} | {t for t in targets if "segment" not in t and "pos" not in t}


@pytest.fixture(scope="module")
def reference(registered):
    """The first batches of `batches()`, read in one go."""
    return take(batches(), 60)


def test_the_seed_fixes_the_order(reference):
    assert equal(take(batches(), 30), reference[:30])
    assert not equal(take(batches(seed=6), 30), reference[:30])
    text = inspection.describe_batch(reference[0], VOCABULARY) + inspection.describe_batch(reference[1], VOCABULARY)
    assert "long" in text
    assert "short" in text


# Batches of similar length


def test_a_batch_is_cut_to_the_least_width_that_holds_it():
    tokens = np.zeros((3, 100), np.int32)
    tokens[0, :20], tokens[1, :5] = 7, 7
    rows = {"inputs": tokens, "segments": np.zeros((3, 100), np.int32), "label": np.array([[1], [0], [1]], np.int32)}
    assert packing.level(rows) == 2  # of steps of 16
    assert {k: x.shape for k, x in packing.trimmed(rows, 2).items()} == {
        "inputs": (3, 32),
        "segments": (3, 32),
        "label": (3, 1),
    }
    tokens[2, 99] = 7
    assert packing.trimmed(rows, packing.level(rows))["inputs"].shape == (3, 100)
    assert packing.level({"inputs": tokens * 0, "label": rows["label"]}) == 1


GROUPED = {"converter": pipeline.UNPACKED, "group_by_length": True}


def test_batches_of_similar_length_hold_the_same_examples(tmp_path):
    """Sixteen batches at a time have the examples of sixteen others; a position among them can be gone on from."""
    stream = batches(**GROUPED)
    made = take(stream, 20)
    stream.save(str(tmp_path))
    expected = take(stream, 28)
    again = batches(**GROUPED)
    again.restore(str(tmp_path))
    assert equal(take(again, 28), expected)
    made += expected
    plain = take(batches(converter=pipeline.UNPACKED), 48)
    assert {batch["encoder_input_tokens"].shape[1] for batch in made} == {16}  # 8 is too short for all, 24 is too long
    spread = [np.mean([np.ptp(np.count_nonzero(b["encoder_input_tokens"], 1)) for b in x]) for x in (made, plain)]
    assert spread[0] < 0.4 * spread[1]
    for window in range(3):
        one, other = (
            [
                (*np.trim_zeros(x, "b"), 0, *np.trim_zeros(y, "b"))
                for batch in source[16 * window : 16 * window + 16]
                for x, y in zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True)
            ]
            for source in (made, plain)
        )
        assert sorted(one) == sorted(other) and one != other
    with pytest.raises(UserError, match="GROUP_BY_LENGTH is for rows of one example"):
        batches(group_by_length=True)


def test_hosts_agree_on_the_width_of_a_batch():
    asked = []
    both = batches(**GROUPED, shards=2)
    whole = take(both, 16)
    parts = []
    for rows in ((0, 2), (2, 4)):
        stream = batches(**GROUPED, shards=2, rows=rows, agreed=lambda n: asked.append(n) or 8)
        parts.append(take(stream, 16))
    levels = np.array(asked).reshape(2, 16).max(0)
    for batch, level, *halves in zip(whole, levels, *parts, strict=True):
        for name, x in batch.items():
            joined = np.concatenate([half[name] for half in halves])
            np.testing.assert_array_equal(packing.trimmed({name: joined}, int(level))[name], x)


@pytest.mark.parametrize("consumed", [1, 37])
def test_a_restored_position_goes_on_with_the_same_batches(tmp_path, reference, consumed):
    stream = batches()
    take(stream, consumed)
    stream.save(str(tmp_path))
    expected = reference[consumed : consumed + 20]
    assert equal(take(stream, 20), expected), "saving disturbs nothing"
    resumed = batches()
    resumed.restore(str(tmp_path))
    assert equal(take(resumed, 20), expected)
    assert not equal(reference[:20], expected), "starting over would differ"


def test_a_position_in_other_data_is_refused(tmp_path):
    batches().save(str(tmp_path))
    with pytest.raises(ValueError, match=r"(?s)BATCH_SIZE: was 4, is 8\n  seed: was 5, is 6\n.*new MODEL_DIR"):
        batches(seed=6, batch_size=8).restore(str(tmp_path))


def of_host(host, hosts, **options) -> pipeline.TrainBatches:
    rows = 8 // hosts
    options = {"batch_size": 8, "rows": (host * rows, (host + 1) * rows), **options}
    return batches(**options)


def test_hosts_share_the_batch_and_see_different_examples():
    seen = []
    for host in range(2):
        stream = pipeline.TrainBatches(
            "data_test_short", LENGTHS, batch_size=4, seed=1, converter=pipeline.UNPACKED, rows=(2 * host, 2 * host + 2)
        )
        rows = [row for batch in take(stream, 30) for row in batch["decoder_target_tokens"]]
        assert len(rows) == 60
        seen.append({VOCABULARY.decode(row.tolist()) for row in rows})
    assert seen[0] | seen[1] == {str(i) for i in range(30)}
    assert not seen[0] & seen[1]
    with pytest.raises(ValueError, match="BATCH_SIZE=4 must be a positive multiple of DATA_SHARDS=3"):
        batches(shards=3)


def joined(streams, count):
    """Global batches, from the hosts' rows."""
    parts = [take(stream, count) for stream in streams]
    return [{k: np.concatenate([rows[k] for rows in of]) for k in of[0]} for of in zip(*parts, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_goes_on_with_the_same_global_batches(tmp_path, hosts):
    started = [of_host(host, 2) for host in range(2)]
    assert [stream.shards for stream in started] == [2, 2]
    first = joined(started, 3)
    for stream in started:
        stream.save(str(tmp_path))
    expected = joined(started, 5)
    resumed = [of_host(host, hosts) for host in range(hosts)]
    for stream in resumed:
        stream.restore(str(tmp_path))
    assert equal(joined(resumed, 5), expected)
    again = tmp_path / "again"
    again.mkdir()
    for stream in resumed:
        stream.save(str(again))
    assert sorted(p.name for p in again.glob("*.index")) == ["shard_0.index", "shard_1.index"]
    assert equal(joined([of_host(host, hosts, shards=2) for host in range(hosts)], 3), first)
    if hosts != 2:
        assert not equal(joined([of_host(host, hosts) for host in range(hosts)], 3), first), (
            "other shards, other batches"
        )
    with pytest.raises(ValueError, match="DATA_SHARDS: was 2, is 4"):
        of_host(0, 2, shards=4).restore(str(tmp_path))


def test_examples_that_run_out_are_said_not_waited_for():
    seqio.TaskRegistry.add(
        "data_test_empty",
        source=in_memory("none", {"train": 5}),
        preprocessors=[lambda ds: ds.take(0), seqio.preprocessors.tokenize],
        output_features={k: seqio.Feature(VOCABULARY) for k in LENGTHS},
    )
    try:
        with pytest.raises(ValueError, match="data_test_empty ran out of examples"):
            next(pipeline.TrainBatches("data_test_empty", LENGTHS, batch_size=2, seed=0, shuffle=False))
    finally:
        seqio.TaskRegistry.remove("data_test_empty")


def test_eval_batches_are_whole_in_order_and_weigh_what_fills_up_as_nothing():
    stream = pipeline.EvalBatches("data_test_long", LENGTHS, batch_size=4)
    first, second = list(stream)
    assert equal([first, second], list(stream)), "again and again"
    targets = [VOCABULARY.decode(row.tolist()) for b in (first, second) for row in b["decoder_target_tokens"]]
    assert targets == [*map(str, range(7)), ""]
    assert first["decoder_loss_weights"].sum() == 8  # a digit and an EOS each
    assert second["decoder_loss_weights"].sum(axis=1).tolist() == [2, 2, 2, 0]
    assert all(not second[k][3].any() for k in second)
    limited = pipeline.EvalBatches("data_test_long", LENGTHS, batch_size=4, num_batches=1)
    assert equal(list(limited), [first])
    assert next(iter(limited)) is next(iter(limited)), "read once"


def test_packed_eval_batches_are_the_same_examples_in_fewer_rows():
    plain, packed = (
        list(pipeline.EvalBatches("data_test_long", LENGTHS, batch_size=2, converter=converter))
        for converter in (pipeline.UNPACKED, pipeline.PACKED)
    )
    for name in ("encoder_input_tokens", "decoder_target_tokens"):
        tokens = [np.concatenate([batch[name].ravel() for batch in of]) for of in (plain, packed)]
        assert np.array_equal(*(row[row > 0] for row in tokens))
    assert len(plain) == 4 and len(packed) == 2 and packed[0]["encoder_segment_ids"].max() == 2


def test_eval_batches_of_two_hosts_are_those_of_one_cut_in_two():
    whole = list(pipeline.EvalBatches("data_test_long", LENGTHS, batch_size=4))
    parts = [
        list(pipeline.EvalBatches("data_test_long", LENGTHS, batch_size=4, rows=rows)) for rows in ((0, 2), (2, 4))
    ]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
    assert equal(joined, whole)


def test_the_tokenizer_is_kept_where_load_finds_it(tmp_path, data_dir):
    file = data_dir / "vocab" / "sentencepiece.model"
    vocabulary.set_default(str(file))
    try:
        pipeline.keep_tokenizer("c4_v220_span_corruption", tmp_path)
    finally:
        vocabulary.set_default(None)
    assert convert.tokenizer_file(tmp_path) == tmp_path / "spiece.model"
    assert (tmp_path / "spiece.model").read_bytes() == file.read_bytes()


def test_tasks_with_split(caplog):
    caplog.set_level(logging.INFO)
    assert pipeline.tasks_with_split("data_test_mix", "validation") == ["data_test_long"]
    assert "data_test_short" in caplog.text
    assert pipeline.tasks_with_split("data_test_mix", "train") == ["data_test_long", "data_test_short"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pipeline.find_provider("data_test_mux"), r"'data_test_mux' .* Nearest of \d+: data_test_mix"),
        (lambda: pipeline.check_split("data_test_short", "validation"), r"no split 'validation', only \['train'\]"),
        (lambda: pipeline.check_split("data_test_nothing", "train"), "rate 0 for every task"),
        (lambda: pipeline.check_lengths("data_test_mix", {"inputs": 5}), r"\{'inputs': 5\} must give a length for"),
        (lambda: pipeline.check_lengths("data_test_mix", {**LENGTHS, "extra": 1}), "and nothing else"),
        (lambda: pipeline.check_lengths("data_test_mix", {**LENGTHS, "inputs": 0}), "above 0"),
        (
            lambda: pipeline.check_vocabulary("data_test_mix", 268),
            r"ids up to 268 in 'inputs' \(vocabulary of 269: ByteVocabulary\), the model has vocab_size=268. .*=384",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_names_and_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_vocabulary_that_fits_passes_and_one_far_too_small_is_remarked_on(caplog):
    pipeline.check_vocabulary("data_test_mix", 269)
    pipeline.check_vocabulary("data_test_mix", 384)
    assert not caplog.records
    pipeline.check_vocabulary("data_test_mix", 32128)
    assert "uses 269 ids in 'inputs', the model has vocab_size=32128" in caplog.text


def test_describe_batch_shows_segments_positions_spans_and_efficiency():
    def row(*segments):
        return [VOCABULARY.encode(s) if isinstance(s, str) else s for s in segments]

    first, second = [*row("ab")[0], 268, *row("c")[0], 1], [*row("de")[0], 1]
    targets_first, targets_second = [268, *row("xy")[0], 267, *row("z")[0], 1], [*row("w")[0], 1]
    batch = {
        "encoder_input_tokens": [first + second + [0] * 2],
        "encoder_segment_ids": [[1] * 5 + [2] * 3 + [0] * 2],
        "encoder_positions": [[*range(5), *range(3), 0, 0]],
        "decoder_target_tokens": [targets_first + targets_second],
        "decoder_segment_ids": [[1] * 6 + [2] * 2],
        "decoder_positions": [[*range(6), *range(2)]],
        "decoder_loss_weights": [[1] * 8],
    }
    assert inspection.describe_batch({k: np.array(v) for k, v in batch.items()}, VOCABULARY).splitlines() == [
        "row 0: inputs 8/10 tokens, targets 8/8, 2 segments",
        "  segment 1: inputs [0:5] (positions 0..4), targets [0:6] (positions 0..5)",
        "    inputs:  abc",
        "    targets: xyz",
        "    span <extra_id_0>: 'xy'",
        "    span <extra_id_1>: 'z'",
        "  segment 2: inputs [5:8] (positions 0..2), targets [6:8] (positions 0..1)",
        "    inputs:  de",
        "    targets: w",
        "packing efficiency: 80.0% of 10 input and 100.0% of 8 target positions hold tokens; sum of loss weights 8",
    ]


def test_tensorflow_sees_no_accelerator():
    assert {device.device_type for device in tf.config.get_visible_devices()} == {"CPU"}


CONVERTERS = {
    (EncDecFeatureConverter, True): seqio.EncDecFeatureConverter,
    (DecoderFeatureConverter, True): seqio.PrefixLMFeatureConverter,
    (DecoderFeatureConverter, False): seqio.LMFeatureConverter,
}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("converter", "with_inputs"), CONVERTERS)
def test_rows_are_seqios(converter, with_inputs, pack):
    random = np.random.default_rng(0)
    lengths = {"inputs": 32, "targets": 16} if with_inputs else {"targets": 16}

    def example():
        return {k: random.integers(1, 99, random.integers(1, n), np.int32) for k, n in lengths.items()}

    examples = [example() for _ in range(200)] + [{k: np.arange(1, n + 1, dtype=np.int32) for k, n in lengths.items()}]
    signature = {k: tf.TensorSpec([None], tf.int32) for k in lengths}
    dataset = tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=signature)
    expected = list(CONVERTERS[converter, with_inputs](pack=pack)(dataset, lengths).as_numpy_iterator())
    found = list(pipeline._rows("a task", dataset, lengths, converter(pack)).unbatch().as_numpy_iterator())
    assert not pack or max(x["decoder_segment_ids"].max() for x in expected) > 1
    for x, y in zip(found, expected, strict=True):
        if not with_inputs:  # SeqIO's language model has no prefix; ours is the start token alone, which all see anyway
            start = x.pop("decoder_causal_attention")
            np.testing.assert_array_equal(start, (x["decoder_target_tokens"] != 0) & (x["decoder_input_tokens"] == 0))
        assert x.keys() == y.keys()
        for k in x:
            np.testing.assert_array_equal(x[k], y[k], k)


def test_examples_without_inputs_are_for_a_decoder_alone():
    dataset = tf.data.Dataset.from_tensors({"targets": tf.constant([1, 2])})
    with pytest.raises(ValueError, match=r"no inputs: .*decoder-only"):
        pipeline._rows("a task", dataset, LENGTHS, EncDecFeatureConverter())


def test_a_batch_of_a_decoder_alone_is_read_back_as_text():
    batch = next(batches(converter=DecoderFeatureConverter()))
    assert batch["decoder_target_tokens"].shape == (4, 36)
    text = inspection.describe_batch(batch, VOCABULARY)
    plain = inspection.describe_batch(next(batches()), VOCABULARY)
    line = next(line for line in plain.splitlines() if "inputs:  " in line)
    assert line in text and "segment 2" in text
