"""C4 tasks for every objective of `tasks.objectives`, such as `c4_v220_span_corruption`.

Reads c4/c4-{train,validation}.*.json.gz (JSON Lines with text, timestamp, url), or TFDS c4/en:2.2.0, the version in the
tasks' names. Must not import: other corpora, mixtures.
"""

import functools
from collections.abc import Callable

import seqio

from tasks import data_sources, objectives, readers, vocabulary

_FEATURES = ("text", "timestamp", "url")


def _document(path: str, number: int, line: str) -> tuple[str, str, str]:
    document = readers.json_object(path, number, line)
    readers.check_columns(path, number, ["text"], list(document))
    values = (document["text"], document.get("timestamp") or "", document.get("url") or "")
    text, timestamp, url = (readers.as_text(f"{path}:{number}", k, x) for k, x in zip(_FEATURES, values, strict=True))
    return text, timestamp, url


def _read_files(files: dict[str, list[str]]) -> seqio.DataSource:
    return data_sources.LinesSource(files, _document, _FEATURES)


source = data_sources.CorpusSource(
    folder="c4",
    files={"train": "c4-train.*.json.gz", "validation": "c4-validation.*.json.gz"},
    build=_read_files,
    tfds_name="c4/en:2.2.0",
    tfds_splits=("train", "validation"),
)


def add(name: str, objective: Callable) -> seqio.Task:
    """Register C4 with an objective: `add("c4_mine", functools.partial(objectives.span_corruption, ...))`."""
    append_eos = [] if objective is objectives.full_lm else [objectives.append_eos_after_trim]
    return seqio.TaskRegistry.add(
        name,
        source=source,  # pyright: ignore[reportArgumentType]  SeqIO declares int, but its own sources return None
        preprocessors=[
            objectives.text_as_targets,
            objectives.tokenize,
            seqio.CacheDatasetPlaceholder(),
            objective,
            *append_eos,
        ],
        output_features=vocabulary.output_features(),
        metric_fns=[],
        task_cls=data_sources.CorpusTask,
    )


# The span lengths and noise densities of the T5 paper (tables 5 to 7), named as in t5's gin files. Lengths 512 and 114
# are for span_3_15; the error message of the objective gives the targets' length of the others.
OBJECTIVES = {
    "c4_v220_span_corruption": objectives.span_corruption,
    **{
        f"c4_v220_span_{span}_{round(100 * density)}": functools.partial(
            objectives.span_corruption, mean_noise_span_length=float(span), noise_density=density
        )
        for span, density in ((2, 0.15), (5, 0.15), (10, 0.15))
    },
    "c4_v220_iid_denoising": objectives.iid_denoising,
    **{
        f"c4_v220_iid_{round(100 * density)}": functools.partial(objectives.iid_denoising, noise_density=density)
        for density in (0.10, 0.25, 0.50)
    },
    "c4_v220_iid_drop_tokens": objectives.iid_drop_tokens,
    "c4_v220_bert_style_denoising": objectives.bert_style_denoising,
    "c4_v220_mass_style_denoising": objectives.mass_style_denoising,
    "c4_v220_deshuffling": objectives.deshuffling,
    "c4_v220_prefix_lm": objectives.prefix_lm,
    "c4_v220_lm": objectives.lm,
    "c4_v220_full_lm": objectives.full_lm,
    # In t5 gin sets its objective; here it has that of the final T5.
    "c4_v020_unsupervised": objectives.span_corruption,
}

for _name, _objective in OBJECTIVES.items():
    add(_name, _objective)
