"""SuperGLUE as text-to-text tasks under T5's names (`super_glue_boolq_v102`, ...), each also with a sentinel.

Reads the official super_glue/<Task>/{train,val,test}.jsonl, or TFDS super_glue:1.0.2. Examples have TFDS's features as
far as the text needs them. WSC is a task of `tasks.winograd`, in T5's own form. Must not import: mixtures, models.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tasks import data_sources, metrics, preprocessors, readers, sentinels, text_to_text

JSONL = {"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"}
_BOOLEAN = ("False", "True")
_NLI = ("entailment", "not_entailment")
_AFTER_HIGHLIGHT = (
    (r"(\.|\?|\!|\"|\')\n@highlight\n", r"\1 "),  # a sentence that has its end
    (r"\n@highlight\n", ". "),
)


@dataclasses.dataclass(frozen=True)
class SuperGlue:
    """One SuperGLUE task with a label.

    Args:
      name: name in TFDS and in the task's name.
      folder: folder in the official release.
      text: text features, in the order of the inputs.
      metric_fns: t5's metrics.
      labels: label words in the order of their ids.
      files: split -> file name.
      prefix: first word of the inputs; default: `name`.
      renamed: feature in the files and TFDS -> name in the inputs.
    """

    name: str
    folder: str
    text: tuple[str, ...]
    metric_fns: Sequence[Callable]
    labels: tuple[str, ...] = _BOOLEAN
    files: Mapping[str, str] = dataclasses.field(default_factory=lambda: JSONL)
    prefix: str = ""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


_ACCURACY = (metrics.accuracy,)
_MULTIRC = (metrics.multirc_f1_over_all_answers, metrics.mean_group_metric(metrics.all_match))

CONFIGS = (
    SuperGlue("boolq", "BoolQ", ("passage", "question"), _ACCURACY),
    SuperGlue(
        "cb", "CB", ("hypothesis", "premise"), (metrics.mean_3class_f1, metrics.accuracy),
        ("entailment", "contradiction", "neutral"),
    ),
    SuperGlue("copa", "COPA", ("choice1", "choice2", "premise", "question"), _ACCURACY, ("choice1", "choice2")),
    SuperGlue("multirc", "MultiRC", ("question", "answer", "paragraph"), _MULTIRC),
    SuperGlue("rte", "RTE", ("hypothesis", "premise"), _ACCURACY, _NLI),
    SuperGlue("wic", "WiC", ("sentence1", "sentence2", "word"), _ACCURACY),  # not the places of the word
    # The diagnostic sets are put like RTE.
    SuperGlue(
        "axb", "AX-b", ("hypothesis", "premise"), (), _NLI, {"test": "AX-b.jsonl"}, "rte",
        {"sentence1": "premise", "sentence2": "hypothesis"},
    ),
    SuperGlue("axg", "AX-g", ("hypothesis", "premise"), (), _NLI, {"test": "AX-g.jsonl"}, "rte"),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- files


def read(paths: list[str], split: str, config: SuperGlue) -> data_sources.Columns:
    """Return the examples of a split, with TFDS's features: the text, `label` (-1 in test sets without) and `idx`.

    MultiRC has an example for each answer. Raises BadRow for a row without a feature or with an unknown label.
    """
    rows = _multirc_rows if config.name == "multirc" else functools.partial(_rows, config=config)
    names = {old: new for new, old in config.renamed.items()}
    features = {feature: names.get(feature, feature) for feature in config.text}
    examples = []
    for path in paths:
        skipped = readers.Skipped(path)
        for where, row in readers.json_lines(path, skipped):
            with skipped:
                for example in rows(where, row):
                    text = {feature: readers.field(where, example, feature) for feature in features.values()}
                    label = label_id(where, example, split, config.labels)
                    examples.append((text, label, example["idx"]))
    columns: data_sources.Columns = {
        feature: data_sources.texts_column([text[feature] for text, _, _ in examples]) for feature in features.values()
    }
    idx = [idx for _, _, idx in examples]
    if config.name == "multirc":
        parts = ("paragraph", "question", "answer")
        columns["idx"] = {part: np.array([numbers[part] for numbers in idx], np.int32) for part in parts}
    else:
        columns["idx"] = np.array(idx, np.int32)
    return columns | {"label": np.array([label for _, label, _ in examples], np.int64)}


def label_id(where: str, row: Mapping[str, Any], split: str, labels: tuple[str, ...]) -> int:
    """Return the id of the row's `label`: a word, a Boolean, 0 or 1; -1 if a test set has none."""
    if "label" not in row:
        if split == "test":
            return -1
        raise readers.BadRow(f"{where}: no label; only test sets may lack it")
    label = row["label"]
    word = str(label) if isinstance(label, bool) else readers.as_text(where, "label", label)
    if word in labels:
        return labels.index(word)
    if word in ("0", "1") and len(labels) == 2:  # MultiRC's and COPA's
        return int(word)
    raise readers.BadRow(f"{where}: unknown label {word!r}; there are {', '.join(labels)}")


