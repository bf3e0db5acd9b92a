"""TFDS and the official files give the same examples: TFDS's own builders run on the files, and both are read.

Only the network is replaced: what a builder would download is the folder or file that the official archive unpacks to.
"""

import csv
import gzip
import hashlib
import itertools
import json
import logging

import numpy as np
import pytest
import seqio
import tensorflow_datasets as tfds

from tasks import data_sources, glue, super_glue

pytest.importorskip("importlib_resources", reason="TFDS's builders use it without asking for it")

ROWS = 50  # of each real file, in the fast tests
LENGTHS = {"inputs": 256, "targets": 64}


def read_tsv(path, rows=None):
    with path.open(encoding="utf-8-sig") as file:
        return list(itertools.islice(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), rows))


def write_tsv(path, rows, bom=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join("\t".join(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")


def without_labels(rows, *labels):
    keep = [k for k, name in enumerate(rows[0]) if name not in labels]
    return [[row[k] for k in keep] for row in rows]


def lay_out_glue(real, folder, config, rows=ROWS):
    """The official layout of one task of GLUE: the real rows, and the splits that are not at hand made of others."""
    name = config.folder
    if name == "AX":
        train = read_tsv(real / "MNLI/train.tsv", rows)
        write_tsv(folder / "AX/AX.tsv", without_labels(train, "gold_label", "label1"))
        return
    train = read_tsv(real / name / "train.tsv", rows)
    dev = read_tsv(real / name / "dev.tsv", rows) if (real / name / "dev.tsv").exists() else train
    for split, file in config.files.items():
        if split == "train":
            write_tsv(folder / name / file, train, bom=name == "MRPC")
        elif split.startswith("validation"):
            write_tsv(folder / name / file, dev, bom=name == "MRPC")
        elif name == "CoLA":
            write_tsv(folder / name / file, [["index", "sentence"], *([str(i), row[3]] for i, row in enumerate(dev))])
        else:
            write_tsv(folder / name / file, without_labels(dev, config.label_column, "label1"))
    if name == "MRPC":  # TFDS makes its splits of Microsoft's files; here dev's rows stand between those of train
        header, *train_rows = train
        mixed = [row for pair in itertools.zip_longest(train_rows[1:], dev[1:]) for row in pair if row]
        write_tsv(folder / name / "msr_paraphrase_train.txt", [header, train_rows[0], *mixed], bom=True)
        write_tsv(folder / name / "msr_paraphrase_test.txt", dev)
        write_tsv(folder / name / "mrpc_dev_ids.tsv", [row[1:3] for row in dev[1:]])


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Runs a builder of TFDS, giving it what it asks to be downloaded, into the TFDS folder in force."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))

    def run(name, downloaded):
        for method in ("download", "download_and_extract"):
            monkeypatch.setattr(
                tfds.download.DownloadManager,
                method,
                lambda manager, urls: downloaded(urls) if callable(downloaded) else downloaded,
            )
        builder = tfds.builder(name, data_dir=str(tmp_path / "tfds"))
        builder.download_and_prepare()
        return builder

    return run


def examples(task, split, key):
    """All features of all examples of a split, by the feature that names an example; without one, in their order."""
    dataset = seqio.get_mixture_or_task(task).get_dataset(LENGTHS, split, shuffle=False, seed=0)
    rows = [{k: plain(v) for k, v in row.items()} for row in dataset.as_numpy_iterator()]
    return {row[key]: row for row in rows} if key else rows


def plain(value):
    """A value with its type, to be compared."""
    return (value.dtype.str, value.tolist()) if isinstance(value, np.ndarray | np.generic) else value


def read_both(task, split, key, tmp_path, monkeypatch):
    """A split read from the files and from TFDS; that it is so is asked of the source."""
    source = seqio.TaskRegistry.get(task).source
    assert isinstance(source, data_sources.CorpusSource)
    monkeypatch.setenv("T5X_LITE_DATA_DIR", str(tmp_path / "files"))
    assert source.describe().startswith("the files in")
    splits, from_files = set(source.splits), examples(task, split, key)
    monkeypatch.delenv("T5X_LITE_DATA_DIR")
    assert source.describe() == f"TFDS {source._tfds_name} in {tmp_path / 'tfds'}"
    assert set(source.splits) == splits
    return from_files, examples(task, split, key)


def glue_downloads(folder, config):
    """What TFDS's builder gets: the unpacked folder; for MRPC three files, for AX one."""
    if config.name == "ax":
        return str(folder / "AX/AX.tsv")
    if config.name == "mrpc":
        files = {"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt", "dev_ids": "mrpc_dev_ids.tsv"}
        return {key: str(folder / "MRPC" / file) for key, file in files.items()}
    return str(folder)


def compare_glue(config, rows, data_dir, tmp_path, monkeypatch, prepare):
    folder = tmp_path / "files/glue"
    lay_out_glue(data_dir / "glue", folder, config, rows)
    builder = prepare(f"glue/{config.name}:2.0.0", glue_downloads(folder, config))
    assert set(builder.info.splits) == set(config.files)
    for split in config.files:
        from_files, from_tfds = read_both(f"glue_{config.name}_v002", split, "idx", tmp_path, monkeypatch)
        assert len(from_files) >= ROWS - 1
        assert from_files == from_tfds


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=config.name, marks=[pytest.mark.slow] if config.name != "stsb" else [])
        for config in glue.CONFIGS
    ],
)
def test_glue(config, data_dir, tmp_path, monkeypatch, prepare, bytes_vocabulary):
    compare_glue(config, ROWS, data_dir, tmp_path, monkeypatch, prepare)


