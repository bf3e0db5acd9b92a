"""Official files to examples; what is wrong with them; the position in them."""

import gzip
import itertools
import json
import time
import zlib

import numpy as np
import pytest
import seqio
import tensorflow as tf

from tasks import c4, data_sources, preprocessors, readers, squad


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def task(name):
    return seqio.TaskRegistry.get(f"glue_{name}_v002")


def raw(source, split="train", **settings):
    return list(source.get_dataset(split, **({"shuffle": False} | settings)).as_numpy_iterator())


def test_glue_files_as_tfds_has_them(corpus):
    write(corpus, "glue/CoLA/train.tsv", 'gj04\t1\t\tHe said "so.\ncj99\t0\t*\tMore the you.\n')
    write(corpus, "glue/CoLA/test.tsv", "index\tsentence\n0\tBill left.\n")
    write(corpus, "glue/MRPC/dev.tsv", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tone\ttwo\r\n")
    write(corpus, "glue/STS-B/train.tsv", "index\tgenre\tsentence1\tsentence2\tscore\n0\tg\ta\tb\t3.800\n")
    write(corpus, "glue/QNLI/dev.tsv", "index\tquestion\tsentence\tlabel\n5\tq\ts\tnot_entailment\n")
    assert raw(task("cola").source) == [
        {"sentence": b'He said "so.', "label": 1, "idx": 0},
        {"sentence": b"More the you.", "label": 0, "idx": 1},
    ]
    assert raw(task("cola").source, "test") == [{"sentence": b"Bill left.", "label": -1, "idx": 0}]
    assert raw(task("mrpc").source, "validation") == [{"sentence1": b"one", "sentence2": b"two", "label": 1, "idx": 0}]
    (stsb,) = raw(task("stsb").source)
    assert stsb["label"] == np.float32(3.8)
    assert stsb["label"].dtype == np.float32
    assert raw(task("qnli").source, "validation")[0]["label"] == 1
    assert task("cola").num_input_examples("train") == 2


def test_only_splits_with_files_are_there_and_a_mixture_passes_over_the_rest(corpus):
    write(corpus, "glue/MNLI/train.tsv", "sentence1\tsentence2\tgold_label\np\th\tneutral\n")
    assert task("mnli").splits == ("train",)
    assert task("mnli_matched").splits == ()
    with pytest.raises(ValueError, match=r"no split 'validation' in the files in .*MNLI.*dev_matched\.tsv"):
        task("mnli_matched").source.get_dataset("validation")
    assert "the files in" in data_sources.describe(task("mnli"))["glue_mnli_v002"]


def test_many_files_are_interleaved_as_seqio_does(tmp_path):
    """16 rows of each of 16 files in turn; a file that ends gives its place up in the turn of its last rows."""
    sizes = [0, 1, 5, 16, 17, 31, 32, 33, 48, 64, 65, 70, 130, 3, 16, 40, 2, 20, 9, 64, 1, 100]
    paths = [str(write(tmp_path, f"{k:02}.txt", "".join(f"{k} {i}\n" for i in range(n)))) for k, n in enumerate(sizes)]

    def read(path, position):
        return ((number, [line]) for number, line in readers.lines(path, start=position))

    ours = data_sources.RowsSource({"train": paths}, read, ["text"])
    seqios = seqio.FileDataSource(tf.data.TextLineDataset, {"train": paths})
    assert [row["text"] for row in raw(ours)] == raw(seqios)
    assert len({row["text"] for row in raw(ours, shuffle=True, seed=1)}) == sum(sizes)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("question\tsentence\nq\ts\n", r"train\.tsv:1: no column label; it has: question, sentence"),
        ("question\tlabel\nq\tentailment\n", r"train\.tsv:1: no column sentence; it has: question, label"),
        ("question\tsentence\tlabel\nq\ts\tentailment\nq\n", r"train\.tsv:3: no sentence, label in this row"),
        ("question\tsentence\tlabel\nq\ts\tperhaps\n", r"train\.tsv:2: unknown label 'perhaps'; qnli has entailment"),
        ("question\tsentence\tlabel\nq\ts\t2\n", r"train\.tsv:2: unknown label '2'"),
        ("question\tsentence\tlabel\n", "no examples"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(corpus, rows, says):
    write(corpus, "glue/QNLI/train.tsv", rows)
    with pytest.raises(ValueError, match=says):
        raw(task("qnli").source)


def test_qqp_drops_broken_rows_as_tfds_does(corpus):
    header = "id\tquestion1\tquestion2\tis_duplicate\n"
    write(corpus, "glue/QQP/train.tsv", header + "1\ta\tb\t0\n2\tbroken\n3\tc\td\t1\n")
    assert [(x["question1"], x["idx"]) for x in raw(task("qqp").source)] == [(b"a", 0), (b"c", 2)]


def test_text_that_is_not_utf8_is_refused_with_its_line(corpus):
    path = write(corpus, "glue/SST-2/train.tsv", "sentence\tlabel\nfine\t1\n")
    path.write_bytes(path.read_bytes() + b"caf\xe9\t1\n")
    with pytest.raises(ValueError, match=r"train\.tsv:3: not UTF-8"):
        raw(task("sst2").source)


def test_squad_file(corpus):
    questions = [
        {
            "id": "x",
            "question": "Who?",
            "answers": [{"text": "A", "answer_start": 0}, {"text": "A B", "answer_start": 0}],
        },
        {"id": "y", "question": "Where?", "answers": [{"text": "B", "answer_start": 2}]},
    ]
    article = {"title": "T", "paragraphs": [{"context": "A B", "qas": questions}]}
    path = write(corpus, "squad/train-v1.1.json", json.dumps({"version": "1.1", "data": [article]}))
    first, second = raw(squad.source)
    assert (first["id"], first["title"], first["context"], first["question"]) == (b"x", b"T", b"A B", b"Who?")
    assert first["answers"]["text"].tolist() == [b"A", b"A B"]
    assert second["answers"]["answer_start"].tolist() == [2]
    assert first["answers"]["answer_start"].dtype == np.int32
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"train-v1\.1\.json:1: not JSON"):
        raw(squad.source)


def test_squad_spans_count_words_between_single_spaces(corpus):
    def question(number, answer):
        return {"id": str(number), "question": "Who?", "answers": [{"text": answer, "answer_start": 0}]}

    qas = [question(i, answer) for i, answer in enumerate(["Denver Broncos", "a no-one", "won it"])]
    article = {"title": "T", "paragraphs": [{"context": "The Denver Broncos, 1st, won it", "qas": qas}]}
    write(corpus, "squad/train-v1.1.json", json.dumps({"data": [article]}))
    task = seqio.TaskRegistry.get("squad_v010_allanswers_span")
    dataset = squad.span_targets(preprocessors.squad(squad.source.get_dataset("train", shuffle=False)))
    # The Denver Broncos "" "" 1st "" "" won it: what is not there and what is at the very end are not found.
    assert [x["targets"] for x in dataset.as_numpy_iterator()] == [b"start: 1 end: 2", b"", b""]
    assert [p for p in task.preprocessors if p is squad.leave_out_without_targets]
    assert len(list(squad.leave_out_without_targets(dataset))) == 1


def documents(folder, count, name="c4/c4-train.00000-of-00002.json.gz", start=0):
    rows = [json.dumps({"text": f"document {i} é", "timestamp": "t", "url": "u"}) for i in range(start, start + count)]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(r + "\n" for r in rows).encode()))
    return path


