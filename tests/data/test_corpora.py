"""Several corpora from gin alone: names, rates, metrics, and the mixture that they make."""

import json

import pytest
import seqio

from tasks import corpora, mixtures, text_metrics
from tasks.errors import UserError

LENGTHS = {"inputs": 32, "targets": 32}


@pytest.fixture
def folder(tmp_path, bytes_vocabulary):
    for name, size in {"news": 40, "chat": 10, "chat-eval": 4, "numbers": 3}.items():
        rows = ({"inputs": f"{name} {i}", "targets": str(i), "title": f"t{i}"} for i in range(size))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = set(seqio.TaskRegistry.names())
    yield tmp_path
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)
    if corpora.MIXTURE in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(corpora.MIXTURE)


def files(folder, *names):
    return {name: f"{folder}/{name}.jsonl" for name in names}


def rates(name=corpora.MIXTURE):
    mixture = seqio.MixtureRegistry.get(name)
    return {task.name: float(mixture.get_rate(task)) for task in mixture.tasks}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"news": 40, "chat": 10}),
        ({"limit": 20}, {"news": 20, "chat": 10}),
        ({"mixing": "temperature", "temperature": 2.0}, {"news": 40**0.5, "chat": 10**0.5}),
        ({"mixing": "equal"}, {"news": 1, "chat": 1}),
        ({"mixing": "unimax", "budget": 45}, {"news": 35, "chat": 10}),
        ({"mixing": "unimax", "budget": 45, "max_epochs": 3}, {"news": 22.5, "chat": 22.5}),
        ({"mixing": {"chat": 0.3, "news": 0.7}}, {"news": 0.7, "chat": 0.3}),
    ],
)
def test_named_files_become_tasks_and_their_mixture(folder, settings, expected):
    assert corpora.register(files(folder, "news", "chat"), **settings) == "mixture"
    assert rates() == pytest.approx(expected)


def test_every_corpus_is_drawn_and_scored_on_its_own(folder, bytes_vocabulary):
    evaluated = {"chat": f"{folder}/chat-eval.jsonl", "numbers": f"{folder}/numbers.jsonl"}
    metrics = {"chat": ["accuracy", "f1_macro"], "numbers": "pearson"}
    corpora.register(files(folder, "news", "chat"), evaluated, metrics=metrics, inputs_template={"news": "{title}"})
    assert rates() == {"news": 40, "chat": 10, "numbers": 0}
    mixture = seqio.MixtureRegistry.get("mixture")
    drawn = mixture.get_dataset(LENGTHS, "train", num_epochs=None, seed=0).take(200).as_numpy_iterator()
    texts = [bytes_vocabulary.decode(x["inputs"].tolist()) for x in drawn]
    assert 15 < sum(text.startswith("chat") for text in texts) < 65
    assert {text[0] for text in texts} == {"t", "c"}
    named = {task.name: [metric.__name__ for metric in task.metric_fns] for task in mixture.tasks}
    assert named == {"news": ["text_match"], "chat": ["accuracy", "f1_macro"], "numbers": ["pearson"]}
    assert [task.name for task in mixture.tasks if "validation" in task.splits] == ["chat", "numbers"]


def test_registered_tasks_alone_and_beside_files(folder):
    names = ["glue_rte_v002", "squad_v010_allanswers"]
    assert corpora.register(tasks=names) == "mixture"
    assert rates() == {"glue_rte_v002": 2490, "squad_v010_allanswers": 87599}
    corpora.register(files(folder, "news"), tasks=names, limit=100)
    assert rates() == {"news": 40, "glue_rte_v002": 100, "squad_v010_allanswers": 100}
    corpora.register(tasks=["glue_mnli_v002", "glue_rte_v002"], mixing="equal")
    assert rates()["glue_mnli_matched_v002"] == 0, "MNLI's dev sets are evaluated"


def test_one_corpus_needs_no_mixture(folder):
    assert corpora.register(f"{folder}/news.jsonl") == "files"
    assert corpora.register(files(folder, "news")) == "news"
    assert corpora.register(tasks=["glue_rte_v002"]) == "glue_rte_v002"
    assert corpora.register(f"{folder}/news.jsonl", f"{folder}/chat-eval.jsonl") == "files"
    assert corpora.register(f"{folder}/news.jsonl", files(folder, "numbers")) == "mixture"
    assert rates() == {"files": 40, "numbers": 0}