@pytest.mark.exhaustive
@pytest.mark.parametrize("config", glue.CONFIGS, ids=lambda config: config.name)
def test_glue_whole(config, data_dir, tmp_path, monkeypatch, prepare, bytes_vocabulary):
    compare_glue(config, None, data_dir, tmp_path, monkeypatch, prepare)


def lay_out_squad(real, folder, articles):
    """The official files, cut to so many articles of two paragraphs each."""
    folder.mkdir(parents=True)
    for file in ("train-v1.1.json", "dev-v1.1.json"):
        content = json.loads((real / file).read_text(encoding="utf-8"))
        if articles is not None:
            content["data"] = content["data"][:articles]
            for article in content["data"]:
                article["paragraphs"] = article["paragraphs"][:2]
        (folder / file).write_text(json.dumps(content), encoding="utf-8")


SQUAD_TASKS = [name for name in seqio.TaskRegistry.names() if name.startswith("squad_v")]


@pytest.mark.parametrize("articles", [2, pytest.param(None, marks=pytest.mark.exhaustive)])
@pytest.mark.slow
def test_squad(articles, data_dir, tmp_path, monkeypatch, prepare, bytes_vocabulary):
    folder = tmp_path / "files/squad"
    lay_out_squad(data_dir / "squad", folder, articles)
    files = {"train": str(folder / "train-v1.1.json"), "dev": str(folder / "dev-v1.1.json")}
    builder = prepare("squad/v1.1:3.0.0", files)
    assert set(builder.info.splits) == {"train", "validation"}
    for task, split in itertools.product(SQUAD_TASKS, builder.info.splits):
        from_files, from_tfds = read_both(task, split, "id", tmp_path, monkeypatch)
        assert len(from_files) > 10
        assert from_files == from_tfds


STORIES = {
    "train": [("cnn", '(CNN) Rain fell, in Köln.\n\nIt "stopped" later', "Rain fell\n\n@highlight\n\nIt stopped .")],
    "validation": [("dm", "A cat sat, and sat!", "A cat sat"), ("cnn", "Another one", "Another")],
    "test": [("dm", "The last", "The end")],
}


