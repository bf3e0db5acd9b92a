"""The formats and places of one's own files: Parquet, Arrow, JSON, compressed, saved folders, the Hugging Face hub."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import hub_server
import pyarrow as pa
import pyarrow.parquet
import pytest
import seqio
import tensorflow as tf

from tasks import file_formats, locations, readers, tables, templates, user_files
from tasks.errors import MissingFileError, UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = [
    {"question": f"Où {i}?", "answers": {"text": [f"a{i}", "b"], "start": [i]}, "n": i, "f": i / 10} for i in range(250)
]
TEMPLATES = {"inputs_template": "{question} {n} {f}", "targets_template": "{answers.text.0}"}
TEXTS = [(f"Où {i}? {i} {i / 10}", f"a{i}") for i in range(250)]


def table():
    rows = pa.Table.from_pylist(ROWS)
    return rows.set_column(3, "f", pa.array([row["f"] for row in ROWS], pa.float32()))


def write_table(path, rows):
    if path.suffix == ".parquet":
        pa.parquet.write_table(rows, path)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)


def zstd(data):
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as file:
        file.write(data)
    return packed.getvalue().to_pybytes()


def write_ipc(path, new, size=60):
    with new(str(path), table().schema) as writer:
        writer.write_table(table(), max_chunksize=size)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
WRITERS = {
    "a.parquet": lambda path: pa.parquet.write_table(table(), path, row_group_size=60),
    "a.arrow": lambda path: write_ipc(path, pa.ipc.new_stream),
    "a.feather": lambda path: write_ipc(path, pa.ipc.new_file),
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.ndjson": lambda path: path.write_bytes(LINES),
    "a.json": lambda path: path.write_bytes(LINES),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(LINES)),
    "a.jsonl.GZ": lambda path: path.write_bytes(gzip.compress(LINES)),
}


@pytest.fixture
def mine(tmp_path, bytes_vocabulary):
    yield tmp_path
    readers.set_bad_rows("refuse")
    if "mine" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("mine")


def pairs(path, **settings):
    task = user_files.register_files("mine", str(path), **(TEMPLATES | settings))
    dataset = task.source.get_dataset("train", shuffle=False)
    return [(x["inputs"].decode(), x["targets"].decode()) for x in dataset.as_numpy_iterator()]


@pytest.mark.parametrize("limit", [user_files.MEMORY_LIMIT, 0], ids=["in memory", "streamed"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(mine, monkeypatch, name, limit):
    WRITERS[name](mine / name)
    monkeypatch.setattr(user_files, "MEMORY_LIMIT", limit)
    assert pairs(mine / name) == TEXTS
    assert file_formats.num_rows(str(mine / name)) == len(ROWS)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst", "a.csv"])
def test_a_streamed_file_goes_on_from_a_saved_position(mine, monkeypatch, name):
    if name == "a.csv":
        (mine / name).write_text("question,n,f,answers.text.0\n" + "".join(f"q,{i},0,a\n" for i in range(250)))
    else:
        WRITERS[name](mine / name)
    monkeypatch.setattr(user_files, "MEMORY_LIMIT", 0)
    task = user_files.register_files("mine", str(mine / name), **TEMPLATES)

    def fresh():
        return iter(task.source.get_dataset("train", shuffle=True, seed=1, num_epochs=2))

    expected = [x["inputs"].numpy() for x in fresh()]
    iterator = fresh()
    for _ in range(300):
        next(iterator)
    saved = tf.train.Checkpoint(iterator).write(str(mine / "position"))
    again = fresh()
    next(again)
    tf.train.Checkpoint(again).read(saved)
    assert [x["inputs"].numpy() for x in again] == expected[300:] and len(expected) == 500


def test_two_readers_of_one_file_do_not_disturb_each_other(mine, monkeypatch):
    WRITERS["a.parquet"](mine / "a.parquet")
    monkeypatch.setattr(user_files, "MEMORY_LIMIT", 0)
    source = user_files.register_files("mine", str(mine / "a.parquet"), **TEMPLATES).source
    both = tf.data.Dataset.zip(tuple(source.get_dataset("train", shuffle=False) for _ in range(2)))
    assert [(a["targets"].decode(), b["targets"].decode()) for a, b in both.as_numpy_iterator()] == [
        (target, target) for _, target in TEXTS
    ]


def test_of_parquet_only_the_needed_columns_are_read(mine):
    rows = table().append_column("junk", pa.array(["z" * 50] * 250)).select(["junk", "question", "answers", "n", "f"])
    pa.parquet.write_table(rows, mine / "a.parquet", compression="none", use_dictionary=False)
    content = bytearray((mine / "a.parquet").read_bytes())
    content[10:60] = b"\xff" * 50  # the header of the first page of `junk`
    (mine / "a.parquet").write_bytes(bytes(content))
    assert pairs(mine / "a.parquet") == TEXTS
    with pytest.raises(readers.BadRow, match="damaged data"):
        list(tables.rows(str(mine / "a.parquet"), readers.Skipped("", "refuse")))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather", "a.jsonl.zst", "a.json.gz"])
def test_a_file_cut_short_is_an_error_with_its_name(mine, name):
    WRITERS[name](mine / name)
    content = (mine / name).read_bytes()
    (mine / name).write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(readers.BadRow, match=rf"{name}.*(cut short|truncated)"):
        pairs(mine / name)


def test_a_stream_without_its_end_is_cut_short(mine):
    WRITERS["a.arrow"](mine / "a.arrow")
    (mine / "a.arrow").write_bytes((mine / "a.arrow").read_bytes()[:-8])
    with pytest.raises(readers.BadRow, match=r"the stream has no end"):
        pairs(mine / "a.arrow")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_text_that_is_not_utf8_is_named_or_left_out_by_row(mine, name):
    texts = pa.array([b"ok", b"caf\xe9", b"x"]).view(pa.string())
    write_table(mine / name, pa.table({"inputs": texts, "targets": ["a", "b", "c"]}))
    with pytest.raises(readers.BadRow, match=rf"{name}:2: not UTF-8"):
        pairs(mine / name, inputs_template="{inputs}", targets_template="{targets}")
    readers.set_bad_rows("skip")
    assert pairs(mine / name, inputs_template="{inputs}", targets_template="{targets}") == [("ok", "a"), ("x", "c")]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_column_that_is_there_twice_is_an_error(mine, name):
    columns = [pa.array([text]) for text in "abc"]
    write_table(mine / name, pa.table(columns, names=["inputs", "targets", "targets"]))
    with pytest.raises(UserError, match=f"{name} has the column 'targets' more than once"):
        pairs(mine / name)


def test_feather_of_version_1_is_named(mine):
    (mine / "a.feather").write_bytes(b"FEA1" + bytes(40) + b"FEA1")
    with pytest.raises(readers.BadRow, match="Feather of version 1: write it with version=2"):
        pairs(mine / "a.feather")


def test_a_damaged_row_group_is_named_or_left_out(mine, caplog):
    pa.parquet.write_table(table(), mine / "a.parquet", row_group_size=60, compression="none", use_dictionary=False)
    start = pa.parquet.ParquetFile(mine / "a.parquet").metadata.row_group(1).column(0).data_page_offset
    content = bytearray((mine / "a.parquet").read_bytes())
    content[start : start + 20] = b"\xff" * 20
    (mine / "a.parquet").write_bytes(bytes(content))
    with pytest.raises(readers.BadRow, match=r"a\.parquet:61: damaged data"):
        pairs(mine / "a.parquet")
    readers.set_bad_rows("skip")
    assert pairs(mine / "a.parquet") == TEXTS[:60] + TEXTS[120:]
    assert "a.parquet:61: damaged data" in caplog.text


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (pa.array(["x", None]), r"a\.parquet:2: column inputs has no value \(null\)"),
        (pa.array([0.5, float("nan")], pa.float32()), r"a\.parquet:2: column inputs has no value"),
        (pa.array([1.5, float("nan")]), r"a\.parquet:2: column inputs has float 'nan'"),
        (pa.array([True, False]), r"a\.parquet:1: column inputs has bool"),
        (pa.array([b"x", b"y"]), r"a\.parquet:1: column inputs has bytes"),
        (pa.array([["x"], ["y"]]), r"a\.parquet:1: column inputs has list"),
    ],
)
def test_a_value_that_is_no_text_is_named_by_row(mine, values, says):
    pa.parquet.write_table(pa.table({"inputs": values, "targets": ["x", "y"]}), mine / "a.parquet")
    with pytest.raises(readers.BadRow, match=says):
        pairs(mine / "a.parquet", inputs_template="{inputs}", targets_template="{targets}")


def test_empty_row_groups_and_empty_files(mine):
    empty = table().slice(0, 0)
    with pa.parquet.ParquetWriter(mine / "a.parquet", empty.schema) as writer:
        for part in (empty, table().slice(0, 2), empty, table().slice(2)):
            writer.write_table(part)
    assert pairs(mine / "a.parquet") == TEXTS
    pa.parquet.write_table(empty, mine / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: has no rows"):
        pairs(mine / "b.parquet")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{questions}", r"no column questions, .* it has: question, answers, n, f\. Did you mean {question}\?"),
        ("{answers.texts.0}", r"a\.parquet:1: no column answers\.texts\.0; answers has: text, start"),
        ("{answers.text.5}", r"a\.parquet:1: no column answers\.text\.5; answers\.text is a list of 2"),
        ("{n.x}", r"a\.parquet:1: no column n\.x; n is '0'"),
    ],
)
def test_a_column_that_is_missing_is_named_with_what_there_is(mine, template, says):
    WRITERS["a.parquet"](mine / "a.parquet")
    with pytest.raises(readers.BadRow, match=says):
        pairs(mine / "a.parquet", inputs_template=template)


def test_a_column_whose_name_has_a_dot_is_that_column():
    row = {"a.b": "whole", "a": {"b": "inside", "c": "c"}}
    assert templates.substitute("", row, "{a.b} {a.c}") == "whole c"


def test_a_pretty_printed_object_and_an_array_on_one_line(mine):
    (mine / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    assert pairs(mine / "one.json") == TEXTS[:1]
    (mine / "all.json").write_text(json.dumps(ROWS))
    assert pairs(mine / "all.json") == TEXTS


# Folders that `datasets` saves.


def saved(folder):
    folder.mkdir(parents=True)
    for k in range(2):
        with pa.ipc.new_stream(str(folder / f"data-{k:05}-of-00002.arrow"), table().schema) as writer:
            writer.write_table(table().slice(125 * k, 125))
    (folder / "dataset_info.json").write_text("{}")
    files = [{"filename": f"data-{k:05}-of-00002.arrow"} for k in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_format_type": None}))


def test_a_folder_saved_to_disk_is_its_arrow_files(mine):
    saved(mine / "set" / "train")
    assert pairs(mine / "set" / "train") == TEXTS
    (mine / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match=r"has several splits: name one of them, such as '.*set/train'"):
        pairs(mine / "set")
    (mine / "set" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(MissingFileError, match="arrow, which does not exist"):
        pairs(mine / "set" / "train")


def test_another_folder_is_answered_with_a_pattern(mine):
    (mine / "plain").mkdir()
    with pytest.raises(MissingFileError, match=r"It is a folder: name its files, such as '.*plain/\*\.jsonl'"):
        pairs(mine / "plain")


# The hub.

ON_HUB = {"data/train-0.jsonl": b'{"inputs": "a"}\n', "data/test-0.jsonl": b"{}\n", "README.md": b"x"}


FIND = """
import sys
from tasks import locations
for pattern in sys.argv[1:]:
    try:
        print(locations.find(pattern))
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_files_on_the_hub_are_downloaded_and_later_found_in_its_cache(tmp_path):
    settings = {"HF_HOME": str(tmp_path), "NO_PROXY": "*"}

    def find(*patterns):
        command = [sys.executable, "-c", FIND, *patterns]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False, timeout=300
        )
        return done.stdout.splitlines()

    place, train = "hf://datasets/me/mine", f"snapshots/{hub_server.SHA}/data/train-0.jsonl']"
    several = [f"{place}/data/train-*.jsonl", f"{place}@v1/data/*.jsonl", f"{place}/x*", "hf://datasets/me/other/x"]
    with hub_server.serving("datasets", "me/mine", ON_HUB) as settings["HF_ENDPOINT"]:
        first, versioned, nothing, unknown = find(*several)
    assert first.endswith(train) and "test-0" in versioned and versioned.endswith(train)
    assert nothing.startswith("MissingFileError no file of the dataset me/mine")
    assert unknown.startswith("UserFileError 'hf://datasets/me/other/x' cannot be read from the hub")
    again, new = find(f"{place}/data/train-*.jsonl", "hf://datasets/me/new/*.jsonl")
    assert again == first
    assert new.startswith("UserFileError") and "Check the name and the network" in new


@pytest.mark.parametrize("place", ["hf://datasets/mine", "hf://models/me/mine/x.jsonl", "hf://datasets/me/mine"])
def test_a_place_that_is_not_on_the_hub_is_answered_with_the_form(place):
    with pytest.raises(UserError, match="write hf://datasets/OWNER/NAME/PATTERN"):
        locations.find(place)


def test_without_the_hubs_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 't5x_lite\[hub\]'"):
        locations.find("hf://datasets/me/mine/*.jsonl")
