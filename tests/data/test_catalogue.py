"""The t5 package's catalogue: names, features, splits, metrics, text and rates against its own."""

import gzip
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

import tasks
from tasks import metrics, mixtures, prefix_lm, sentinels, trivia_qa, wmt

# t5's closures have names that say nothing.
METRIC_NAMES = {
    ("glue_cola_v002", "fn"): "matthews_corrcoef",
    ("super_glue_cb_v102", "fn"): "mean_3class_f1",
    ("super_glue_multirc_v102", "my_metric"): "mean_group_all_match",
    ("super_glue_record_v102", "_deduplicated_metric"): "deduplicated_squad",
}


def test_all_tasks_of_t5_have_its_features_splits_and_metrics(golden_json):
    registered = golden_json("text_preprocessors")["registered_tasks"]
    assert len(registered) == 60
    for name, expected in registered.items():
        task = seqio.TaskRegistry.get(name)
        features = {k: {"add_eos": f.add_eos, "required": f.required} for k, f in task.output_features.items()}
        assert features == expected["output_features"], name
        if expected["source_splits"]:
            assert list(task.source._splits) == expected["source_splits"], name
        plain_name = name.replace("_1_sentinel", "")
        wanted = [METRIC_NAMES.get((plain_name, metric), metric) for metric in expected["metrics"]]
        assert [metric.__name__ for metric in task.metric_fns] == wanted, name
        corpus, version = expected["source"].split(":")
        newer = {"glue": "2.0.0"}.get(corpus.split("/")[0], version)
        assert task.source._tfds_name == f"{corpus}:{newer}", name


def to_text(task, example):
    """What a task makes of a raw example before it is tokenised, without TensorFlow's types."""
    dataset = tf.data.Dataset.from_tensors(tensors(example))
    for step in seqio.TaskRegistry.get(task).preprocessors:
        if step is seqio.preprocessors.tokenize:
            break
        dataset = step(dataset)
    return [{k: plain(v) for k, v in row.items()} for row in dataset.as_numpy_iterator()]


def tensors(value):
    if isinstance(value, dict):
        return {key: tensors(item) for key, item in value.items()}
    return tf.constant(value, tf.string if isinstance(value, list) and not value else None)


def plain(value):
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


TEXTS = sorted(
    (*(name for name in seqio.TaskRegistry.names() if name.startswith("super_glue_") and "sentinel" not in name),
     *wmt.TASKS, "dpr_v001_simple", "glue_wnli_v002_simple_eval", "trivia_qa_v010")
)  # fmt: skip


@pytest.mark.parametrize("task", TEXTS)
def test_text_agrees_with_t5(task, golden_json):
    cases = golden_json("catalogue")["text"][task]
    reference = golden_json("text_preprocessors")
    cases += reference["super_glue"].get(task.removeprefix("super_glue_").removesuffix("_v102"), [])
    cases += [case for case in reference["wmt"] if case["task"] == task]
    cases += reference.get(task, [])
    for case in cases:
        assert to_text(task, case["example"]) == case["output"], case["example"]


def test_metrics_agree_with_t5(golden_json):
    reference = golden_json("catalogue")
    made = {metric.__name__: metric for name in TEXTS for metric in seqio.TaskRegistry.get(name).metric_fns}
    for case in reference["metrics"]:
        if case["metric"] == "bleu":
            pytest.importorskip("sacrebleu")
        metric = made.get(case["metric"]) or getattr(metrics, case["metric"])
        assert metric(case["targets"], case["predictions"]) == pytest.approx(case["result"], abs=1e-9), case
    for case in reference["wsc_simple"]:
        example = {"targets_pretokenized": case["candidate"].encode(), "label": 1}
        assert metrics.wsc_simple(case["prediction"], example=example) == case["result"], case
    assert len({case["result"] for case in reference["wsc_simple"]}) == 3


def test_targets_of_grouped_metrics_have_their_group():
    example = {"idx/question": np.int32(3), "idx/passage": np.int32(1), "idx/query": np.int32(2), "answers": [b"a"]}
    assert metrics.multirc("True", example=example, is_target=True) == {"value": 1, "group": 3}
    assert metrics.multirc("yes", example=example) == {"value": -1}
    assert metrics.record("x", example=example, is_target=True) == {"value": ["a"], "group": (1, 2)}
    assert metrics.record("x", example=example) == {"value": "x"}
    assert metrics.wsc_simple("x", example={"label": np.int64(0)}, is_target=True) == 0


