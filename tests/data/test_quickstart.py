"""The embedded default: its splits are honest, its examples right, its vocabulary always whole and the same."""

import collections
import copy
import inspect
import os
import pathlib
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import seqio
import tensorflow as tf

from tasks import metrics, quickstart, stdlib_text
from tasks.vocabulary import trainer

TASKS = tuple(quickstart.RATES)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache folder for this file, in which the vocabulary is learnt once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        quickstart.vocabulary_file.cache_clear()
        yield folder
    quickstart.vocabulary_file.cache_clear()


def split_sentences(split):
    return [s for passage in stdlib_text.texts()[split].passages for s in passage.sentences]


def words(text):
    return f" {stdlib_text.normalized(text)} "


# ----------------------------------------------------------------------------------------------------------------- text


def test_prose_is_kept_and_code_is_not():
    text = """Return the sum.  It is an int,
    not a string (see PEP 8).

    >>> add(1, 2)
    3

    sum_stmt ::= expression

      * First point of a list, over
        two lines.
      * No point

    Name     Meaning of it    Default
    """
    assert stdlib_text.sentences(inspect.cleandoc(text)) == (
        "It is an int, not a string (see PEP 8).",
        "First point of a list, over two lines.",
    )


@pytest.mark.slow
def test_there_is_enough_text_of_every_kind():
    train, validation = (stdlib_text.texts()[split] for split in stdlib_text.SPLITS)
    train_size, validation_size = (sum(map(len, split_sentences(split))) for split in stdlib_text.SPLITS)
    assert train_size > 800_000
    assert validation_size > 80_000
    for text in (train, validation):
        assert {passage.kind for passage in text.passages} == set(stdlib_text.KINDS)


def test_sources_do_not_cross_splits():
    train, validation = (
        {item.source for item in (*text.passages, *text.functions)} for text in stdlib_text.texts().values()
    )
    assert not train & validation
    assert (
        {source.split()[0] for source in train} == {source.split()[0] for source in validation} == {"module", "topic"}
    )
    assert not any(name in source for source in train | validation for name in ("idlelib", "lib2to3", "site-packages"))


@pytest.mark.slow
def test_no_sentence_is_in_both_splits_or_twice_in_one():
    train, validation = (list(map(stdlib_text.normalized, split_sentences(split))) for split in stdlib_text.SPLITS)
    assert len(set(train)) == len(train)
    assert len(set(validation)) == len(validation)
    assert not set(train) & set(validation)
    # It is the splitting that keeps them apart: before it, sources in different splits do share sentences.
    before = collections.defaultdict(set)
    for passage in stdlib_text._read().passages:
        before[stdlib_text.split_of(passage.source)].update(map(stdlib_text.normalized, passage.sentences))
    assert before["train"] & before["validation"]


def test_what_tasks_show_of_validation_is_not_in_training():
    """Not as examples either, whichever task they belong to."""
    trained_on = "".join(words(s) for s in split_sentences("train"))
    contexts = {stdlib_text.normalized(q.context) for q in stdlib_text.questions("train")}
    asked = "".join(map(words, sorted(contexts)))
    held_out = {stdlib_text.normalized(s) for s in split_sentences("validation")}
    for sentence, _ in stdlib_text.labelled_sentences("validation"):
        assert stdlib_text.normalized(sentence) in held_out
        if len(sentence.split()) > 6:  # a short one can be a part of another by chance
            assert words(sentence) not in asked
    for question in stdlib_text.questions("validation"):
        assert stdlib_text.normalized(question.context) not in contexts
    signatures = [
        {stdlib_text.normalized(stdlib_text.signature(function)) for function in text.functions}
        for text in stdlib_text.texts().values()
    ]
    assert not signatures[0] & signatures[1]
    assert words(split_sentences("train")[5]) in trained_on
    assert words(split_sentences("validation")[5]) not in trained_on


# ------------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("split", stdlib_text.SPLITS)
def test_labels_are_balanced(split):
    counts = collections.Counter(kind for _, kind in stdlib_text.labelled_sentences(split))
    assert set(counts) == set(stdlib_text.KINDS)
    assert len(set(counts.values())) == 1
    assert counts["class"] >= (800 if split == "train" else 50)


@pytest.mark.parametrize("split", stdlib_text.SPLITS)
def test_answers_stand_in_their_contexts(split):
    questions = stdlib_text.questions(split)
    assert len(questions) > (1500 if split == "train" else 200)
    for q in questions:
        assert q.answers
        for answer in q.answers:
            assert answer in q.context
            assert metrics.normalize_answer(answer)
    assert any(len(q.answers) > 1 for q in questions)
    (most, count) = collections.Counter(q.answers[0] for q in questions).most_common(1)[0]
    assert count < 0.3 * len(questions), f"{most!r} answers {count} of {len(questions)} questions"


