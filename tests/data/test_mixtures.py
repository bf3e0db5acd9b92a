"""Rates against the paper's formulas, t5's numbers and empirical draws; the table and the picture."""

import math

import pytest
import seqio
import tensorflow as tf

from tasks import mixtures
from tasks.mixtures import __main__ as command
from tasks.mixtures import plot, table


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


def test_the_command_shows_unimax(capsys):
    command.main(["small=10,large=1000", "--strategy=unimax", "--steps=10", "--batch=10", "--max_epochs=2"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shares = {line[0]: line[3:5] for line in lines if line and line[0] in ("small", "large")}
    assert shares == {"large": ["80.00%", "0.08"], "small": ["20.00%", "2.0"]}


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


@pytest.fixture
def tiny_tasks():
    """Registers a task for each of three names, whose every example says which one it is of."""
    names = ["tiny_a", "tiny_b", "tiny_c"]
    for number, name in enumerate(names, start=1):
        source = seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None, n=number: tf.data.Dataset.from_tensors({"targets": [n]}), ["train"]
        )
        feature = seqio.Feature(seqio.PassThroughVocabulary(10), add_eos=False)
        seqio.TaskRegistry.add(name, source=source, preprocessors=[], output_features={"targets": feature})
    yield names
    for name in names:
        seqio.TaskRegistry.remove(name)


def test_draws_of_a_registered_mixture_follow_its_rates_and_no_others(tiny_tasks):
    draws = 10_000
    counts = dict(zip(tiny_tasks, [1_000, 20_000, 300_000], strict=True))
    shares = mixtures.rates(counts, "temperature", limit=2**16, temperature=2)
    mixture = mixtures.add_mixture("tiny", {task: 7 * share for task, share in shares.items()})
    try:
        dataset = mixture.get_dataset({"targets": 1}, "train", shuffle=False, seed=0)
        drawn = next(iter(dataset.map(lambda x: x["targets"][0]).batch(draws)))
    finally:
        seqio.MixtureRegistry.remove("tiny")
    found = tf.math.bincount(drawn).numpy()[1:]

    def chi_square(expected):
        return sum((n - draws * expected[t]) ** 2 / (draws * expected[t]) for n, t in zip(found, counts, strict=True))

    bound = (len(counts) - 1) + 5 * math.sqrt(2 * (len(counts) - 1))  # mean and five deviations of chi-square
    assert chi_square(shares) < bound
    for wrong in (
        mixtures.rates(counts, "temperature", temperature=2),  # without the limit
        mixtures.rates(counts, "temperature", limit=2**17, temperature=2),
        mixtures.rates(counts, "temperature", limit=2**16, temperature=2.1),
        mixtures.rates(counts, "proportional", limit=2**16),
    ):
        assert chi_square(wrong) > bound


def test_leave_one_out_is_the_set_without_the_task():
    names = seqio.MixtureRegistry.names()
    left_out = {name for name in names if "_leave_out_" in name}
    assert len(left_out) == 8 + (9 + 1) + (10 + 1)  # each task of each set, and GLUE as one where something is left
    full = seqio.MixtureRegistry.get("c4_glue_squad_proportional")
    whole = {task.name: full.get_rate(task) for task in full.tasks}
    for part, gone in (
        ("qqp", {"glue_qqp_v002"}),
        ("squad", {"squad_v010_allanswers"}),
        ("c4", {"c4_v220_span_corruption"}),
        ("mnli", {"glue_mnli_v002", *mixtures.GLUE_EVALUATED_ONLY}),
        ("glue", {*mixtures.GLUE, *mixtures.GLUE_EVALUATED_ONLY}),
    ):
        mixture = seqio.MixtureRegistry.get(f"c4_glue_squad_leave_out_{part}")
        assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {
            task: rate for task, rate in whole.items() if task not in gone
        }
    assert "glue_v002_leave_out_glue" not in names


def test_another_task_on_the_same_source_has_its_count():
    source = seqio.TaskRegistry.get("squad_v110").source
    feature = seqio.Feature(seqio.PassThroughVocabulary(10))
    seqio.TaskRegistry.add("mine", source=source, preprocessors=[], output_features={"targets": feature})
    try:
        assert mixtures.train_examples("mine") == 87_599
        assert mixtures.rates(["mine", "squad_v110"]) == {"mine": 0.5, "squad_v110": 0.5}
    finally:
        seqio.TaskRegistry.remove("mine")
    assert mixtures.train_examples("mine") is None


# ------------------------------------------------------------------------------------------------------------ the table


def test_rows_agree_with_a_calculation_by_hand():
    first, second = table.rows(
        {"small": 1.0, "large": 3.0, "evaluated": 0.0},
        {"small": 100, "large": 1_000, "evaluated": None},
        steps=50,
        batch=8,
        tokens={"small": 30.0, "large": 10.0},
    )
    # 400 examples are drawn, 300 of them of the large task; 100 * 30 tokens are as many as 300 * 10.
    assert first == table.Row("large", 1_000, 3.0, 0.75, 0.3, 10.0, 0.5)
    assert second == table.Row("small", 100, 1.0, 0.25, 1.0, 30.0, 0.5)
    text = table.to_text([first, second]).splitlines()
    assert text[1].split() == ["large", "1,000", "3", "75.00%", "0.3", "10.0", "50.00%"]
    assert text[3].split() == ["all", "1,100", "4", "100.00%", "15.0", "100.00%"]
    assert len({len(line) for line in text}) == 1
    unknown = table.rows({"a": 1.0, "b": 1.0}, {"a": None, "b": 5}, tokens={"a": 3.0})
    assert [row.token_share for row in unknown] == [None, None]
    assert table.to_text(unknown).splitlines()[1].split() == ["a", "?", "1", "50.00%", "?", "3.0", "?"]


def test_mean_tokens_are_those_of_the_task(corpus, bytes_vocabulary):
    (corpus / "glue/CoLA").mkdir(parents=True)
    (corpus / "glue/CoLA/train.tsv").write_text("gj04\t1\t\tWho?\ncj99\t0\t*\tWho and who?\n")
    inputs = len("cola sentence: Who?") + len("cola sentence: Who and who?")
    targets = len("acceptable") + len("unacceptable")
    assert table.mean_tokens("glue_cola_v002") == (inputs + targets + 4) / 2  # an end after each of the four


def shown(capsys, *arguments):
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, {line.split()[0]: line.split()[1:] for line in lines[2:] if line[:1].isalpha()}


def test_command_shows_a_mixture_as_registered_or_otherwise(capsys):
    lines, tasks = shown(capsys, "glue_squad_proportional_k16", "--steps=2^10", "--batch=64")
    assert lines[0].startswith("glue_squad_proportional_k16, as registered; passes over the data in 1,024 steps of 64")
    # FACTS: 0.188247; 65,536 draws of 348,138 in all; 0.024562 of them over 8,551 examples.
    assert tasks["squad_v010_allanswers"] == ["87,599", "65,536", "18.82%", "0.14"]
    assert tasks["glue_cola_v002"] == ["8,551", "8,551", "2.46%", "0.19"]
    assert tasks["all"][:2] == ["1,036,700", "348,138"]
    assert any("not trained on: glue_ax_v002, glue_mnli_matched_v002" in line for line in lines)
    _, tasks = shown(capsys, "glue_squad_equal", "--strategy=temperature", "--temperature=4", "--limit=2097152")
    assert tasks["glue_rte_v002"][2] == "5.27%"
    _, tasks = shown(capsys, "glue_rte_v002,mine=2490,squad_v110", "--strategy=equal")
    assert tasks["mine"] == ["2,490", "1", "33.33%", "4,491.9"]
    by_set, _ = shown(capsys, "c4_glue_squad", "--limit=2^19")
    registered, _ = shown(capsys, "c4_glue_squad_proportional")
    assert by_set[2:13] == registered[2:13]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["glue_sqad_proportional"], "'glue_sqad_proportional'; did you mean glue_squad_proportional,"),
        (["zzz"], "known sets: glue_v002, glue_squad, c4_glue_squad"),
        (["glue_rte_v002,glue_rt_v002"], "'glue_rt_v002'; did you mean glue_rte_v002"),
        (["mine=many"], "mine=5000"),
        (["glue_squad_equal", "--limit=5"], "--limit and --temperature need a --strategy"),
        (["glue_squad", "--temperature=2"], "needs strategy='temperature'"),
        (["mine=0"], "nothing to sample from"),
        (["glue_squad", "--plot=/dev/null/a.png"], "/dev/null/a.png"),
    ],
)
def test_command_says_in_a_line_what_is_wrong(capsys, arguments, says):
    assert command.main(arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert printed.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------- the picture


def test_picture_shows_every_strategy_once_and_marks_the_mixture(tmp_path):
    counts = {task: mixtures.TRAIN_EXAMPLES[task] for task in mixtures.SETS["glue_squad"]}
    panels = plot.panels(counts)
    assert [title.replace("\n", " ") for title, _, _ in panels] == [
        *("equal", "temperature T = 8", "temperature T = 4", "temperature T = 2"),
        *("proportional K = $2^{16}$", "proportional K = $2^{17}$", "proportional K = $2^{18}$"),
        "proportional K $\\geq$ $2^{19}$",  # no task has more examples: higher limits change nothing
    ]
    assert panels[4][2]["glue_cola_v002"] == pytest.approx(0.024562, abs=1e-6)
    count = len(panels)
    plot._mark(panels, mixtures.rates(counts, limit=2**17))
    assert [colour == plot._CHOSEN for _, colour, _ in panels] == [i == 5 for i in range(count)]
    plot._mark(panels, mixtures.rates(counts, limit=2**15))
    assert len(panels) == count + 1
    plot.draw("title", counts, mixtures.rates(counts), 1_000, 8, str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