def test_cnn_dailymail(tmp_path, monkeypatch, prepare, bytes_vocabulary):
    """TFDS's builder reads stories and lists of their addresses; the official CSV holds what comes of them."""
    folders = {"cnn": "cnn/stories", "dm": "dailymail/stories"}
    (tmp_path / "files/cnn_dailymail").mkdir(parents=True)
    downloaded = {"cnn_stories": str(tmp_path), "dm_stories": str(tmp_path)}
    for split, stories in STORIES.items():
        rows, urls = [], []
        for number, (publisher, article, highlights) in enumerate(stories):
            url = f"http://{split}/{number}"
            name = hashlib.sha1(url.encode()).hexdigest()
            path = tmp_path / folders[publisher] / f"{name}.story"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{article}\n\n@highlight\n\n{highlights}\n", encoding="utf-8")
            urls.append(url + "\n")
            lines = [text.split("\n\n") for text in (article, highlights.replace("\n\n@highlight", ""))]
            ended = [[line if line[-1] in ".!" else line + "." for line in text] for text in lines]
            rows.append([name, " ".join(ended[0]), "\n".join(ended[1])])
        list_name = {"validation": "val"}.get(split, split) + "_urls"
        (tmp_path / list_name).write_text("".join(urls))
        downloaded[list_name] = str(tmp_path / list_name)
        with (tmp_path / f"files/cnn_dailymail/{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "article", "highlights"], *rows])
    builder = prepare("cnn_dailymail:3.4.0", downloaded)
    for split in builder.info.splits:
        from_files, from_tfds = read_both("cnn_dailymail_v002", split, "inputs_pretokenized", tmp_path, monkeypatch)
        assert len(from_files) == len(STORIES[split])
        assert from_files == from_tfds
        if split == "train":
            assert list(from_files) == ['summarize: (CNN) Rain fell, in Köln. It "stopped" later.'.encode()]
            assert [row["targets_pretokenized"] for row in from_files.values()] == [b"Rain fell.\nIt stopped ."]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def inference(first, second, labels):
    return [{first: "Ana  naps.", second: "é", "label": label, "idx": i, "more": 1} for i, label in enumerate(labels)]


TARGET = {"span1_text": "Ann.", "span1_index": 0, "span2_text": "She", "span2_index": 3}
SUPER_GLUE_ROWS = {
    "BoolQ": [{"question": "is it", "passage": "It <b>is", "idx": k, "label": bool(k)} for k in (0, 1)],
    "CB": inference("premise", "hypothesis", ("entailment", "contradiction", "neutral")),
    "COPA": [
        {"premise": "p", "choice1": "a", "choice2": "b", "question": q, "label": k, "idx": k}
        for k, q in enumerate(("cause", "effect"))
    ],
    "MultiRC": [
        {
            "idx": 4,
            "passage": {
                "text": "<b>Sent 1: </b>x<br>",
                "questions": [
                    {"question": "q", "idx": i, "answers": [{"text": "a", "idx": i + j, "label": j} for j in (0, 1)]}
                    for i in (6, 8)
                ],
            },
        }
    ],
    "ReCoRD": [
        {
            "idx": 2,
            "source": "x",
            "passage": {
                "text": "Köln is old.\n@highlight\nBonn too",
                "entities": [{"start": 0, "end": 3}, {"start": 24, "end": 27}, {"start": 0, "end": 3}],
            },
            "qas": [
                {"query": "@placeholder is", "idx": 5, "answers": [{"text": "Köln"}, {"text": "Bonn"}]},
                {"query": "is @placeholder", "idx": 6, "answers": [{"text": "Bonn"}]},
            ],
        }
    ],
    "RTE": inference("premise", "hypothesis", ("entailment", "not_entailment")),
    "WiC": [
        {"word": "w", "sentence1": "s", "sentence2": "t", "idx": k, "label": bool(k)}
        | {"start1": 0, "start2": 0, "end1": 1, "end2": 1}
        for k in (0, 1)
    ],
    "WSC": [{"text": "Ann said that she left", "target": TARGET, "label": bool(k), "idx": k} for k in (0, 1)],
    "AX-b": inference("sentence1", "sentence2", ("entailment", "not_entailment")),
    "AX-g": inference("premise", "hypothesis", ("entailment", "not_entailment")),
}  # fmt: skip
UNLABELLED = ("label", "answers")


def unlabelled(value):
    if isinstance(value, list):
        return [unlabelled(item) for item in value]
    if not isinstance(value, dict):
        return value
    texts = isinstance(value.get("answers"), list) and "question" in value  # MultiRC's answers are what is asked
    return {k: unlabelled(v) for k, v in value.items() if k not in UNLABELLED or (k == "answers" and texts)}


SUPER_GLUE = {config.folder: (config.name, f"super_glue_{config.name}_v102") for config in super_glue.CONFIGS}
SUPER_GLUE |= {
    "ReCoRD": ("record", "super_glue_record_v102"),
    "WSC": ("wsc.fixed", "super_glue_wsc_v102_simple_eval"),
}


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(folder, marks=[] if folder in ("MultiRC", "ReCoRD") else pytest.mark.slow)
        for folder in sorted(SUPER_GLUE)
    ],
)
def test_super_glue(folder, tmp_path, monkeypatch, prepare, bytes_vocabulary):
    name, task = SUPER_GLUE[folder]
    rows = SUPER_GLUE_ROWS[folder]
    files = tmp_path / "files/super_glue" / folder
    if folder.startswith("AX"):
        write_lines(files / f"{folder}.jsonl", rows)
    else:
        for split, content in (("train", rows), ("val", rows), ("test", unlabelled(rows))):
            write_lines(files / f"{split}.jsonl", content)
    builder = prepare(f"super_glue/{name}:1.0.2", str(tmp_path / "files/super_glue"))
    for split in set(builder.info.splits) & set(seqio.TaskRegistry.get(task).source._splits):
        same_examples(task, split, tmp_path, monkeypatch)