def test_the_same_names_may_be_registered_again(folder):
    for expected in ({"news": 40, "chat": 10}, {"news": 1, "chat": 1}):
        corpora.register(files(folder, "news", "chat"), mixing="equal" if expected["news"] == 1 else "proportional")
        assert rates() == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"train": ["a b"]}, "'a b' cannot be the name of a corpus"),
        ({"train": ["mixture"]}, "'mixture' is the name of all corpora together"),
        ({"train": ["squad_v110"]}, "'squad_v110' is the name of a registered task"),
        ({"train": ["glue_v002_equal"]}, "'glue_v002_equal' is the name of a registered task or mixture"),
        ({"tasks": ["glue_rte_v002", "glue_v002_equal"]}, "is a mixture: to mix it with others, list its tasks: glue_"),
        ({"tasks": ["glue_rte_v02", "squad_v110"]}, "no task 'glue_rte_v02' is registered. Did you mean glue_rte_v002"),
        ({"inputs_template": {"new": "{title}"}}, "INPUTS_TEMPLATE has a value for 'new', .*Did you mean 'news'"),
        ({"metrics": {"chat": "acuracy"}}, "no metric 'acuracy'; did you mean 'accuracy'"),
        ({"mixing": {"news": 1.0}}, "the rates have none for chat"),
        ({"mixing": {"news": 1, "chat": 1, "talk": 1}}, "the rates have 'talk', but the corpora are news, chat"),
        ({"mixing": {"news": "much", "chat": 1}}, "the rate of news is 'much': it must be a finite number"),
        ({"mixing": {"news": -1, "chat": 1}}, "MIXING: the rate of news is -1: it must be a finite number, at least 0"),
        ({"mixing": {"news": 0, "chat": 0}}, "MIXING: all rates are 0"),
        ({"mixing": "temperature", "temperature": 1e-9}, "temperature T = 1e-09 is too small"),
        ({"metrics": ["squad", "f1"]}, "METRICS: 'squad' and 'f1' both give 'f1'"),
        ({"tasks": ["glue_rte_v002", "glue_rte_v002"]}, "names glue_rte_v002 twice"),
        ({"train": [7]}, "7 cannot be the name of a corpus"),
        ({"mixing": "unimax"}, "needs a budget"),
        ({"mixing": "even"}, "use 'proportional', 'temperature', 'equal' or 'unimax'"),
        ({"temperature": 2.0}, "needs strategy='temperature'"),
        ({"max_epochs": 2.0}, "are for strategy 'unimax'"),
    ],
)
def test_mistakes_are_named(folder, arguments, says):
    arguments = dict(arguments)
    names = arguments.pop("train", None) or (["news", "chat"] if "tasks" not in arguments else [])
    train = dict.fromkeys(names, f"{folder}/news.jsonl") or None
    with pytest.raises(UserError, match=says):
        corpora.register(train, **arguments)


@pytest.mark.parametrize("files", [{}, {"a": None}, {"a": []}, []])
def test_files_that_are_none_are_an_error(files):
    with pytest.raises(UserError, match="names no files"):
        corpora.register(files)


def test_targets_that_are_no_numbers_are_said_before_training(folder):
    (folder / "words.jsonl").write_text('{"inputs": "a", "targets": "1"}\n{"inputs": "a", "targets": "much"}\n')
    with pytest.raises(UserError, match="words: pearson needs targets that are numbers, not 'much'"):
        corpora.register(files(folder, "news"), files(folder, "words"), metrics={"words": ["rouge", "pearson"]})


# Metrics by name.


def test_f1_macro_and_matthews_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    targets, predictions = ["a", "b", "a", "c", "b", "a"], ["a", "a", "c", "c", "x", "a "]
    labels, stripped = sorted(set(targets)), [text.strip() for text in predictions]
    expected = sklearn.f1_score(targets, stripped, labels=labels, average="macro", zero_division=0)
    assert text_metrics.f1_macro(targets, predictions)["f1_macro"] == pytest.approx(100 * expected)
    expected = sklearn.matthews_corrcoef(targets, stripped)
    assert text_metrics.matthews(targets, predictions)["matthews_corrcoef"] == pytest.approx(100 * expected)


@pytest.mark.parametrize("name", text_metrics.METRICS)
def test_every_metric_scores_right_answers_best(name):
    targets, wrong = ["1", "2", "4", "3"], ["x", "", "nan", "3"]
    metric = text_metrics.METRICS[name]
    for key, value in metric(targets, list(targets)).items():
        if name != "bleu":  # which counts four words in a row
            assert value == pytest.approx(0 if key == "rouge2" else 100), "a text of one word has no two words"
        assert metric(targets, wrong)[key] <= value


def test_a_correlation_needs_numbers():
    with pytest.raises(UserError, match="needs targets that are numbers, not 'yes'"):
        text_metrics.pearson(["1", "yes"], ["1", "2"])


# UniMax.

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
counts = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 10**6), min_size=1, max_size=8)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
@hypothesis.given(counts, st.floats(1, 10**7), st.floats(0.1, 20))
def test_unimax_is_uniform_but_for_what_its_epochs_cap(sizes, budget, epochs):
    shares = mixtures.raw_rates(sizes, "unimax", budget=budget, max_epochs=epochs)
    caps = {name: size * epochs for name, size in sizes.items()}
    assert list(shares) == list(sizes)
    assert sum(shares.values()) == pytest.approx(min(budget, sum(caps.values())))
    free = [shares[name] for name in sizes if shares[name] < caps[name] * (1 - 1e-9)]
    for name in sizes:
        assert shares[name] <= caps[name] * (1 + 1e-9)
        assert not free or shares[name] <= max(free) * (1 + 1e-9), "a capped task has no more than those that are not"
    assert not free or max(free) == pytest.approx(min(free))


def test_unimax_says_when_the_corpora_do_not_reach(folder, caplog):
    corpora.register(files(folder, "news", "chat"), mixing="unimax", budget=500, max_epochs=2)
    assert "hold 100 examples within MIXING_MAX_EPOCHS = 2, the run takes 500: each is read 5 times" in caplog.text


def test_unimax_by_hand():
    # 100 examples for three: the smallest has 10, half of the 90 left is 45, more than the second has twice.
    shares = mixtures.rates({"a": 1000, "b": 5, "c": 20}, "unimax", budget=100, max_epochs=2)
    assert shares == pytest.approx({"a": 0.5, "b": 0.1, "c": 0.4})
