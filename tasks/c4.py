"""C4, T5's unlabelled text: `c4_v220_span_corruption`, and t5's name for it in multi-task mixtures.

Reads c4/c4-{train,validation}.*.json.gz (one JSON object a line: text, timestamp, url), or TFDS c4/en:2.2.0, the
version in the tasks' name. Must not know: other corpora, mixtures.
"""

import seqio

from tasks import formats, preprocessors, sources, vocabulary

# In t5, gin gives `c4_v020_unsupervised` its objective; here it has the one T5 was finally trained with.
NAMES = ("c4_v220_span_corruption", "c4_v020_unsupervised")


def _document(path: str, number: int, line: str) -> tuple[str, str, str]:
    document = formats.json_object(path, number, line)
    formats.check_columns(path, number, ["text"], list(document))
    return document["text"], document.get("timestamp", ""), document.get("url", "")


def _read_files(files: dict[str, list[str]]) -> seqio.DataSource:
    return sources.LinesSource(files, _document, ("text", "timestamp", "url"))


source = sources.CorpusSource(
    folder="c4",
    files={"train": "c4-train.*.json.gz", "validation": "c4-validation.*.json.gz"},
    build=_read_files,
    tfds_name="c4/en:2.2.0",
    tfds_splits=("train", "validation"),
)


@seqio.map_over_dataset
def _text_as_targets(x: preprocessors.Example) -> preprocessors.Example:
    return {"inputs": "", "targets": x["text"]}


for _name in NAMES:
    seqio.TaskRegistry.add(
        _name,
        source=source,  # pyright: ignore[reportArgumentType]  SeqIO says int where its own sources give None
        preprocessors=[
            _text_as_targets,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            preprocessors.span_corruption,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=vocabulary.output_features(),
        metric_fns=[],
        task_cls=sources.CorpusTask,
    )