def test_a_question_has_one_answer_in_its_signature():
    for q in stdlib_text.questions("train"):
        if q.question.startswith("What is the default of "):
            name = q.question.removeprefix("What is the default of ").removesuffix(" ?")
            assert f" {name} = {q.answers[0]} " in q.context


def test_a_signature_is_read_whole(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text(
        '"""A module of one function, no more."""\n'
        "class C:\n"
        "    def f(self, a, /, b=-1, *rest, c, d='x', **more):\n"
        '        """Give back nothing at all."""\n'
    )
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda name: str(tmp_path))
    text = stdlib_text._read()
    (function,) = text.functions
    assert function == (
        "module one",
        "f",
        (("a", None), ("b", "-1"), ("c", None), ("d", "'x'")),
        "Give back nothing at all.",
    )
    assert stdlib_text.signature(function) == "f ( a , b = -1 , c , d = 'x' )"
    asked = {q.question: q.answers for q in stdlib_text._default_questions(function)}
    assert asked == {"What is the default of b ?": ("-1",), "What is the default of d ?": ("'x'", "x")}
    assert ("module one", "module", ("A module of one function, no more.",)) in text.passages


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no Python sources in"):
        stdlib_text._read()


# ----------------------------------------------------------------------------------------------------------- vocabulary


def test_vocabulary_has_t5s_special_ids_and_sentinels():
    vocabulary = quickstart.VOCABULARY
    assert (vocabulary.vocab_size, vocabulary.extra_ids) == (4096, 100)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    text = "source sentence: Return the default value of the named option."
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.encode_tf(text).numpy().tolist() == vocabulary.encode(text)
    assert len(vocabulary.encode(text)) < 20
    assert vocabulary.vocab_size % 128 == 0
    assert vocabulary.decode([4095]) == "<extra_id_0>"
    assert copy.deepcopy(vocabulary) is vocabulary is pickle.loads(pickle.dumps(vocabulary))


def test_model_is_kept_whole_and_read_again(cache):
    path = pathlib.Path(quickstart.vocabulary_file())
    assert cache in path.parents
    assert [p.name for p in path.parent.iterdir()] == ["sentencepiece.model"]
    before = path.stat().st_mtime_ns
    quickstart.vocabulary_file.cache_clear()
    assert quickstart.vocabulary_file() == str(path)
    assert path.stat().st_mtime_ns == before


def test_the_same_text_gives_the_same_model(tmp_path):
    again = tmp_path / "again.model"
    trainer.train(quickstart._vocabulary_lines(), str(again), **quickstart._TRAINER)
    assert again.read_bytes() == pathlib.Path(quickstart.vocabulary_file()).read_bytes()


def test_a_run_stopped_while_writing_leaves_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(quickstart, "_vocabulary_lines", lambda: ["a few words of text", "and some more words"])
    monkeypatch.setattr(quickstart, "_TRAINER", {**quickstart._TRAINER, "size": 18})
    fresh = quickstart.vocabulary_file.__wrapped__

    def stopped(source, target, overwrite):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tf.io.gfile, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            fresh()
    (folder,) = (tmp_path / "t5x_lite").iterdir()
    assert all(file.name.startswith("partial-") for file in folder.iterdir())
    path = pathlib.Path(fresh())
    assert path.parent == folder
    assert sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size() == 18


def test_a_cache_that_cannot_be_written_is_named_with_the_cure(tmp_path, monkeypatch):
    (tmp_path / "t5x_lite").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(quickstart, "_vocabulary_lines", lambda: ["a few words of text", "and some more words"])
    monkeypatch.setattr(quickstart, "_TRAINER", {**quickstart._TRAINER, "size": 18})
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        quickstart.vocabulary_file.__wrapped__()


