"""report: what is read from a run's files, what is counted in its predictions, and the page that shows it."""

import html.parser
import importlib.util
import itertools
import json
import pathlib
import re

import numpy as np
import pytest

from t5x_lite import report
from t5x_lite.report import __main__ as command
from t5x_lite.report import analysis, curves, predictions

ROOT = pathlib.Path(__file__).parents[2]
EVIL = '<script>document.title = "taken"</script><img src=http://evil.test/x onerror=alert(1)> & "quoted"'


def row(target: str, prediction: str, inputs: str = "in") -> dict:
    return {"inputs": inputs, "targets": target, "prediction": prediction}


def a_run(folder: pathlib.Path, rows: dict[str, list[dict]], steps: tuple[int, ...] = (10, 20)) -> pathlib.Path:
    """A MODEL_DIR whose tasks have accuracies 50, 51, ... and losses 2, 1.9, ..., and predictions at its last step."""
    records = [{"step": s, "split": "train", "loss": 9.0, "cross_ent_loss": 8 / s} for s in range(1, steps[-1] + 1)]
    for i, step in enumerate(steps):
        for task in rows:
            records.append({"step": step, "split": "validation", "task": task, "loss": 2 - i / 10, "accuracy": 50 + i})
    (folder / "predictions").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for task, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / "predictions" / f"{task}-{steps[-1]}.jsonl").write_text(text)
    return folder