def test_mixtures_have_t5s_tasks_and_rates(golden_json):
    reference = golden_json("catalogue")["mixtures"]
    assert len(reference) == 20
    for name, rates in reference.items():
        mixture = seqio.MixtureRegistry.get(name)
        expected = {t: mixtures.TRAIN_EXAMPLES[t] if rate == "examples" else rate for t, rate in rates.items()}
        assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == expected, name


def test_limited_mixtures_have_the_papers_limit():
    limited = seqio.MixtureRegistry.get("all_proportional_k19")
    rates = {task.name: limited.get_rate(task) for task in limited.tasks}
    assert rates["c4_v020_unsupervised"] == rates["wmt15_enfr_v003"] == 2**19
    assert rates["super_glue_rte_v102"] == 1245
    assert rates["glue_qqp_v002"] == 363_849
    assert "en_mix_k19" not in seqio.MixtureRegistry.names()  # its rate for C4 is chosen


def test_super_glue_average_is_of_eight_tasks():
    scores = {task: dict.fromkeys(names, 60.0) for part in metrics.SUPER_GLUE_AVERAGE for task, names in part.items()}
    scores["super_glue_cb_v102"] = {"mean_3class_f1": 80.0, "accuracy": 100.0}
    assert len(metrics.SUPER_GLUE_AVERAGE) == 8
    assert metrics.super_glue_average(scores | {"super_glue_axb_v102": {}}) == pytest.approx(60 + 30 / 8)
    twins = {sentinels.twin_name(task): values for task, values in scores.items()}
    assert metrics.super_glue_average(twins) == metrics.super_glue_average(scores)
    del scores["super_glue_record_v102"]["em"]
    with pytest.raises(ValueError, match="no average of super_glue without super_glue_record_v102/em"):
        metrics.super_glue_average(scores)


# --------------------------------------------------------------------------------------------------------------- tokens


def test_a_twin_has_a_sentinel_between_text_and_eos(corpus, bytes_vocabulary):
    (corpus / "super_glue/CB").mkdir(parents=True)
    row = {"premise": "p" * 50, "hypothesis": "h", "label": "neutral", "idx": 0}
    (corpus / "super_glue/CB/train.jsonl").write_text(json.dumps(row))
    lengths, sentinel = {"inputs": 20, "targets": 5}, bytes_vocabulary.vocab_size - 1
    (x,) = seqio.TaskRegistry.get("super_glue_cb_v102_1_sentinel").get_dataset(lengths, "train", shuffle=False)
    text = bytes_vocabulary.encode("cb hypothesis: h premise")
    assert x["inputs"].numpy().tolist() == [*text[:18], sentinel, 1]
    assert x["targets"].numpy().tolist() == [sentinel, *bytes_vocabulary.encode("ne"), *bytes_vocabulary.encode("l"), 1]


def test_a_twins_predictions_lose_their_sentinel(monkeypatch):
    monkeypatch.setattr(tasks.vocabulary.SHARED, "decode", lambda ids: "<extra_id_0>", raising=False)
    monkeypatch.setattr(sentinels, "_sentinel", lambda which: 9)
    task = seqio.TaskRegistry.get("super_glue_cb_v102_1_sentinel")
    texts = ("<extra_id_0> neutral", "neutral", "<extra_id_1> neutral")
    assert [task.postprocess_fn(text, example={}, is_target=False) for text in texts] == [2, 2, -1]
    dpr = seqio.TaskRegistry.get("dpr_v001_simple_1_sentinel")
    assert dpr.postprocess_fn("<extra_id_0> Tom", example={}, is_target=True) == "Tom"
    assert sentinels.twin_name("super_glue_wsc_v102_simple_eval") == "super_glue_wsc_v102_simple_1_sentinel_eval"


FEATURE = seqio.Feature(seqio.PassThroughVocabulary(400, eos_id=1), required=False)


def pieces(*documents):
    spec = {"targets": tf.TensorSpec([None], tf.int32)}
    return tf.data.Dataset.from_generator(lambda: ({"targets": d} for d in documents), output_signature=spec)


