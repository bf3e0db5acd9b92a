"""C4 tasks for every objective of `tasks.objectives`, such as `c4_v220_span_corruption`, and its other versions.

Reads c4/c4-{train,validation}.*.json.gz (JSON Lines with text, timestamp, url), or TFDS c4/en:2.2.0, the version in the
tasks' names. The unfiltered, news-like and web-text-like versions are in c4/en.noclean/, c4/realnewslike/ and
c4/webtextlike/. Must not import: other corpora, mixtures.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import seqio

from tasks import data_sources, objectives, prefix_lm, readers, ul2, vocabulary

_FEATURES = ("text", "timestamp", "url")


def _documents(path: str, position: int) -> Iterator[tuple[int, tuple[str, str, str]]]:
    skipped = readers.Skipped(path)
    for number, line in readers.lines(path, skipped, position):
        with skipped:
            yield number, _document(path, number, line)


def _document(path: str, number: int, line: str) -> tuple[str, str, str]:
    document = readers.json_object(path, number, line)
    readers.check_columns(path, number, ["text"], list(document))
    values = (document["text"], document.get("timestamp") or "", document.get("url") or "")
    text, timestamp, url = (readers.as_text(f"{path}:{number}", k, x) for k, x in zip(_FEATURES, values, strict=True))
    return text, timestamp, url


def _read_files(files: dict[str, list[str]]) -> seqio.DataSource:
    return data_sources.RowsSource(files, _documents, _FEATURES)


def documents(
    folder: str, files: Mapping[str, str], tfds_name: str, tfds_splits: Mapping[str, str] | None = None
) -> data_sources.CorpusSource:
    """Return a source of JSON Lines with `text`, or of a corpus of TFDS with that feature."""
    return data_sources.CorpusSource(folder, files, _read_files, tfds_name, tfds_splits or tuple(files))


_FILES = {"train": "c4-train.*.json.gz", "validation": "c4-validation.*.json.gz"}
source = documents("c4", _FILES, "c4/en:2.2.0")


def add(name: str, objective: Callable, corpus: data_sources.CorpusSource = source) -> seqio.Task:
    """Register C4 with an objective: `add("c4_mine", functools.partial(objectives.span_corruption, ...))`."""
    full_lm = objective is objectives.full_lm
    features = vocabulary.output_features()
    return add_documents(
        name,
        [objective] if full_lm else [objective, objectives.append_eos_after_trim],
        {"targets": features["targets"]} if full_lm else features,
        corpus,
    )


def add_documents(
    name: str,
    objective: Sequence[Callable],
    features: Mapping[str, seqio.utils.Feature],
    corpus: data_sources.CorpusSource = source,
) -> seqio.Task:
    """Register a corpus of documents with the steps that make `features` of their tokens, the `targets`."""
    return seqio.TaskRegistry.add(
        name,
        source=corpus,  # pyright: ignore[reportArgumentType]  SeqIO declares int, but its own sources return None
        preprocessors=[
            objectives.text_as_targets,
            objectives.tokenize,
            seqio.CacheDatasetPlaceholder(),
            *objective,
        ],
        output_features=features,
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
    "c4_v220_ul2": ul2.ul2,
    "c4_v220_ul2r": functools.partial(ul2.ul2, denoisers=ul2.UL2R),
    "c4_v220_lm": objectives.lm,
    "c4_v220_full_lm": objectives.full_lm,
    # In t5 gin sets its objective; here it has that of the final T5.
    "c4_v020_unsupervised": objectives.span_corruption,
}

for _name, _objective in OBJECTIVES.items():
    add(_name, _objective)

# Other cuts of Common Crawl, in the folders that Hugging Face's copy has.
for _name, _folder in (("noclean", "en.noclean"), ("realnewslike", "realnewslike"), ("webtextlike", "webtextlike")):
    add(
        f"c4_{_name}_v020_unsupervised",
        objectives.span_corruption,
        documents(f"c4/{_folder}", _FILES, f"c4/en.{_name}:2.2.0"),
    )

# Sequences of the model itself, and not of text to text: each step of the architecture is written out.
for _name, _pack, _features in (
    ("encoder_decoder", prefix_lm.pack_encoder_decoder, prefix_lm.ENCODER_DECODER),
    ("decoder", prefix_lm.pack_decoder_only, prefix_lm.DECODER),
):
    add_documents(
        f"c4_prefix_lm_objective_{_name}_architecture",
        [prefix_lm.full_targets, _pack],
        {
            **{name: seqio.Feature(vocabulary=vocabulary.SHARED, add_eos=False) for name in _features},
            "targets": seqio.Feature(vocabulary=vocabulary.SHARED, required=False),  # until they are packed
        },
    )