def _rows(where: str, row: dict, config: SuperGlue) -> Iterator[dict]:
    yield row | {"idx": readers.field(where, row, "idx", int)}


def _multirc_rows(where: str, row: dict) -> Iterator[dict]:
    passage = readers.field(where, row, "passage", dict)
    for question in readers.field(where, passage, "questions", list):
        for answer in readers.field(where, question, "answers", list):
            numbers = {"paragraph": row, "question": question, "answer": answer}
            example = {
                "paragraph": readers.field(where, passage, "text"),
                "question": readers.field(where, question, "question"),
                "answer": readers.field(where, answer, "text"),
                "idx": {name: readers.field(where, part, "idx", int) for name, part in numbers.items()},
            }
            yield example | ({"label": answer["label"]} if answer.get("label") is not None else {})


def read_record(paths: list[str], split: str) -> data_sources.Columns:
    """Return ReCoRD's questions: passage, query, the different entities and answers in order, and `idx`."""
    examples = []
    for path in paths:
        skipped = readers.Skipped(path)
        for where, row in readers.json_lines(path, skipped):
            with skipped:
                examples.extend(_record_rows(where, row, split))
    values = {name: [example[name] for example in examples] for name in _RECORD}
    texts = {name: data_sources.texts_column(values[name]) for name in ("passage", "query")}
    lists = {name: data_sources.lists_column(values[name]) for name in ("entities", "answers")}
    idx = {name: np.array(values[f"idx/{name}"], np.int32) for name in ("passage", "query")}
    return {**texts, **lists, "idx": idx}


_RECORD = ("passage", "query", "entities", "answers", "idx/passage", "idx/query")


def _record_rows(where: str, row: dict, split: str) -> list[dict]:
    passage = readers.field(where, row, "passage", dict)
    text = readers.field(where, passage, "text")
    spans = [
        (readers.field(where, entity, "start", int), readers.field(where, entity, "end", int))
        for entity in readers.field(where, passage, "entities", list)
    ]
    if any(not 0 <= start <= end < len(text) for start, end in spans):
        raise readers.BadRow(f"{where}: an entity that is not in the passage of {len(text)} characters")
    entities = sorted({text[start : end + 1] for start, end in spans})
    examples = []
    for question in readers.field(where, row, "qas", list):
        query = readers.field(where, question, "query")
        if "answers" not in question and split != "test":
            raise readers.BadRow(f"{where}: a question without answers; only test sets may lack them")
        answers = readers.field(where, question, "answers", list) if "answers" in question else []
        examples.append(
            {
                "passage": text,
                "query": query,
                "entities": entities,
                "answers": sorted({readers.field(where, answer, "text") for answer in answers}),
                "idx/passage": readers.field(where, row, "idx", int),
                "idx/query": readers.field(where, question, "idx", int),
            }
        )
    return examples