def test_prefix_lm_packs_two_pieces_without_padding():
    with seqio.utils.map_seed_manager(5):
        dataset = prefix_lm.full_targets(pieces([*range(3, 40)]), {"targets": 16}, {"targets": FEATURE})
        packed = prefix_lm.pack_encoder_decoder(dataset, {"targets": 16})
    (x,) = packed.as_numpy_iterator()  # 38 tokens are two pieces and a rest, which has no partner
    assert set(x) == set(prefix_lm.ENCODER_DECODER)
    prefixes = [x["encoder_input_tokens"][x["encoder_segment_ids"] == k].tolist() for k in (1, 2)]
    rests = [x["decoder_target_tokens"][x["decoder_segment_ids"] == k].tolist() for k in (1, 2)]
    assert [a + b for a, b in zip(prefixes, rests, strict=True)] == [[*range(3, 19)], [*range(19, 35)]]
    assert all(prefixes)
    assert all(rests)
    for k, rest in zip((1, 2), rests, strict=True):
        assert x["decoder_input_tokens"][x["decoder_segment_ids"] == k].tolist() == [0, *rest[:-1]]
        assert x["decoder_positions"][x["decoder_segment_ids"] == k].tolist() == [*range(len(rest))]
    assert x["decoder_loss_weights"].tolist() == [1] * 16


def test_prefix_lm_of_a_decoder_has_its_loss_behind_the_prefix():
    with seqio.utils.map_seed_manager(5):
        dataset = prefix_lm.full_targets(pieces([*range(3, 30)]), {"targets": 16}, {"targets": FEATURE})
        first, second = prefix_lm.pack_decoder_only(dataset, {"targets": 16}).as_numpy_iterator()
    assert set(first) == set(prefix_lm.DECODER)
    split = first["decoder_loss_weights"].tolist().index(1)
    assert first["decoder_causal_attention"].tolist() == [1] * (split + 1) + [0] * (15 - split)
    assert second["decoder_target_tokens"].tolist() == [*range(19, 30), 1, 0, 0, 0, 0]
    assert second["decoder_loss_weights"].tolist()[12:] == [0] * 4
    for lengths in ({"targets": 15}, {"targets": 16, "inputs": 8}):
        with pytest.raises(ValueError, match="one even length"):
            prefix_lm.pack_decoder_only(dataset, lengths)


DOCUMENTS = {
    "c4_noclean_v020_unsupervised": "c4/en.noclean/c4-train.00000-of-00002.json.gz",
    "c4_webtextlike_v020_unsupervised": "c4/webtextlike/c4-train.00000-of-00002.json.gz",
    "mc4.zh_Latn": "c4/multilingual/c4-zh-Latn.tfrecord-00000-of-00008.json.gz",
    "wikipedia_20190301.en_v003_unsupervised": "wikipedia/20190301.en/train-1.json",
    "c4_prefix_lm_objective_encoder_decoder_architecture": "c4/c4-train.00000-of-00001.json.gz",
    "c4_prefix_lm_objective_decoder_architecture": "c4/c4-train.00000-of-00001.json.gz",
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tasks_of_documents_read_files(name, corpus, bytes_vocabulary):
    path = corpus / DOCUMENTS[name]
    path.parent.mkdir(parents=True)
    content = json.dumps({"text": "The house is wonderful, and so is the garden behind it."}).encode() + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    task = seqio.TaskRegistry.get(name)
    lengths = dict.fromkeys(("inputs", "targets"), 16)
    assert [*task.splits] == ["train"]
    (x, *_) = task.get_dataset(lengths, "train", shuffle=False, seed=0)
    assert set(x) == {feature for feature in task.output_features if feature != "targets" or "prefix_lm" not in name}
    assert all(0 < len(tokens) <= 16 for tokens in x.values())


def test_trivia_qas_long_inputs_keep_their_answer():
    rows = [([*range(3, 40)], [20, 21]), ([*range(3, 40)], [99]), ([3, 4], [99]), ([*range(3, 40)], [*range(3, 20)])]
    spec = {name: tf.TensorSpec([None], tf.int32) for name in ("inputs", "targets")}
    rows = [{"inputs": inputs, "targets": targets} for inputs, targets in rows]
    dataset = tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=spec)
    starts = set()
    for seed in range(8):
        with seqio.utils.map_seed_manager(seed):
            cut = trivia_qa.truncate_inputs(dataset, {"inputs": 10})
        long, short = (row["inputs"].tolist() for row in cut.as_numpy_iterator())
        assert len(long) == 10
        assert {20, 21} < set(long)
        assert short == [3, 4]
        starts.add(long[0])
    assert {*range(12, 21)} >= starts
    assert len(starts) > 3