def same_examples(task, split, tmp_path, monkeypatch, size=None):
    """Compares examples in any order."""
    from_files, from_tfds = read_both(task, split, None, tmp_path, monkeypatch)
    assert len(from_files) == size if size is not None else len(from_files) >= 2
    assert sorted(str(sorted(row.items())) for row in from_files) == sorted(str(sorted(x.items())) for x in from_tfds)


@pytest.mark.slow
def test_dpr(tmp_path, monkeypatch, prepare, bytes_vocabulary):
    folder = tmp_path / "files/dpr"
    folder.mkdir(parents=True)
    records = [f"Ann told Bo {k}, that he left. \nhe\n Ann, Bo\n{'Bo' if k else 'Ann'}\n\n" for k in range(3)]
    for split, content in (("train", records), ("test", records[:2])):
        (folder / f"{split}.c.txt").write_text("".join(content))
    prepare("definite_pronoun_resolution:1.1.0", {s: str(folder / f"{s}.c.txt") for s in ("train", "test")})
    same_examples("dpr_v001_simple", "train", tmp_path, monkeypatch, 3)
    same_examples("dpr_v001_simple", "test", tmp_path, monkeypatch, 2)


@pytest.mark.slow
def test_closed_book_holds_out_what_tfds_does(tmp_path, monkeypatch, prepare, bytes_vocabulary):
    files = tmp_path / "files"
    sizes = {"train": 79_170, "dev": 5}
    for split, size in sizes.items():
        write_lines(
            files / f"nq_open/NQ-open.{split}.jsonl",
            ({"question": f"q{i}", "answer": [f"a{i}", "b"]} for i in range(size)),
        )
    prepare(
        "natural_questions_open:1.0.0",
        {
            tfds_split: str(files / f"nq_open/NQ-open.{s}.jsonl")
            for tfds_split, s in (("train", "train"), ("validation", "dev"))
        },
    )
    same_examples("natural_questions_open", "validation", tmp_path, monkeypatch, 2)
    same_examples("natural_questions_open", "test", tmp_path, monkeypatch, 5)
    rows = [
        {"url": "u", "utterance": f"who {i}", "targetValue": f'(list (description "Köln {i}") (description Bonn))'}
        for i in range(3_420)
    ]
    (files / "web_questions").mkdir()
    for split, content in (("train", rows), ("test", rows[:4])):
        (files / f"web_questions/webquestions.examples.{split}.json").write_text(json.dumps(content))
    prepare(
        "web_questions:1.0.0",
        {s: str(files / f"web_questions/webquestions.examples.{s}.json") for s in ("train", "test")},
    )
    same_examples("web_questions_open", "validation", tmp_path, monkeypatch, 3)
    same_examples("web_questions_open_test", "validation", tmp_path, monkeypatch, 4)