def test_c4_files_are_streamed_and_sharded_by_file(corpus):
    documents(corpus, 150)
    documents(corpus, 70, "c4/c4-train.00001-of-00002.json.gz", start=150)
    texts = {x["text"].decode() for x in raw(c4.source)}
    assert texts == {f"document {i} é" for i in range(220)}
    assert raw(c4.source)[0].keys() == {"text", "timestamp", "url"}
    assert len(c4.source.list_shards("train")) == 2
    assert len(raw(c4.source, shard_info=seqio.ShardInfo(1, 2))) == 70
    assert c4.source.splits == ("train",)


@pytest.mark.parametrize("at", ["in a line", "at a line end"])
def test_truncated_gzip_is_refused(corpus, at):
    path = documents(corpus, 300)
    if at == "in a line":
        path.write_bytes(path.read_bytes()[:-40])
    else:  # a whole number of lines, then nothing: tf.data alone would take it for a short file
        packer = zlib.compressobj(wbits=31)
        lines = b"".join(json.dumps({"text": f"{i}"}).encode() + b"\n" for i in range(100))
        path.write_bytes(packer.compress(lines) + packer.flush(zlib.Z_FULL_FLUSH))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"c4-train.00000-of-00002.json.gz:\d+: "):
        raw(c4.source)


def test_members_of_a_gzip_are_read_on(corpus):
    path = documents(corpus, 10)
    path.write_bytes(path.read_bytes() + gzip.compress(b'{"text": "last"}\n'))
    assert len(raw(c4.source)) == 11


def test_a_bad_line_of_c4_is_refused_with_its_number(corpus):
    path = documents(corpus, 1)
    good = b'{"text": "a"}\n'
    for bad, says in (
        (b"{nonsense\n", "not JSON"),
        (b'{"txt": "a"}\n', "no column text"),
        (b'{"text": "\xff"}\n', "UTF-8"),
    ):
        path.write_bytes(gzip.compress(good * 99 + bad + good))
        with pytest.raises(tf.errors.InvalidArgumentError, match=rf"json\.gz:100: .*{says}"):
            raw(c4.source)


