"""WMT's pairs and the source that reads block by block: order, hosts, epochs, resuming, errors in files."""

import logging

import pytest
import seqio
import tensorflow as tf

from tasks import readers, wmt

LENGTHS = {"inputs": 64, "targets": 64}
BLOCK = 64
LINES = 3 * BLOCK - 10


@pytest.fixture
def folder(corpus, bytes_vocabulary, monkeypatch):
    monkeypatch.setattr(wmt, "_LINES", BLOCK)
    folder = corpus / "wmt16_ro-en/train"
    folder.mkdir(parents=True)
    return folder


def write(folder, name="europarl-v8.ro-en", lines=LINES):
    for language in ("ro", "en"):
        text = "".join(f"{language} {i}\n" for i in range(lines))
        (folder / f"{name}.{language}").write_text(text)


def dataset(split="train", **settings):
    settings = {"shuffle": False, "seed": 0} | settings
    return seqio.TaskRegistry.get("wmt16_enro_v003").get_dataset(LENGTHS, split, **settings)


def numbers(rows):
    """The numbers of the pairs, whose sides are the same."""
    pairs = [(row["inputs_pretokenized"].decode(), row["targets_pretokenized"].decode()) for row in rows]
    assert all(a.replace("translate English to Romanian: en", "ro") == b for a, b in pairs)
    return [int(b.split()[-1]) for _, b in pairs]


def test_pairs_come_in_order_and_each_once(folder):
    write(folder)
    assert seqio.TaskRegistry.get("wmt16_enro_v003").num_input_examples("train") == LINES
    assert numbers(dataset().as_numpy_iterator()) == [*range(LINES)]


def test_epochs_are_shuffled_anew_and_whole(folder):
    write(folder)
    both = numbers(dataset(shuffle=True, num_epochs=2).as_numpy_iterator())
    assert sorted(both) == sorted([*range(LINES)] * 2)
    assert both[:LINES] != both[LINES:]


def test_hosts_share_the_blocks(folder):
    write(folder)
    parts = [numbers(dataset(shard_info=seqio.ShardInfo(i, 2)).as_numpy_iterator()) for i in range(2)]
    assert sorted([*parts[0], *parts[1]]) == [*range(LINES)]
    assert all(parts)
    with pytest.raises(ValueError, match="3 blocks cannot be shared among 4 hosts"):
        dataset(shard_info=seqio.ShardInfo(3, 4))


def test_a_position_is_saved_and_found_again(folder, tmp_path):
    write(folder)
    data = dataset(shuffle=True, num_epochs=None)
    iterator = iter(data)
    for _ in range(LINES + 7):
        next(iterator)
    path = tf.train.Checkpoint(iterator).save(str(tmp_path / "position"))
    rest = [next(iterator)["targets_pretokenized"].numpy() for _ in range(50)]
    other = iter(data)
    tf.train.Checkpoint(other).restore(path)
    assert [next(other)["targets_pretokenized"].numpy() for _ in range(50)] == rest


def test_files_of_a_split_without_a_folder(folder, corpus):
    write(corpus / "wmt16_ro-en", "validation", 3)
    assert numbers(dataset("validation").as_numpy_iterator()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a.ro": "x\ny\n", "a.en": "x\n"}, "a.ro has 2, .*a.en has 1 sentences"),
        ({"a.ro.sgm": '<seg id="1">x</seg>\n', "a.en.sgm": "\n"}, "a.ro.sgm has 1, .*a.en.sgm has 0"),
        ({"a.ro": "x\n"}, r"a.ro: its partner is not there, the same name with \.en"),
        ({"a.ro.gz": "", "a.en.gz": ""}, "a.en.gz: unpack it"),
        ({"a.tmx": ""}, "a.tmx: files here end in .ro"),
        ({"a.de-en.tsv": "x\ty\n"}, "a.de-en.tsv: not between ro and en"),
        ({"a.ro": "", "a.en": ""}, "no examples in"),
    ],
)
def test_files_that_are_not_pairs_are_errors(folder, files, says):
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=says):
        list(dataset())


def test_what_has_no_other_side_is_left_out_and_said(folder, caplog):
    caplog.set_level(logging.INFO, "absl")
    (folder / "a.ro-en.tsv").write_text("unu\tone\ndoi\ntrei\t\n patru \tfour\n")
    pairs = [(row["inputs_pretokenized"], row["targets_pretokenized"]) for row in dataset().as_numpy_iterator()]
    assert [target for _, target in pairs] == [b"unu", b"patru"]
    assert f"{folder}/a.ro-en.tsv:2: left out" in caplog.text


def test_a_line_that_is_not_utf8_is_named_or_skipped(folder):
    (folder / "a.ro").write_bytes(b"unu\n\xff\ntrei\n")
    (folder / "a.en").write_bytes(b"one\ntwo\nthree\n")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"a\.ro:2: not UTF-8"):
        list(dataset())
    readers.set_bad_rows("skip")
    try:
        assert len(list(dataset())) == 2
    finally:
        readers.set_bad_rows("refuse")
