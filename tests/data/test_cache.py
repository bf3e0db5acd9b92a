"""Offline caches: what is read from one is what is made on the fly, and no wrong one is read."""

import gzip
import importlib
import importlib.util
import json
import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.cli import main as run
from tasks import cache, vocabulary

REPO = pathlib.Path(__file__).resolve().parents[2]
LENGTHS = {"inputs": 40, "targets": 20}
SPAN, RTE = "c4_v220_span_corruption", "glue_rte_v002"


@pytest.fixture
def corpus(corpus, bytes_vocabulary):
    """Both corpora in small, the byte vocabulary, and no cache known."""
    rows = "".join(f"{i}\tIs {i} even?\tIt is {i % 2}.\t{'not_' * (i % 2)}entailment\n" for i in range(7))
    folders = {name: corpus / name for name in ("c4", "glue/RTE")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (folders["glue/RTE"] / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    for part in range(2):
        with gzip.open(folders["c4"] / f"c4-train.0000{part}-of-00002.json.gz", "wt") as file:
            for i in range(5):
                file.write(json.dumps({"text": f"Document {i} of part {part}. " * (i + 3)}) + "\n")
    before = seqio.get_global_cache_dirs()
    seqio.set_global_cache_dirs([str(corpus / "cache")])
    yield corpus
    seqio.set_global_cache_dirs(before)
    for name in (SPAN, RTE):
        seqio.TaskRegistry.get(name)._cache_dir = None  # SeqIO remembers where it found one
        seqio.TaskRegistry.get(name)._stats.clear()


def write(task: seqio.Task, folder: pathlib.Path, split: str = "train", shards: int = 1) -> None:
    """A cache by SeqIO's format alone (seqio.beam_utils), in the order of the source when it is one shard."""
    folder = folder / task.name
    folder.mkdir(parents=True)
    examples = list(task.preprocess_precache(task.source.get_dataset(split, shuffle=False), seed=0))
    prefix = seqio.get_cached_tfrecord_prefix(str(folder), split)
    for shard in range(shards):
        with tf.io.TFRecordWriter(f"{prefix}-{shard:05}-of-{shards:05}") as records:
            for example in examples[shard::shards]:
                records.write(seqio.dict_to_tfexample(example).SerializeToString())
    features = {
        name: {"shape": [None, *value.shape[1:]] if value.shape.rank else [], "dtype": value.dtype.name}
        for name, value in examples[0].items()
    }
    info = {"num_shards": shards, "features": features, "seqio_version": seqio.__version__}
    pathlib.Path(seqio.get_cached_info_path(str(folder), split)).write_text(json.dumps(info))
    pathlib.Path(seqio.get_cached_stats_path(str(folder), split)).write_text(json.dumps({"examples": len(examples)}))
    (folder / cache.COMPLETED).write_text(cache.record(task))


def examples(name: str, **settings) -> list[dict]:
    settings = {"shuffle": False, "seed": 3} | settings
    return list(seqio.get_mixture_or_task(name).get_dataset(LENGTHS, "train", **settings).as_numpy_iterator())


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            assert np.asarray(a[name]).dtype == np.asarray(b[name]).dtype


@pytest.mark.parametrize("name", [RTE, SPAN])
def test_cached_is_uncached(corpus, name):
    task = seqio.TaskRegistry.get(name)
    write(task, corpus / "cache")
    fresh = examples(name)
    for folder in (corpus / "c4", corpus / "glue/RTE"):  # a cache needs none of it
        for file in folder.iterdir():
            file.unlink()
    cached = examples(name, use_cached=True)
    assert_same(cached, fresh)
    if name == SPAN:  # noise is drawn after the cache: anew for another seed
        other = examples(name, use_cached=True, seed=4)
        assert any(not np.array_equal(a["inputs"], b["inputs"]) for a, b in zip(cached, other, strict=False))


def test_a_cache_is_shared_among_hosts(corpus):
    write(seqio.TaskRegistry.get(RTE), corpus / "cache")
    whole = [int(x["idx"]) for x in examples(RTE, use_cached=True)]
    hosts = [seqio.ShardInfo(host, 2) for host in (0, 1)]
    one, two = ([int(x["idx"]) for x in examples(RTE, use_cached=True, shard_info=host)] for host in hosts)
    assert one
    assert two
    assert sorted(one + two) == whole == list(range(7))


@pytest.mark.slow
def test_a_position_in_a_cache_is_exact_over_the_ends_of_passes(corpus, tmp_path_factory):
    """As tests/data/test_sources.py has it for files; the order of a pass is that of its number and the seed."""
    write(seqio.TaskRegistry.get(RTE), corpus / "cache", shards=3)
    folder = tmp_path_factory.mktemp("positions")

    def start(seed=3):
        task = seqio.TaskRegistry.get(RTE).replace(name="again", shuffle_buffer_size=2)
        task._cache_dir = str(corpus / "cache" / RTE)
        dataset = task.get_dataset(LENGTHS, "train", use_cached=True, seed=seed, num_epochs=None)
        return iter(dataset.map(lambda x: x["idx"]))

    def following(iterator, count):
        return [int(next(iterator)) for _ in range(count)]

    whole, iterator = following(start(), 90), start()
    assert whole != following(start(seed=4), 90)
    for i in range(0, 60, 5):
        saved = tf.train.Checkpoint(iterator).write(str(folder / str(i)))
        again = start()
        tf.train.Checkpoint(again).read(saved)
        assert following(again, 30) == whole[i : i + 30]
        following(iterator, 5)


def test_a_run_reads_the_cache(corpus, monkeypatch, capsys):
    """The first batch is the same, and the log says that it comes from the cache."""
    write(seqio.TaskRegistry.get(RTE), corpus / "cache")
    seqio.set_global_cache_dirs([])
    monkeypatch.chdir(corpus)
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[:])
    shown = []
    for cached in (False, True):
        bindings = {
            "MIXTURE_OR_TASK_NAME": RTE,
            "VOCABULARY": "bytes",
            "VOCABULARY_EXTRA_IDS": 100,
            "USE_CACHED_TASKS": cached,
            "SEQIO_ADDITIONAL_CACHE_DIRS": str(corpus / "cache"),
            "SHUFFLE_TRAIN_EXAMPLES": False,
            "BATCH_SIZE": 2,
        }
        arguments = [f"--gin.{name}={value!r}" for name, value in bindings.items()]
        assert run.main(["run.py", "--gin_file=models/t5_1_1/small.gin", "--mode=inspect", *arguments]) == 0
        out, err = capsys.readouterr()
        assert (f"{RTE} reads the cache {corpus}/cache/{RTE}" in err) == cached
        shown.append(out)
    assert shown[0] == shown[1] != ""


def test_a_missing_or_unfinished_cache_or_split_is_named_with_the_command(corpus):
    with pytest.raises(
        FileNotFoundError, match=rf"{RTE} is not cached: .* in {corpus}/cache\. .*make cache TASK={RTE} C"
    ):
        examples(RTE, use_cached=True)
    (corpus / "cache" / RTE).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has an unfinished one"):
        examples(RTE, use_cached=True)
    (corpus / "cache" / RTE).rmdir()
    task = seqio.TaskRegistry.get(RTE)
    write(task, corpus / "cache")
    with pytest.raises(FileNotFoundError, match=f"has no split 'validation' of {RTE}.*--overwrite"):
        task.get_dataset(LENGTHS, "validation", use_cached=True)
    seqio.set_global_cache_dirs([])
    task._cache_dir = None
    with pytest.raises(FileNotFoundError, match="SEQIO_ADDITIONAL_CACHE_DIRS"):
        cache.describe(task)


def test_another_vocabulary_is_refused_with_both_named(corpus, caplog):
    task = seqio.TaskRegistry.get(RTE)
    write(task, corpus / "cache")
    vocabulary.set_default(seqio.ByteVocabulary(extra_ids=7))
    with pytest.raises(
        ValueError, match=r"made with .*ByteVocabulary \(359 ids.* now has ByteVocabulary \(266 ids.*VOC"
    ):
        examples(RTE, use_cached=True)
    (corpus / "cache" / RTE / cache.COMPLETED).write_text("tfrecord")  # as SeqIO's own script leaves it
    logging.getLogger("absl").propagate = True
    assert cache.check(task).endswith(RTE)
    assert "does not record its vocabulary" in caplog.text


def test_a_sentencepiece_model_is_known_by_its_content(corpus, golden):
    task, mine = seqio.TaskRegistry.get(RTE), corpus / "mine.model"
    vocabulary.set_default(str(golden("spm/unigram.model")))
    write(task, corpus / "cache")
    mine.write_bytes(golden("spm/unigram.model").read_bytes())
    vocabulary.set_default(str(mine))
    assert cache.check(task)
    mine.write_bytes(golden("spm/bpe.model").read_bytes())
    with pytest.raises(ValueError, match=rf"unigram\.model \(.* now has {mine} \("):
        cache.check(task)


def test_no_cache_step_is_no_cache(bytes_vocabulary):
    task = seqio.Task("plain", seqio.FunctionDataSource(lambda split, shuffle_files: None, ["train"]), {}, [])
    assert "no CacheDatasetPlaceholder" in cache.describe(task)["plain"]


# -------------------------------------------------------------------------------------------------------- the command

needs_beam = pytest.mark.skipif(
    not importlib.util.find_spec("apache_beam"), reason="needs Apache Beam: requirements-cache.txt"
)


def command(corpus: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "tasks.cache",
            f"--output_cache_dir={corpus / 'cache'}",
            "--vocabulary=bytes",
            *arguments,
        ],
        cwd=REPO,
        env=os.environ | {"T5X_LITE_DATA_DIR": str(corpus)},
        capture_output=True,
        text=True,
    )


