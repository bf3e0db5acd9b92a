"""Rates against the paper's formulas, t5's numbers and empirical draws."""

import math

import pytest
import seqio
import tensorflow as tf

from tasks import mixtures


def test_rates_of_glue_and_squad_from_the_published_counts():
    # FACTS: GLUE (8) + SQuAD, columns K = 2^16, T = 2 with K = 2^21, equal.
    tasks = mixtures.SETS["glue_squad"]
    capped = mixtures.rates(tasks, "proportional", limit=2**16)
    assert capped["glue_cola_v002"] == pytest.approx(0.024562, abs=1e-6)
    assert capped["squad_v010_allanswers"] == pytest.approx(0.188247, abs=1e-6)
    tempered = mixtures.rates(tasks, "temperature", limit=2**21, temperature=2)
    assert tempered["glue_mnli_v002"] == pytest.approx(0.262448, abs=1e-6)
    assert set(mixtures.rates(tasks, "equal").values()) == {1 / 9}
    assert mixtures.rates(tasks) == mixtures.rates(tasks, limit=2**19) != capped


def test_rates_agree_with_t5(golden_json):
    reference = golden_json("mixing_rates")
    for name, expected in reference["sets"]["glue8"].items():
        strategy = name.split("_")[0]
        limit = 2.0 ** int(name.split("2^")[1].split("_")[0]) if "2^" in name else None
        temperature = float(name.split("_T")[1].split("_")[0]) if "_T" in name else 1.0
        scale = 0.5 if strategy.startswith("scale") else 1.0
        strategy = "temperature" if temperature != 1 else strategy
        tasks = expected["probability"].keys()
        if strategy == "equal":
            limit = None
        found = mixtures.rates(tasks, strategy, limit=limit, temperature=temperature, scale=scale)
        assert found == pytest.approx(expected["probability"], rel=0, abs=1e-12), name
    counts = mixtures.TRAIN_EXAMPLES
    assert {k: counts[k] for k in reference["train_examples"]} == reference["train_examples"]
    glue = seqio.MixtureRegistry.get("glue_v002_proportional")
    assert {t.name: glue.get_rate(t) for t in glue.tasks} == reference["t5_get_glue_weight_mapping"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tasks": ["glue_colla_v002"]}, "did you mean glue_cola_v002"),
        ({"tasks": []}, "no tasks"),
        ({"tasks": {"a": 0, "b": 0}}, "none of a, b"),
        ({"tasks": {"a": -1}}, "-1"),
        ({"tasks": {"a": 1}, "limit": 0}, "limit K = 0"),
        ({"tasks": {"a": 1}, "strategy": "temperature", "temperature": 0}, "temperature T = 0"),
        ({"tasks": {"a": 1}, "temperature": 2}, "strategy='temperature'"),
        ({"tasks": {"a": 1}, "strategy": "uniform"}, "'uniform'"),
        ({"tasks": "glue_cola_v002"}, "single string"),
    ],
)
def test_refuses_what_cannot_be_mixed(arguments, says):
    with pytest.raises(ValueError, match=says):
        mixtures.rates(**arguments)


def test_registered_mixtures_leave_out_wnli_and_only_evaluate_mnlis_dev_sets():
    for name in ("glue_v002_proportional", "glue_squad_temperature_4", "c4_glue_squad_proportional_k16"):
        mixture = seqio.MixtureRegistry.get(name)
        by_name = {task.name: mixture.get_rate(task) for task in mixture.tasks}
        assert "glue_wnli_v002" not in by_name
        assert by_name["glue_mnli_matched_v002"] == by_name["glue_ax_v002"] == 0
        assert by_name["glue_mnli_v002"] > 0
    assert seqio.MixtureRegistry.get("c4_glue_squad_proportional_k16").total_rate == pytest.approx(413674, abs=0.5)


def test_draws_follow_the_rates_closely_enough_to_tell_strategies_apart():
    draws = 20_000
    tasks = mixtures.SETS["c4_glue_squad"]
    shares = mixtures.rates(tasks, "temperature", limit=2**21, temperature=2)
    other = mixtures.rates(tasks, "temperature", limit=2**21, temperature=4)
    sources = [tf.data.Dataset.from_tensors(i).repeat() for i in range(len(tasks))]
    mixed = tf.data.Dataset.sample_from_datasets(sources, list(shares.values()), seed=0).batch(draws)
    counts = tf.math.bincount(next(iter(mixed))).numpy()

    def chi_square(expected):
        return sum((counts[i] - draws * expected[t]) ** 2 / (draws * expected[t]) for i, t in enumerate(tasks))

    bound = (len(tasks) - 1) + 5 * math.sqrt(2 * (len(tasks) - 1))  # mean and five deviations of chi-square
    assert chi_square(shares) < bound < chi_square(other)