class Document(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its text; refuses what is not nested properly."""

    VOID = ("meta", "br", "img", "wbr")

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def shown(folder: pathlib.Path, about: report.About | None = None) -> Document:
    return Document(report.write_page(folder, about).read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------------------- numbers


def test_curves_are_in_order_and_say_each_step_once():
    train, tasks = analysis.curves(
        [
            {"step": 2, "split": "train", "loss": 5.0, "cross_ent_loss": 4.0, "grad_norm": 1.0},
            {"step": 1, "split": "train", "loss": 6.0},
            {"step": 2, "split": "validation", "task": "a", "loss": 3.0, "f1": 1.0},
            {"step": 2, "split": "validation", "task": "a", "loss": None, "f1": 2.0},
        ]
    )
    assert list(train.items()) == [(1, 6.0), (2, 4.0)]
    assert tasks == {"a": {"loss": {2: 3.0}, "f1": {2: 2.0}}}


def test_best_is_the_lowest_loss_and_the_first_of_equals():
    curve = {1: 2.0, 2: 3.0, 3: 3.0, 4: 2.0}
    assert analysis.best("f1", curve) == (2, 3.0)
    assert analysis.best("loss", curve) == analysis.best("word_error_rate", curve) == (1, 2.0)


def test_bins_keep_the_mean_and_the_range():
    curve = {step: float(step % 7) for step in range(1000)}
    bins = analysis.binned(curve, 50)
    assert len(bins) == 50
    assert np.mean([mean for _, mean, _, _ in bins]) == pytest.approx(np.mean(list(curve.values())))
    assert {(low, high) for _, _, low, high in bins} == {(0.0, 6.0)}
    assert analysis.binned({3: 1.5}, 50) == [(3, 1.5, 1.5, 1.5)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["entailment", "not_entailment"] * 10, ["entailment", "not_entailment"]),
        (["10", "9", "0"] * 5, ["0", "9", "10"]),
        ([f"{i / 5}" for i in range(26)] * 20, None),  # STS-B
        (["a", "b"] * 3, None),  # too few to tell
        (["yes", "no", "in the year of the great fire of London, 1666"] * 20, None),
    ],
)
def test_what_is_a_classification_task(targets, expected):
    assert analysis.classes([row(target, "x") for target in targets]) == expected
    assert analysis.classes([{"inputs": "", "targets": target, "score": -1.0} for target in targets]) is None


def test_confusion_counts_other_texts_as_one():
    pairs = [("a", "a"), ("a", "b"), ("a", ""), ("b", "b"), ("b", "bb"), ("b", "c"), ("b", "B")]
    counts = analysis.confusion([row(*pair) for pair in pairs], ["a", "b"])
    np.testing.assert_array_equal(counts, [[1, 1, 1], [0, 1, 3]])


def test_f1_is_that_of_squad():
    spec = importlib.util.spec_from_file_location("metrics_alone", ROOT / "tasks" / "metrics.py")
    assert spec and spec.loader
    metrics = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(metrics)
    rng = np.random.default_rng(0)
    texts = ["The", "a."]  # which have no words
    texts += [" ".join(rng.choice(["The", "a.", "cat", "Cat,", "x-y", "dog"], rng.integers(1, 6))) for _ in range(300)]
    found = [analysis.f1(row(*pair)) for pair in itertools.pairwise(texts)]
    due = [metrics.text_match([t], [p])["f1"] / 100 for t, p in itertools.pairwise(texts)]
    same = [t == p for t, p in itertools.pairwise(texts)]
    np.testing.assert_allclose(found, np.where(same, 1.0, due))
    assert not analysis.words(texts[0]) and not analysis.words(texts[1]) and found[0] == 0
    assert len({round(x, 6) for x in found}) > 5


def test_differences_mark_what_f1_does_not_count():
    target, prediction = "the Denver Broncos,\n of old", "Denver  Bronco of the  new old"
    pieces = analysis.differences(target, prediction)
    assert ["".join(text for text, _ in side) for side in pieces] == [target, prediction]
    marked = [[text.strip() for text, alone in side if alone] for side in pieces]
    assert marked == [["Broncos,"], ["Bronco", "new"]]
    assert analysis.differences("", "x") == ([], [("x", True)])


# --------------------------------------------------------------------------------------------------------------- curves


def test_a_curve_goes_through_its_values():
    curve = {0: 10.0, 50: 30.0, 100: 20.0}
    drawn = Document(curves.panel("task", "f1", curve))
    (line,) = drawn.all("polyline")
    points = np.array([[float(x) for x in point.split(",")] for point in line["points"].split()])
    np.testing.assert_allclose(points[:, 0], [0, 500, 1000])
    heights = points[:, 1]
    assert (heights[0] - heights[2]) / (heights[0] - heights[1]) == pytest.approx(0.5, abs=0.01)
    assert 0 < heights.min() and heights.max() < float(drawn.all("svg")[0]["viewbox"].split()[3])
    assert "best 30.00 at step 50" in drawn.text and "20.00" in drawn.text
    assert not curves.panel("task", "f1", {1: 2.0})


def test_labels_do_not_cover_one_another():
    rng = np.random.default_rng(1)
    for count in (1, 5, 18):
        places = rng.uniform(100, 130, count).tolist()
        moved = curves._apart(places, 300)
        assert min(moved) >= 0 and max(moved) <= 300
        assert np.diff(sorted(moved)).min(initial=curves.LABEL) >= curves.LABEL - 1e-9
        assert np.argsort(moved).tolist() == np.argsort(places).tolist()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, ["0", "2", "4", "6", "8", "10"]),
        (0.12, 0.31, ["0.15", "0.20", "0.25", "0.30"]),
        (0.0, 262_144.0, ["0", "50k", "100k", "150k", "200k", "250k"]),
        (7.0, 7.0, ["7"]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert [label for _, label in curves._ticks(low, high, 5)] == expected


# ----------------------------------------------------------------------------------------------------------------- page


def test_what_the_page_says(tmp_path):
    rows = {
        "rte": [row("yes", "no" if i < 12 else "yes") for i in range(40)] + [row("no", "maybe")] * 20,
        "squad": [row(f"the answer {i}", f"answer {i}" if i % 4 else "nothing at all") for i in range(40)],
        "stsb": [row(f"{i / 5}", f"{i / 5 + 1}" if i % 2 else "none") for i in range(26)],
    }
    about = report.About("a_mixture", {"rte": 0.25, "squad": 0.75}, {"rte": {"accuracy": 66.6, "what": "majority"}})
    document = shown(a_run(tmp_path, rows), about)
    said = " ".join(document.text.split())
    for expected in (
        "step 20 · training loss 0.400 · 3 tasks evaluated",
        "Mixture a_mixture",
        "75.0%",
        "Baseline of rte: majority.",
        "60 predictions at step 20; 28 right, 46.7%",
        "Mistakes 8 of 32",
        "the most frequent: maybe (20)",
        "30 with the target's words, 0 with some of them, 10 with none",
        "Lowest F1 8 of 10",
        "mean distance from the target 1; 13 that are not a number",
        "Samples 4 of 26",
    ):
        assert expected in said, expected
    cells = re.search(r'<table class="confusion">.*?</table>', (tmp_path / report.PAGE).read_text(), re.DOTALL)
    assert cells and re.findall(r"<td.*?>([\d.%]+)</td>", cells[0]) == "0 0 20 20 0.0% 12 28 0 40 70.0%".split()
    assert len(document.all("polyline")) == 1 + 3 + 3
    # In the legend, in the worst, and in the samples that are wrong.
    assert len(document.all("ins")) == 1 + (8 + 2) + (8 + 2) + (8 + 4)


def test_tables_name_their_rows_and_columns(tmp_path):
    document = shown(a_run(tmp_path, {"rte": [row("yes", "no")] * 10}), report.About("m", {"rte": 0.5, "x": 0.5}))
    assert len(document.all("table")) == len(document.all("caption")) == 3
    assert document.all("th") and all(th["scope"] in ("row", "col", "rowgroup") for th in document.all("th"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in document.all("svg"))


@pytest.mark.parametrize("classes", [True, False])
def test_texts_of_a_run_stay_text(tmp_path, classes):
    target, count = ("yes" if classes else EVIL), 10 if classes else 1
    rows = {"t": [row(target, EVIL, EVIL)] * count, EVIL.replace("/", "|"): [row(EVIL[:40], "x")] * 10}
    document = shown(
        a_run(tmp_path, rows), report.About(EVIL, {EVIL: 0.5, "t": 0.5}, {"t": {"what": EVIL, "loss": 1.0}})
    )
    names = {tag for tag, _ in document.elements}
    assert names.isdisjoint({"script", "img", "link", "iframe", "object", "base", "form"})
    assert not [a for _, attributes in document.elements for a in attributes if a.startswith("on") or a == "src"]
    assert all(link["href"].startswith("#task-") for link in document.all("a"))
    assert document.text.count(EVIL) >= 3
    policy = next(meta["content"] for meta in document.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_texts_that_are_hard_to_show(tmp_path):
    rows = [
        row("\ud83d half a pair", "\x00\x1b[31m"),
        row("nothing came", ""),
        row("y" * 1000, "z" * 1000, "x " * 5000),
    ]
    document = shown(a_run(tmp_path, {"t": rows}))
    assert "\u2400\u241b[31m" in document.text
    assert "(nothing)" in document.text
    assert document.text.count("… 600 characters …") == 4 and re.search("… 9,[56].. characters …", document.text)
    assert len(document.text) < 10_000


def test_any_predictions_make_a_page():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    text = st.text(max_size=40) | st.sampled_from(["<b>", "&lt;", "</dd>", "1.5", "nan", "yes", EVIL])
    rows = st.lists(st.builds(row, text, text, text), min_size=1, max_size=30)

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(rows, st.sampled_from([1, 10]))
    def holds(rows, times):
        document = Document(predictions.section("t", 1, rows * times, "task-0"))
        expected = "section h3 h4 p div small bdi ol li dl dt dd ins del table caption thead tbody tr th td wbr"
        assert {tag for tag, _ in document.elements} <= set(expected.split())
        for example in rows:
            for side, pieces in zip(
                ("targets", "prediction"), analysis.differences(example["targets"], example["prediction"]), strict=True
            ):
                assert "".join(piece for piece, _ in pieces) == example[side]

    holds()


def test_a_run_of_one_evaluation_has_no_curves(tmp_path):
    folder = a_run(tmp_path, {"t": [row("a", "b")]}, steps=(1,))
    document = shown(folder)
    assert not document.all("svg")
    assert "Curves" not in document.text and "of 1 evaluation," in document.text


def test_only_predictions_that_belong_to_scores(tmp_path):
    """A run that went back to an earlier step leaves later predictions behind."""
    folder = a_run(tmp_path, {"t": [row("a", "now")]})
    (folder / "predictions" / "t-30.jsonl").write_text(json.dumps(row("a", "stale")) + "\n")
    (folder / "predictions" / "t-10.jsonl").write_text(json.dumps(row("a", "old")) + "\n")
    assert "now" in shown(folder).text
    (folder / "predictions" / "t-20.jsonl").unlink()
    document = shown(folder)
    assert "old" in document.text and "1 prediction at step 10" in document.text and "stale" not in document.text


def test_rows_without_targets_are_no_part_of_it(tmp_path):
    known = [row("yes", "yes")] * 5 + [row("3", "3.000")]
    document = shown(a_run(tmp_path / "some", {"t": [*known, {"inputs": "a test row", "prediction": "x"}]}))
    assert "6 predictions" in document.text and "a test row" not in document.text
    document = shown(a_run(tmp_path / "none", {"t": [{"inputs": "a test row", "prediction": "x"}]}))
    assert "Predictions" not in document.text


def test_a_right_number_in_other_digits_is_not_marked(tmp_path):
    document = shown(a_run(tmp_path, {"t": [row(f"{i}.2", f"{i}.200") for i in range(20)]}))
    assert "right" in document.text
    assert len(document.all("ins")) == len(document.all("del")) == 1, "the legend's"


def test_scores_without_predictions(tmp_path):
    rows = [{"inputs": "q", "targets": f"t{i}", "score": -float(i)} for i in range(20)]
    text = shown(a_run(tmp_path, {"t": rows})).text
    assert text.index("log-likelihood -19.0") < text.index("log-likelihood -18.0")
    assert "Least likely targets 8 of 20" in text


def test_the_command_makes_the_page_again(tmp_path, capsys):
    folder = a_run(tmp_path / "run", {"t": [row("a", "b")]})
    about = report.About("mix", {"t": 0.5, "u": 0.5}, {"t": {"loss": 3.25, "what": "chance"}})
    first = report.write_page(folder, about).read_bytes()
    (folder / report.PAGE).unlink()
    assert command.main([str(folder)]) == 0
    assert (folder / report.PAGE).read_bytes() == first and b"chance" in first
    assert capsys.readouterr().out.strip() == str(folder / report.PAGE)

    (folder / "predictions" / "t-20.jsonl").write_text('{"inputs": "x"\n')
    assert command.main([str(folder)]) == 2
    assert "t-20.jsonl, line 1 is not JSON" in capsys.readouterr().err
    assert (folder / report.PAGE).read_bytes() == first
    assert command.main([str(tmp_path)]) == command.main(["gs://bucket/run"]) == 2


def test_confusions_in_the_terminal(tmp_path):
    rows = [row("yes", "no")] * 9 + [row("no", "no"), row("no", "?")]
    folder = a_run(tmp_path, {"rte-x": rows, "squad": [row(f"{i}", "x") for i in range(30)]})
    assert report.confusions(folder, 20).splitlines() == [
        "rte-x: target, by prediction  no  yes  other",
        "no                            1   0    1",
        "yes                           9   0    0",
    ]
    assert not report.confusions(folder, 10)


def test_a_long_input_is_cut_round_the_answer():
    context = (
        "question: who ? context: " + "some words of it " * 100 + "it was Ada Lovelace , as all know " + "x y " * 300
    )
    said = Document(predictions._passages(context, "Ada Lovelace")).text
    assert said.startswith("question: who ?") and "it was Ada Lovelace , as all" in said
    left = [int(number.replace(",", "")) for number in re.findall("… ([0-9,]+) characters …", said)]
    shown = re.sub("… [0-9,]+ characters …", "", said)
    assert len(left) == 2 and len(shown) < 500
    assert sum(left) + len(shown.replace(" ", "")) < len(context) < sum(left) + len(shown)
    assert predictions._passages("x" * 1000, "none").endswith("x" * 200)
    assert "one two" in predictions._passages("one two " * 100, "two")
    assert "  " not in predictions._passages("one two " * 100, "two")


def test_the_worst_of_many_equals_are_spread():
    rows = [row("x", f"{i}") for i in range(100)] + [row("x y", "x")] * 3
    worst = [int(r["prediction"]) for r in predictions._worst(rows, analysis.f1)]
    assert worst == sorted(worst) and worst[0] == 0 and worst[-1] > 80
    rows = [row("x y", "x") | {"score": -float(i)} for i in range(100)] + [row("x", "y")]
    assert [r.get("score") for r in predictions._worst(rows, analysis.f1)] == [None, *range(-99, -92)]


def test_examples_are_spread():
    rows = [row(f"{i}", "") for i in range(10)]
    assert [r["targets"] for r in predictions._spread(rows, 4)] == ["0", "2", "5", "7"]
    assert predictions._spread(rows, 10) == predictions._spread(rows, 99) == rows