def test_without_beam_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(SystemExit, match=r"needs Apache Beam .*make cache.*requirements-cache\.txt"):
        importlib.import_module("tasks.cache.__main__").command()


@needs_beam
@pytest.mark.slow
def test_beam_makes_the_cache_that_is_read(corpus):
    """By workers in processes of their own, who have data folder and vocabulary from the command alone."""
    workers = "--pipeline_options=--runner=FnApiRunner,--direct_running_mode=multi_processing,--direct_num_workers=2"
    done = command(corpus, f"--tasks={RTE},{SPAN}", "--min_shards=2", workers)
    assert done.returncode == 0, done.stderr
    assert f"{RTE}, train: examples 7" in done.stdout
    fresh, cached = examples(RTE), examples(RTE, use_cached=True)
    assert_same(sorted(cached, key=lambda x: x["idx"]), fresh)  # Beam shuffles: better for training
    task = seqio.TaskRegistry.get(SPAN)
    made = task.preprocess_precache(task.source.get_dataset("train"))
    documents = {x["targets"].tobytes() for x in made.as_numpy_iterator()}
    source = task._get_cached_source("train").get_dataset("train")
    read = [x["targets"].tobytes() for x in source.as_numpy_iterator()]
    assert len(read) == 10
    assert set(read) == documents
    assert task.get_cached_stats("train")["examples"] == 10
    # Over it again: nothing is done, unless it is told to.
    files = {file: file.stat().st_mtime_ns for file in (corpus / "cache" / RTE).iterdir()}
    assert "is already cached" in command(corpus, f"--tasks={RTE}").stdout
    assert {file: file.stat().st_mtime_ns for file in (corpus / "cache" / RTE).iterdir()} == files
    done = command(corpus, f"--tasks={RTE}", "--min_shards=1", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert len(list((corpus / "cache" / RTE).glob("train.tfrecord*"))) == 1


@needs_beam
@pytest.mark.slow
def test_the_command_refuses_before_it_begins(corpus):
    for arguments, says in (
        (["--tasks=glue_rtee"], "no task or mixture is called 'glue_rtee'; nearest: glue_rte_v002"),
        (["--tasks=glue_mnli_v002"], "could not give glue/mnli"),
        ([], "nothing to cache"),
    ):
        done = command(corpus, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr.splitlines()[-1]
    assert not (corpus / "cache").exists()
    (corpus / "cache" / RTE).mkdir(parents=True)
    (corpus / "cache" / RTE / "beam-temp-train").touch()
    done = command(corpus, f"--tasks={RTE}")
    assert done.returncode == 2
    assert "an unfinished cache" in done.stderr.splitlines()[-1]