@pytest.mark.exhaustive
def test_another_process_gets_the_same_and_importing_touches_nothing(tmp_path):
    code = (
        "from tasks import quickstart, stdlib_text\n"
        "import pathlib, sys\n"
        "assert not stdlib_text.texts.cache_info().currsize and not pathlib.Path(sys.argv[1], 't5x_lite').exists()\n"
        "print('file', quickstart.vocabulary_file())\n"
        "print('loss', quickstart.baselines()['quickstart_span_corruption']['loss'])\n"
    )

    def told(seed, folder):
        folder.mkdir()
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], env=environment, check=True, capture_output=True
        )
        lines = dict(
            line.split(" ", 1) for line in done.stdout.decode().splitlines() if line.startswith(("file", "loss"))
        )
        model = pathlib.Path(lines["file"])
        return model.parent.name, model.read_bytes(), float(lines["loss"])

    first, second = told("1", tmp_path / "a"), told("2", tmp_path / "b")
    assert first == second
    here = pathlib.Path(quickstart.vocabulary_file())
    assert first[:2] == (here.parent.name, here.read_bytes())


# ---------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", [*TASKS, "quickstart"])
@pytest.mark.parametrize("split", stdlib_text.SPLITS)
def test_batches_come_through_seqio(name, split):
    rows = seqio.get_dataset(
        mixture_or_task_name=name,
        task_feature_lengths=quickstart.FEATURE_LENGTHS,
        feature_converter=seqio.EncDecFeatureConverter(pack=True),
        dataset_split=split,
        shuffle=split == "train",
        num_epochs=1,
        verbose=False,
        seed=1,
    )
    count = 0
    for row in rows.take(20).as_numpy_iterator():
        count += 1
        assert row["encoder_input_tokens"].shape == (128,)
        assert row["decoder_target_tokens"].shape == (32,)
        assert row["encoder_input_tokens"].max() < 4096
        assert 1 in row["decoder_target_tokens"]
        assert row["encoder_segment_ids"].max() == row["decoder_segment_ids"].max() >= 1
    assert count == 20


@pytest.mark.slow
def test_no_example_is_cut():
    for name in TASKS[1:]:
        task = seqio.get_mixture_or_task(name)
        for split in stdlib_text.SPLITS:
            for example in task.get_dataset(None, split, shuffle=False).as_numpy_iterator():
                for feature, length in quickstart.FEATURE_LENGTHS.items():
                    assert len(example[feature]) <= length


def test_text_of_the_tasks():
    def first(name):
        task = seqio.get_mixture_or_task(name)
        return next(iter(task.get_dataset(quickstart.FEATURE_LENGTHS, "validation", shuffle=False).as_numpy_iterator()))

    sentence, kind = stdlib_text.labelled_sentences("validation")[0]
    example = first("quickstart_source")
    assert example["inputs_pretokenized"].decode() == f"source sentence: {sentence}"
    assert quickstart.VOCABULARY.decode(example["targets"].tolist()) == kind
    question = stdlib_text.questions("validation")[0]
    example = first("quickstart_qa")
    assert example["inputs_pretokenized"].decode() == f"question: {question.question} context: {question.context}"
    assert example["targets_pretokenized"].decode() == question.answers[0]
    task = seqio.get_mixture_or_task("quickstart_qa")
    assert task.postprocess_fn("", example=example, is_target=True) == list(question.answers)
    example = first("quickstart_span_corruption")
    assert len(example["inputs"]) == 128
    assert len(example["targets"]) == 29
    assert {4095, 4094} <= set(example["inputs"]) & set(example["targets"])


@pytest.mark.slow
def test_order_follows_from_the_seed():
    def order(seed):
        dataset = seqio.get_mixture_or_task("quickstart").get_dataset(
            quickstart.FEATURE_LENGTHS, "train", shuffle=True, seed=seed, num_epochs=None
        )
        return [tuple(x["targets"].tolist()) for x in dataset.take(50).as_numpy_iterator()]

    assert order(3) == order(3) != order(4)


# ------------------------------------------------------------------------------------------------------------ baselines


def test_baselines():
    found = quickstart.baselines()
    assert set(found) == set(TASKS)
    assert all(scores["what"] for scores in found.values())
    assert 4.0 < found["quickstart_span_corruption"]["loss"] < np.log(4096)
    assert found["quickstart_source"]["accuracy"] == 25.0
    assert 0 < found["quickstart_qa"]["em"] <= found["quickstart_qa"]["f1"] < 50
    # No single answer does better than the rule that is called the best.
    rows = stdlib_text.questions("validation")
    answers = collections.Counter(q.answers[0] for q in rows)
    guess = metrics.squad([list(q.answers) for q in rows], [answers.most_common(1)[0][0]] * len(rows))
    assert guess["em"] < found["quickstart_qa"]["em"]
    shuffled = random.Random(0).sample(rows, len(rows))
    chance = metrics.squad([list(q.answers) for q in rows], [q.answers[0] for q in shuffled])
    assert chance["em"] < found["quickstart_qa"]["em"]