# ---------------------------------------------------------------------------------------------------------------- text


def multirc(dataset: tf.data.Dataset, text_features: Sequence[str], labels: Sequence[str]) -> tf.data.Dataset:
    """Make MultiRC's inputs, without HTML's marks, and targets "False" or "True"; the parts of `idx` are features."""

    def clean(x: preprocessors.Example) -> preprocessors.Example:
        inputs = tf.strings.regex_replace(tf.strings.regex_replace(x["inputs"], "<br>", " "), "</?b>", "")
        idx = {f"idx/{name}": number for name, number in x["idx"].items()}
        return {**idx, "inputs": inputs, "targets": x["targets"]}

    return preprocessors.glue(dataset, "multirc", text_features, labels).map(clean, tf.data.AUTOTUNE)


def record(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Make an example for each answer of a ReCoRD question, or one with the target "<unk>" if it has none.

    Each keeps all `answers` and the question's number, so that evaluation can take the question once.
    """

    def to_text(x: preprocessors.Example) -> preprocessors.Example:
        passage = x["passage"]
        for pattern, rewrite in _AFTER_HIGHLIGHT:
            passage = tf.strings.regex_replace(passage, pattern, rewrite)
        entities = tf.strings.reduce_join(x["entities"], separator=", ")
        pieces = ["record query:", x["query"], "entities:", entities, "passage:", passage]
        idx = {f"idx/{name}": number for name, number in x["idx"].items()}
        return {**idx, "inputs": tf.strings.join(pieces, " "), "answers": x["answers"]}

    def one_for_each_answer(x: preprocessors.Example) -> tf.data.Dataset:
        targets = tf.cond(tf.size(x["answers"]) > 0, lambda: x["answers"], lambda: tf.constant(["<unk>"]))
        return tf.data.Dataset.from_tensor_slices(targets).map(lambda target: {**x, "targets": target})

    return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE).flat_map(one_for_each_answer)


def _rename(dataset: tf.data.Dataset, names: Mapping[str, str]) -> tf.data.Dataset:
    return dataset.map(lambda x: {names.get(name, name): value for name, value in x.items()})


# --------------------------------------------------------------------------------------------------------------- tasks


def source(
    folder: str, tfds_name: str, read: Callable[[list[str], str], data_sources.Columns], files: Mapping[str, str]
) -> data_sources.CorpusSource:
    """Return the source of a corpus of SuperGLUE's release."""
    return data_sources.CorpusSource(
        folder=f"super_glue/{folder}",
        files=files,
        build=functools.partial(data_sources.MemorySource, read=read),
        tfds_name=f"super_glue/{tfds_name}:1.0.2",
        tfds_splits=tuple(files),
    )


def _text_preprocessors(config: SuperGlue) -> list[Callable]:
    settings = {"text_features": config.text, "labels": config.labels}
    if config.name == "multirc":
        return [functools.partial(multirc, **settings)]
    rename = [functools.partial(_rename, names=config.renamed)] if config.renamed else []
    return [*rename, functools.partial(preprocessors.glue, prefix=config.prefix or config.name, **settings)]


for _config in CONFIGS:
    sentinels.add_twin(
        text_to_text.add(
            f"super_glue_{_config.name}_v102",
            source(_config.folder, _config.name, functools.partial(read, config=_config), _config.files),
            _text_preprocessors(_config),
            _config.metric_fns,
            metrics.multirc
            if _config.name == "multirc"
            else functools.partial(metrics.string_to_class, labels=_config.labels),
        )
    )
sentinels.add_twin(
    text_to_text.add(
        "super_glue_record_v102",
        source("ReCoRD", "record", read_record, JSONL),
        [record],
        [metrics.deduplicate_metric(metrics.squad)],
        metrics.record,
    )
)