def memory(count):
    return data_sources.MemorySource({"train": ["none"]}, lambda paths, split: {"x": np.arange(count)})


def order(dataset):
    return [int(x["x"]) for x in dataset.as_numpy_iterator()]


def test_each_pass_is_a_whole_fresh_shuffle_that_a_seed_repeats():
    passes = order(memory(100).get_dataset(shuffle=True, seed=3, num_epochs=2))
    first, second = passes[:100], passes[100:]
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second != list(range(100))
    assert passes == order(memory(100).get_dataset(shuffle=True, seed=3, num_epochs=2))
    assert passes != order(memory(100).get_dataset(shuffle=True, seed=4, num_epochs=2))


def test_shards_share_out_all_examples():
    shards = [seqio.ShardInfo(i, 3) for i in range(3)]
    parts = [order(memory(10).get_dataset(shuffle=True, seed=i, shard_info=shard)) for i, shard in enumerate(shards)]
    assert sorted(itertools.chain(*parts)) == list(range(10))
    assert max(map(len, parts)) == 4
    with pytest.raises(ValueError, match="2 examples cannot be shared among 3 hosts"):
        memory(2).get_dataset(shard_info=seqio.ShardInfo(2, 3))


def test_position_is_restored(corpus, tmp_path):
    documents(corpus, 200)
    lines = c4.source.get_dataset("train", shuffle=True, seed=0, num_epochs=None).map(lambda x: x["text"])
    rows = memory(50).get_dataset(shuffle=True, seed=0, num_epochs=None).map(lambda x: tf.strings.as_string(x["x"]))
    mixed = tf.data.Dataset.sample_from_datasets([lines, rows], [0.5, 0.5], seed=0).prefetch(200)
    iterator = iter(mixed)
    for i in range(4):  # at some of these, what is read ahead reaches past the end of a pass
        for _ in range(65):
            next(iterator)
        time.sleep(0.05)
        saved = tf.train.Checkpoint(iterator).write(str(tmp_path / f"position-{i}"))
        following = [next(iterator).numpy() for _ in range(300)]
        again = iter(mixed)
        tf.train.Checkpoint(again).read(saved)
        assert [next(again).numpy() for _ in range(300)] == following
    first = iter(mixed)
    assert [next(first).numpy() for _ in range(3)] != following[:3]


def test_without_files_tfds_is_read_and_its_absence_explained(corpus, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/nowhere")
    source = task("rte").source
    assert source.describe() == "TFDS glue/rte:2.0.0 in /nowhere"
    assert source.splits == ("train", "validation", "test")

    def no_data(*args, **kwargs):
        raise AssertionError("dataset not prepared")

    monkeypatch.setattr(seqio.TfdsDataSource, "get_dataset", no_data)
    with pytest.raises(
        FileNotFoundError, match=r"glue/rte:2\.0\.0.*not prepared.*T5X_LITE_DATA_DIR/glue/RTE/ \(train\.tsv"
    ):
        source.get_dataset("train")


def test_a_wrong_data_folder_is_said(monkeypatch):
    monkeypatch.setenv("T5X_LITE_DATA_DIR", "/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="T5X_LITE_DATA_DIR=/nowhere/at/all"):
        _ = task("rte").splits


def test_official_files_have_their_published_sizes(data_dir):
    for name, splits in {"cola": (8551, 1043), "mrpc": (3668, 408), "stsb": (5749, 1500), "rte": (2490, 277)}.items():
        assert tuple(task(name).num_input_examples(s) for s in ("train", "validation")) == splits


@pytest.mark.exhaustive
def test_position_in_a_packed_shuffled_mixture_is_restored(data_dir, tmp_path):
    lengths = {"inputs": 512, "targets": 114}

    def batches():
        mixture = seqio.get_mixture_or_task("c4_glue_squad_temperature_2")
        dataset = mixture.get_dataset(
            lengths, "train", shuffle=True, seed=7, num_epochs=None, shard_info=seqio.ShardInfo(0, 2)
        )
        return iter(seqio.EncDecFeatureConverter(pack=True)(dataset, task_feature_lengths=lengths).batch(2))

    def following(iterator):
        return [{k: v.numpy().tolist() for k, v in next(iterator).items()} for _ in range(20)]

    iterator = batches()
    first = following(iterator)
    saved = tf.train.Checkpoint(iterator).write(str(tmp_path / "position"))
    expected = following(iterator)
    again = batches()
    tf.train.Checkpoint(again).read(saved)
    assert following(again) == expected != first