def trivia(number, evidence):
    names = [f"{number % 2}.txt", "missing.txt"]
    return {
        "Answer": {
            "Aliases": [f"The Köln {number} ", "Bonn"],
            "NormalizedAliases": [f"köln {number}", "bonn"],
            "NormalizedValue": "x",
            "Type": "WikipediaEntity",
            "Value": f" Köln {number}",
        },
        "EntityPages": [{"DocSource": "Search", "Filename": name, "Title": "t"} for name in names] * evidence,
        "Question": f" Which town, {number}? ",
        "QuestionId": f"id_{number}",
        "QuestionSource": "s",
        "SearchResults": [
            {"Description": "d", "Filename": "0.txt", "Rank": 1, "Title": "t", "Url": "u"},
            {"Description": "no file", "Rank": 2, "Title": "t", "Url": "u"},
        ]
        * evidence,
    }


@pytest.mark.parametrize(
    "kind", [pytest.param("rc", marks=pytest.mark.slow), pytest.param("unfiltered", marks=pytest.mark.exhaustive)]
)
def test_trivia_qa(kind, tmp_path, monkeypatch, prepare, bytes_vocabulary):
    root = tmp_path / "files/trivia_qa"
    questions = root / {"rc": "qa", "unfiltered": "triviaqa-unfiltered"}[kind]
    for folder, text in (("wikipedia", "\nIn Köln 1, or Bonn!\n"), ("web", "BONN; köln 0")):
        (root / "evidence" / folder).mkdir(parents=True)
        for number in range(2):
            (root / f"evidence/{folder}/{number}.txt").write_text(f"{text} {number}", encoding="utf-8")
    questions.mkdir()
    size = {"rc": 4, "unfiltered": 78_788}[kind]
    for split, count in (("train", size), ("dev", 3), ("test-without-answers", 2)):
        rows = [trivia(number, kind == "rc") for number in range(count)]
        for row in rows if split.startswith("test") else []:
            del row["Answer"]
        # TFDS reads the official files' indentation.
        (questions / f"unfiltered-web-{split}.json").write_text(json.dumps({"Data": rows}, indent=4))
    name = {"rc": "rc", "unfiltered": "unfiltered.nocontext"}[kind]
    prepare(f"trivia_qa/{name}:1.1.0", {key: str(root) for key in ("rc", "unfiltered")})
    if kind == "rc":
        for split in ("train", "validation"):
            same_examples("trivia_qa_v010", split, tmp_path, monkeypatch)
    else:
        same_examples("trivia_qa_open", "validation", tmp_path, monkeypatch, 3)
        same_examples("trivia_qa_open", "test", tmp_path, monkeypatch, 3)
        same_examples("trivia_qa_open_test", "test", tmp_path, monkeypatch, 2)


