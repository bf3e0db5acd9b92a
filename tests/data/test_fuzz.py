"""Whatever the files of a task hold, reading them gives examples, or says what is wrong in which file."""

import contextlib
import functools
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
import seqio

from tasks import (
    c4,
    closed_book,
    cnn_dailymail,
    glue,
    readers,
    squad,
    super_glue,
    tables,
    trivia_qa,
    user_files,
    winograd,
    wmt,
)

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

settings = hypothesis.settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
actions = st.sampled_from(["refuse", "skip"])
texts = st.text(max_size=6) | st.sampled_from(["\ud800", "a\0b", "\ufeff", "é", "nan", "1e999", "9" * 5000])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(["digits", "brackets"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


def rows_of(*columns):
    """Objects that have the columns more often than not, with values that are texts more often than not."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(columns, texts | values)) | st.fixed_dictionaries(
        dict.fromkeys(columns, texts)
    )


def as_json(value) -> bytes:
    """With what no encoder would write in its place: a number of any length, brackets of any depth."""
    return json.dumps(value).encode().replace(b'"digits"', b"9" * 5000).replace(b'"brackets"', b"[" * 100_000)


def json_lines(*columns):
    return st.lists((rows_of(*columns) | values).map(as_json) | st.binary(max_size=9), max_size=4).map(b"\n".join)


def table(columns, delimiter, fields):
    """A header, most often the right one, and rows, most often of the right length."""
    size = len(columns)
    row = st.lists(fields, min_size=size, max_size=size) | st.lists(fields, max_size=size + 1)
    header = st.just(list(columns)) | st.lists(st.sampled_from(columns) | fields, max_size=size)
    lines = st.tuples(header, st.lists(row, max_size=4)).map(lambda parts: [parts[0], *parts[1]])
    return lines.map(lambda rows: "\n".join(map(delimiter.join, rows)).encode("utf-8", "surrogatepass"))


def damaged(contents):
    """Contents as they are, or cut, or with a byte changed."""

    def harm(parts):
        content, place, byte = parts
        at = place % (len(content) + 1)
        return (content, content[:at], content[:at] + bytes([byte]) + content[at + 1 :])[place % 3]

    return st.tuples(contents, st.integers(0, 10**6), st.integers(0, 255)).map(harm) | contents


def answers_or_says(path, action, read):
    readers.set_bad_rows(action)
    try:
        read()
    except (ValueError, OSError) as error:
        assert str(path) in str(error), repr(error)
        str(error).encode()
    finally:
        readers.set_bad_rows("refuse")


@pytest.fixture
def mine(tmp_path, bytes_vocabulary):
    yield tmp_path
    with contextlib.suppress(ValueError):
        seqio.TaskRegistry.remove("fuzzed")


def columnar(write):
    """A file of two columns of texts, numbers or lists, written by `write` (table, file)."""

    def content(columns):
        file = io.BytesIO()
        write(pa.table(columns), file)
        return file.getvalue()

    clean = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    column = st.one_of(
        *(st.lists(st.none() | kind, min_size=2, max_size=2) for kind in (clean, st.floats(), st.lists(clean)))
    )
    return st.fixed_dictionaries({"inputs": column, "targets": column}).map(content)


def stream(rows, file):
    with pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)


def zstd(content):
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as file:
        file.write(content)
    return packed.getvalue().to_pybytes()


PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}
FORMATS = {
    ".parquet": columnar(pa.parquet.write_table),
    ".arrow": columnar(stream),
    ".json": json_lines("inputs", "targets") | st.lists(rows_of("inputs", "targets") | values, max_size=3).map(as_json),
    ".txt": json_lines("text"),
    ".jsonl": json_lines("inputs", "targets"),
    ".csv": table(("inputs", "targets"), ",", texts | st.sampled_from(['"', '"a"', '"a\nb"', "\r", ""])),
    ".tsv": table(("inputs", "targets"), "\t", texts | st.sampled_from(['"', ""])),
}


@pytest.mark.parametrize("ending", FORMATS)
@settings
@hypothesis.given(st.data())
def test_ones_own_files(mine, ending, data):
    content = data.draw(damaged(FORMATS[ending]))
    packing = "" if ending in tables.ENDINGS else data.draw(st.sampled_from(list(PACKERS)))
    path = mine / f"a{ending}{packing}"
    path.write_bytes(data.draw(damaged(st.just(PACKERS[packing](content)))) if packing else content)
    objective = "span_corruption" if ending == ".txt" else "text_to_text"

    def read():
        task = user_files.register_files("fuzzed", str(path), objective=objective)
        assert task.num_input_examples("train")

    answers_or_says(path, data.draw(actions), read)


labels = texts | st.sampled_from(["entailment", "not_entailment", "0", "1", "4.25", "-1"])
GLUE = {config.name: config for config in glue.CONFIGS}


@pytest.mark.parametrize("name", ["cola", "stsb", "mrpc", "qqp", "rte"])
@settings
@hypothesis.given(st.data())
def test_glue(tmp_path, name, data):
    config = GLUE[name]
    columns = ("index", "#1 ID", "#2 ID", *config.text.values(), config.label_column)
    for file in ("train.tsv", *(["msr_paraphrase_train.txt"] if name == "mrpc" and data.draw(st.booleans()) else [])):
        (tmp_path / file).write_bytes(data.draw(damaged(table(columns, "\t", labels | texts))))
    path = tmp_path / "train.tsv"

    def read():
        found = glue.read([str(path)], "train", config)
        assert len({len(column) for column in found.values()}) == 1

    answers_or_says(tmp_path, data.draw(actions), read)


@settings
@hypothesis.given(damaged(json_lines("text", "timestamp", "url")), actions)
def test_c4(tmp_path, content, action):
    path = str(tmp_path / "c4-train.json")

    def read():
        for number, line in enumerate(content.split(b"\n"), start=1):
            with readers.Skipped(path):
                parsed = c4._document(path, number, readers.decode_line(path, number, line))
                assert [text.encode() for text in parsed]

    answers_or_says(path, action, read)


answers = st.lists(st.fixed_dictionaries({"text": texts | values, "answer_start": st.integers() | values}), max_size=2)
questions = st.fixed_dictionaries({}, optional={"id": texts | values, "question": texts | values, "answers": answers})
paragraphs = st.fixed_dictionaries({}, optional={"context": texts | values, "qas": st.lists(questions, max_size=2)})
articles = st.fixed_dictionaries({"paragraphs": st.lists(paragraphs | values, max_size=2)}, optional={"title": values})
corpora = st.fixed_dictionaries({"data": st.lists(articles | values, max_size=2) | values}) | values


@settings
@hypothesis.given(damaged(st.one_of(corpora).map(as_json)), actions)
def test_squad(tmp_path, content, action):
    path = tmp_path / "train-v1.1.json"
    path.write_bytes(content)
    answers_or_says(path, action, lambda: squad.read([str(path)], "train"))


@settings
@hypothesis.given(damaged(table(("id", "article", "highlights"), ",", texts)), actions)
def test_cnn_dailymail(tmp_path, content, action):
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    answers_or_says(path, action, lambda: cnn_dailymail.read([str(path)], "train"))


numbers = st.integers(-2, 9) | values
booleans = st.booleans() | st.sampled_from([0, 1, "entailment", "choice1"]) | values


def objects(**fields):
    """Objects that have the fields, or some of them."""
    return st.fixed_dictionaries(fields) | st.fixed_dictionaries({}, optional=fields) | values


def lists(items):
    return st.lists(items, max_size=2) | values


words = texts | values
answer_objects = lists(objects(text=words, idx=numbers, label=booleans))
passages = objects(text=words, questions=lists(objects(question=words, idx=numbers, answers=answer_objects)))
records = objects(text=words, entities=lists(objects(start=numbers, end=numbers)))
spans = objects(span1_text=words, span1_index=numbers, span2_text=words, span2_index=numbers)
SUPER_GLUE = {
    "CB": objects(premise=words, hypothesis=words, label=booleans, idx=numbers),
    "AX-b": objects(sentence1=words, sentence2=words, label=booleans, idx=numbers),
    "MultiRC": objects(idx=numbers, passage=passages),
    "ReCoRD": objects(
        idx=numbers, passage=records, qas=lists(objects(query=words, idx=numbers, answers=answer_objects))
    ),
    "WSC": objects(text=words, target=spans, label=booleans, idx=numbers),
}
READERS = {config.folder: functools.partial(super_glue.read, config=config) for config in super_glue.CONFIGS}
READERS |= {"ReCoRD": super_glue.read_record, "WSC": winograd.read_wsc}


def reads_columns(read, path, split):
    """A split is read into columns of one length, for which an error names the file."""

    def sizes(columns):
        for column in columns.values():
            yield from sizes(column) if isinstance(column, dict) else [int(column.shape[0])]

    assert len(set(sizes(read([str(path)], split)))) == 1


@pytest.mark.parametrize("name", SUPER_GLUE)
@settings
@hypothesis.given(st.data())
def test_super_glue(tmp_path, name, data):
    path = tmp_path / "train.jsonl"
    lines = st.lists(SUPER_GLUE[name].map(as_json) | st.binary(max_size=9), max_size=3).map(b"\n".join)
    path.write_bytes(data.draw(damaged(lines)))
    split = data.draw(st.sampled_from(["train", "test"]))
    answers_or_says(path, data.draw(actions), lambda: reads_columns(READERS[name], path, split))


@settings
@hypothesis.given(damaged(st.lists(texts | st.sampled_from(["a", "a,b", "b", ""]), max_size=11).map("\n".join).map(
    lambda text: text.encode("utf-8", "surrogatepass"))), actions)  # fmt: skip
def test_dpr(tmp_path, content, action):
    path = tmp_path / "train.c.txt"
    path.write_bytes(content)
    answers_or_says(path, action, lambda: reads_columns(winograd.read_dpr, path, "train"))


documents = lists(objects(Filename=words))
answer = objects(Value=words, Aliases=lists(words), NormalizedAliases=lists(words))
trivia = objects(Question=words, QuestionId=words, Answer=answer, EntityPages=documents, SearchResults=documents)
web = objects(
    utterance=words, targetValue=words | st.sampled_from(["(list (description a))", '(list (description "b c"))'])
)
CLOSED_BOOK = {
    "nq": (
        closed_book.nq_rows,
        st.lists(objects(question=words, answer=lists(words)).map(as_json), max_size=3).map(b"\n".join),
    ),
    "wq": (closed_book.wq_rows, lists(web).map(as_json)),
    "trivia_qa": (closed_book.tqa_rows, objects(Data=lists(trivia)).map(as_json)),
}


@pytest.mark.parametrize("name", CLOSED_BOOK)
@settings
@hypothesis.given(st.data())
def test_closed_book(tmp_path, name, data):
    path, (rows, contents) = tmp_path / "a-train.json", CLOSED_BOOK[name]
    path.write_bytes(data.draw(damaged(contents)))
    slices = data.draw(st.sampled_from([{}, {"train": ("train", slice(1, None))}]))
    read = functools.partial(closed_book.read, rows=rows, slices=slices)
    answers_or_says(path, data.draw(actions), lambda: reads_columns(read, path, "train"))


@settings
@hypothesis.given(damaged(objects(Data=lists(trivia)).map(as_json)), actions)
def test_trivia_qa(tmp_path, content, action):
    path = tmp_path / "qa-train.json"
    path.write_bytes(content)

    def read():
        index = trivia_qa._Questions([str(path)], "train")
        for block in range(index.size):
            (row,) = index.read(block)
            assert set(row) == {*trivia_qa.FEATURES, *trivia_qa._CONTEXTS}

    answers_or_says(path, action, read)


sentences = st.lists(texts | st.sampled_from(["a\tb", '<seg id="1">x</seg>', "a\r"]), max_size=4).map("\n".join).map(
    lambda text: text.encode("utf-8", "surrogatepass")
)  # fmt: skip


@pytest.mark.parametrize("ending", [".{}", ".{}.sgm", ".tsv"])
@settings
@hypothesis.given(damaged(sentences), damaged(sentences), st.booleans(), actions)
def test_wmt(tmp_path, ending, first, second, same, action):
    files = [tmp_path / f"train{ending.format(language)}" for language in ("de", "en")]
    for file, content in zip(files, (first, first if same else second), strict=True):
        file.write_bytes(content)

    def read():
        paths = sorted({str(file) for file in files})
        pairs = wmt.Pairs(paths, "train", ("de", "en"))
        rows = [row for block in range(pairs.size) for row in pairs.read(block)]
        assert len(rows) <= pairs.examples
        assert all(row["de"] and row["en"] for row in rows)

    answers_or_says(tmp_path, action, read)
