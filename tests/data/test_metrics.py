"""Metrics against hand-worked values, scikit-learn's through t5, and unreadable predictions."""

import math

import pytest

from tasks import metrics


def test_squad_takes_the_best_answer_after_normalisation():
    assert metrics.normalize_answer("The An a THE") == ""
    assert metrics.normalize_answer("A.B.C.  theater") == "abc theater"
    scores = metrics.squad([["Denver Broncos", "x"], ["Houston, Texas"]], ["the denver broncos!", "Texas"])
    assert scores == {"em": 50.0, "f1": pytest.approx((100 + 200 / 3) / 2)}


def test_squad_official_v11_gives_no_f1_to_two_empty_texts():
    assert metrics.squad([["the"]], ["a"]) == {"em": 100.0, "f1": 0.0}


def test_padded_answers_do_not_match_unpadded_predictions():
    assert metrics.squad([[" $ 3 . 5 billion"]], ["$3.5 billion"])["em"] == 0.0


def test_unreadable_predictions_are_wrong():
    labels = ("no", "yes")
    predictions = [metrics.string_to_class(text, labels) for text in ("yes", "maybe", "", "no")]
    assert predictions == [1, -1, -1, 0]
    targets = [1, 1, 0, 0]
    assert metrics.accuracy(targets, predictions) == {"accuracy": 50.0}
    # Unreadable ones count as the other class: 1 true positive, 1 false negative, 1 false positive.
    assert metrics.f1_score_with_invalid(targets, predictions) == {"f1": 50.0}
    assert -100 < metrics.matthews_corrcoef(targets, predictions)["matthews_corrcoef"] < 100
    assert [metrics.string_to_float(t) for t in ("2.4", "two", "", "nan", "inf")] == [2.4, -1, -1, -1, -1]


def test_correlations():
    assert metrics.pearson_corrcoef([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])["pearson_corrcoef"] == pytest.approx(100)
    assert metrics.spearman_corrcoef([1.0, 2.0, 3.0], [9.0, 4.0, 1.0])["spearman_corrcoef"] == pytest.approx(-100)
    constant = metrics.pearson_corrcoef([1.0, 2.0], [-1.0, -1.0])["pearson_corrcoef"]
    assert not math.isnan(constant)
    assert constant == 0.0


def test_matthews_by_hand():
    # 2 true positives, 1 true negative, 1 false positive, 1 false negative: (2*1 - 1*1) / sqrt(3*3*2*2)
    found = metrics.matthews_corrcoef([1, 1, 0, 0, 1], [1, 1, 0, 1, 0])["matthews_corrcoef"]
    assert found == pytest.approx(100 / 6)
    assert metrics.matthews_corrcoef([1, 1], [1, 1])["matthews_corrcoef"] == 0.0


def test_answers_come_decoded_as_targets():
    example = {"answers": [b"caf\xc3\xa9", b"bar"]}
    assert metrics.qa_answers("ignored", example=example, is_target=True) == ["café", "bar"]
    assert metrics.qa_answers("said", example=example) == "said"


def test_spans_are_looked_up_in_the_context():
    target = metrics.span_answers(
        "", example={"answers": [b"Denver Broncos"], "context": b"The Denver Broncos , who won"}, is_target=True
    )
    assert target == {"answers": ["Denver Broncos"], "context": "The Denver Broncos , who won"}
    for prediction, em in (
        ("start: 1 end: 2", 100.0),
        ("start: 0 end: 2", 100.0),  # "the" is no matter
        ("start: 1 end: 3", 0.0),  # the comma is no word
        ("start: 2 end: 1", 0.0),
        ("start: one end: 2", 0.0),
        ("start: 1", 0.0),
        ("", 0.0),
    ):
        assert metrics.span_squad([target], [metrics.span_answers(prediction)])["em"] == em, prediction


def test_rouge_splits_sentences_as_t5_does():
    pytest.importorskip("rouge_score")
    # 2 of 4 words and 0 of 3 pairs are shared; sentence by sentence both words are found, in whatever order.
    found = metrics.rouge(["a b . c d"], ["c x . a y"])
    assert found == pytest.approx({"rouge1": 50.0, "rouge2": 0.0, "rougeLsum": 50.0})
    assert metrics.rouge(["a b\nc d", "e"], ["c x\na y", "f"])["rougeLsum"] == pytest.approx(25.0)
    assert metrics.rouge(["a b c d"], ["c x a y"])["rougeLsum"] == pytest.approx(25.0), "as one sentence, in order only"


BASELINE = {  # the T5 paper's, Table 16
    "glue_cola_v002": {"matthews_corrcoef": 53.84},
    "glue_sst2_v002": {"accuracy": 92.68},
    "glue_mrpc_v002": {"f1": 92.07, "accuracy": 88.92},
    "glue_stsb_v002": {"pearson_corrcoef": 88.02, "spearman_corrcoef": 87.94},
    "glue_qqp_v002": {"f1": 88.67, "accuracy": 91.56},
    "glue_mnli_matched_v002": {"accuracy": 84.24},
    "glue_mnli_mismatched_v002": {"accuracy": 84.57},
    "glue_qnli_v002": {"accuracy": 90.48},
    "glue_rte_v002": {"accuracy": 76.28},
}


def test_glue_average_is_the_papers():
    others = {"glue_wnli_v002": {"accuracy": 0.0}, "squad_v010_allanswers": {"em": 0.0}}
    assert metrics.glue_average(BASELINE | others) == pytest.approx(83.28, abs=0.005)
    assert metrics.average_missing("glue", BASELINE | others) == []


def test_no_glue_average_of_fewer_tasks():
    scores = {task: values for task, values in BASELINE.items() if task != "glue_rte_v002"}
    scores["glue_mrpc_v002"] = {"f1": 92.07}
    with pytest.raises(ValueError, match="without glue_mrpc_v002/accuracy, glue_rte_v002/accuracy"):
        metrics.glue_average(scores)


def test_agrees_with_t5(golden_json):
    reference = golden_json("metrics")
    for case in reference["squad"]["per_example"]:
        assert metrics.squad([case["answers"]], [case["prediction"]]) == {"em": case["em"], "f1": case["f1"]}
    for text, normalized, _ in reference["normalize_squad"]:
        assert metrics.normalize_answer(text) == normalized
    for case in reference["classification"]:
        found = getattr(metrics, case["metric"])(case["targets"], case["predictions"])
        assert found == pytest.approx(case["result"], rel=1e-12), case["metric"]