def test_wmt(tmp_path, monkeypatch, prepare, bytes_vocabulary):
    """TFDS finds WMT's downloads at their own places; here each lies under its own name in its split's folder."""
    train, test = tmp_path / "files/wmt_t2t_de-en/train", tmp_path / "files/wmt_t2t_de-en/test"
    places = {
        "training/europarl-v7.de-en": train / "europarl-v7.de-en",
        "commoncrawl.de-en": train / "commoncrawl.de-en",
        "training-parallel-nc-v13/news-commentary-v13.de-en": train / "news-commentary-v13.de-en",
        "dev/newstest2013": tmp_path / "files/wmt_t2t_de-en/validation",
    }
    sides = {"de": b"Stra\xc3\x9fe\n\nein\rs\r\nzwei\nletzte\n", "en": b"street\nempty\none\n\nlast\n"}
    test.mkdir(parents=True)
    train.mkdir()
    for place, copy in places.items():
        for language, content in sides.items():
            for path in (tmp_path / "down" / f"{place}.{language}", copy.parent / f"{copy.name}.{language}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    for name in ("newstest2014-deen-src.de.sgm", "newstest2014-deen-ref.en.sgm"):
        content = f'<doc>\n<seg id="1">a &amp; {name}</seg>\n<p>\n<seg id="2">b</seg>\n</doc>\n'
        for path in (tmp_path / "down/dev" / name, test / name):
            path.write_text(content)
    root = str(tmp_path / "down")

    def downloaded(urls):
        if isinstance(urls, dict):
            return {key: downloaded(value) for key, value in urls.items()}
        return [root for _ in urls] if isinstance(urls, list | tuple) else root

    prepare("wmt_t2t_translate/de-en:1.0.0", downloaded)
    for split, size in (("train", 9), ("validation", 3), ("test", 2)):
        same_examples("wmt_t2t_ende_v003", split, tmp_path, monkeypatch, size)


@pytest.mark.slow
def test_c4(data_dir, tmp_path, monkeypatch, bytes_vocabulary):
    """TFDS makes C4 on Beam from Common Crawl; here its examples are those of the official files, in TFDS's form."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    names = ["content-length", "content-type", "text", "timestamp", "url"]
    splits = {}
    for split in ("train", "validation"):
        (real,) = (data_dir / "c4").glob(f"c4-{split}.*")
        lines = gzip.decompress(real.read_bytes()).splitlines(keepends=True)[:ROWS]
        (tmp_path / "files/c4").mkdir(parents=True, exist_ok=True)
        (tmp_path / "files/c4" / real.name).write_bytes(gzip.compress(b"".join(lines)))
        splits[split] = [(i, dict.fromkeys(names, "") | json.loads(line)) for i, line in enumerate(lines)]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="c4",
        config="en",
        version="2.2.0",
        features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in names}),
        split_datasets=splits,
        data_dir=str(tmp_path / "tfds"),
        disable_shuffling=True,  # the noise goes by an example's place
    )
    for split in splits:
        from_files, from_tfds = read_both("c4_v220_span_corruption", split, None, tmp_path, monkeypatch)
        assert len(from_files) > 1
        assert from_files == from_tfds


def test_the_log_says_which_is_read_and_the_error_what_to_do(tmp_path, monkeypatch, caplog, bytes_vocabulary):
    caplog.set_level(logging.INFO, "absl")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("T5X_LITE_DATA_DIR", str(tmp_path))
    (tmp_path / "glue/RTE").mkdir(parents=True)
    (tmp_path / "glue/RTE/train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    task = seqio.TaskRegistry.get("glue_rte_v002")
    assert len(list(task.get_dataset(LENGTHS, "train", shuffle=False))) == 1
    assert f"glue/rte: reading the files in {tmp_path}/glue/RTE (train)" in caplog.text

    def no_network(manager, urls):
        raise OSError("no route to host")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", no_network)
    monkeypatch.delenv("T5X_LITE_DATA_DIR")
    says = r"TFDS could not read glue/rte:2\.0\.0: no route to host.*TFDS_DATA_DIR.*T5X_LITE_DATA_DIR/glue/RTE/ \(train"
    with pytest.raises(FileNotFoundError, match=says):
        task.get_dataset(LENGTHS, "train", shuffle=False)
    assert f"glue/rte: reading TFDS glue/rte:2.0.0 in {tmp_path / 'tfds'}" in caplog.text
