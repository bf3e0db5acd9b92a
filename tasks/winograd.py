"""Winograd schemas in T5's own form, `wsc: ... *it* ...` -> the noun: DPR, SuperGLUE's WSC, and GLUE's WNLI.

  dpr_v001_simple                       the noun that the pronoun means (Rahman and Ng 2012)
  super_glue_wsc_v102_simple_train      the same from WSC's true examples
  super_glue_wsc_v102_simple_eval       WSC's candidate, right or not; a prediction is compared with it
  glue_wnli_v002_simple_eval            WNLI turned into WSC, only to evaluate

Reads dpr/{train,test}.c.txt, super_glue/WSC/{train,val,test}.jsonl and glue/WNLI/{dev,test}.tsv, or TFDS
definite_pronoun_resolution:1.1.0, super_glue/wsc.fixed:1.0.2 and glue/wnli:2.0.0. Must not import: mixtures, models.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from tasks import data_sources, glue, metrics, preprocessors, readers, sentinels, super_glue, text_to_text
from tasks.errors import UserError

# --------------------------------------------------------------------------------------------------------------- files


def read_dpr(paths: list[str], split: str) -> data_sources.Columns:
    """Return the examples of files of five lines each: sentence, pronoun, two candidates, the right one, a blank."""
    rows = []
    for path in paths:
        skipped = readers.Skipped(path)
        lines = [text.strip() for _, text in readers.lines(path, readers.Skipped(path, "refuse"))]
        for start in range(0, len(lines), 5):
            with skipped:
                line, texts = start + 1, lines[start : start + 5]
                if not any(texts):
                    continue  # blank lines at the end
                if len(texts) < 4 or not all(texts[:4]) or any(texts[4:]):
                    problem = "expected sentence, pronoun, candidates, the right candidate and a blank line"
                    raise readers.bad_row(path, line, f"{problem}, got {texts}")
                sentence, pronoun, candidates, right = texts[:4]
                names = [candidate.strip() for candidate in candidates.split(",")]
                if len(names) != 2 or right not in names:
                    problem = f"candidates {candidates!r} and the right one {right!r}: there are two, and one is right"
                    raise readers.bad_row(path, line + 2, problem)
                rows.append((sentence, pronoun, names, names.index(right)))
        skipped.log()
    sentences, pronouns, candidates, labels = zip(*rows, strict=True) if rows else ((), (), (), ())
    return {
        "sentence": data_sources.texts_column(sentences),
        "pronoun": data_sources.texts_column(pronouns),
        "candidates": np.array([[name.encode() for name in names] for names in candidates], object).reshape(-1, 2),
        "label": np.array(labels, np.int64),
    }


def read_wsc(paths: list[str], split: str) -> data_sources.Columns:
    """Return WSC's examples with TFDS's features; spans that differ from their text are mended as in wsc.fixed."""
    columns: dict[str, list] = {
        name: [] for name in ("text", "span1_text", "span2_text", "span2_index", "label", "idx")
    }
    for path in paths:
        skipped = readers.Skipped(path)
        for where, row in readers.json_lines(path, skipped):
            with skipped:
                text, target = readers.field(where, row, "text"), readers.field(where, row, "target", dict)
                spans = [
                    (readers.field(where, target, f"{k}_text"), readers.field(where, target, f"{k}_index", int))
                    for k in ("span1", "span2")
                ]
                label = super_glue.label_id(where, row, split, ("False", "True"))
                idx = readers.field(where, row, "idx", int)
                (noun, _), (pronoun, place) = (_mended(where, text, *span) for span in spans)
                if any("theyscold" in span for span, _ in spans):
                    place = 10
                for name, value in zip(columns, (text, noun, pronoun, place, label, idx), strict=True):
                    columns[name].append(value)
    texts = {name: data_sources.texts_column(columns[name]) for name in ("text", "span1_text", "span2_text")}
    numbers = {name: np.array(columns[name], np.int32) for name in ("span2_index", "idx")}
    return {**texts, **numbers, "label": np.array(columns["label"], np.int64)}


# Nouns of two examples that do not stand together in their texts.
_SCATTERED = ("Kamenev and Zinoviev", "Kamenev, Zinoviev, and Stalin")


def _mended(where: str, text: str, span: str, place: int) -> tuple[str, int]:
    """Return a span as the text has it: other case of the first letter, no full stop, no line break."""
    if span in text or span in _SCATTERED:
        return span, place
    words = text.split()
    if not 0 <= place < len(words):
        raise readers.BadRow(f"{where}: word {place} of a text of {len(words)} words")
    first = span[0].lower() if words[place][0].islower() else span[0].upper()
    mended = f"{first}{span[1:]}".rstrip(".").replace("\n", " ")
    if mended not in text:
        raise readers.BadRow(f"{where}: {span!r} is not in the text")
    return mended, place


# ---------------------------------------------------------------------------------------------------------------- text


@seqio.map_over_dataset
def dpr(x: preprocessors.Example) -> preprocessors.Example:
    """Mark the first occurrence of the pronoun, `wsc: Bob asked Tom if *he* can ...`; the target is what it means."""
    pattern = tf.strings.join([" (", x["pronoun"], r")( |\.|,)"])
    marked = tf.strings.regex_replace(x["sentence"], pattern, r" *\1*\2", replace_global=False)
    return {"inputs": tf.strings.join(["wsc:", marked], " "), "targets": x["candidates"][x["label"]]}


def wsc(dataset: tf.data.Dataset, true_only: bool) -> tf.data.Dataset:
    """Mark the pronoun; the target is the candidate, right or not.

    Args:
      true_only: leave out examples whose candidate is not what the pronoun means.
    """

    def to_text(x: preprocessors.Example) -> preprocessors.Example:
        (inputs,) = _in_python(_wsc_inputs, [x["text"], x["span2_text"], x["span2_index"]], outputs=1)
        return {"inputs": inputs, "targets": x["span1_text"], "label": x["label"], "idx": x["idx"]}

    if true_only:
        dataset = dataset.filter(lambda x: x["label"] != 0)
    return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE)


def _in_python(function: Callable, inputs: Sequence[tf.Tensor], outputs: int) -> list[tf.Tensor]:
    """Call a Python function of texts and numbers that returns a list of texts."""

    def call(*values: bytes | np.integer) -> list[bytes]:
        texts = function(*(value.decode() if isinstance(value, bytes) else int(value) for value in values))
        return [text.encode() for text in texts]

    made = tf.numpy_function(call, inputs, [tf.string] * outputs, stateful=False)
    return [tf.ensure_shape(text, []) for text in made]


def _wsc_inputs(text: str, pronoun: str, place: int) -> list[str]:
    """Mark the pronoun, which is word `place` of the words between single spaces.

    In two examples more is needed: in one the next word is meant, in the other punctuation follows the pronoun.
    """
    words = text.split(" ")
    if not 0 < place < len(words):
        raise UserError(f"WSC: the pronoun is word {place} of {len(words)}, not within {text!r}")
    before, after = words[:place], words[place + 1 :]
    if words[place] != pronoun and after[:1] == [pronoun]:
        before, after = [*before, words[place]], after[1:]
    elif words[place] != pronoun and words[place].startswith(pronoun):
        after = " ".join([words[place].removeprefix(pronoun), *after]).rstrip().split(" ")
    elif words[place] != pronoun:
        raise UserError(f"WSC: word {place} is {words[place]!r}, not the pronoun {pronoun!r}, in {text!r}")
    return ["wsc: " + " ".join([*before, "X", " ".join(after)]).replace(" X ", f" *{pronoun}* ")]


def wnli(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Turn WNLI into WSC: mark the pronoun of the premise that the hypothesis replaces; the target is what by.

    The result is sensible for WNLI's validation and test sets, for which T5's authors have looked at it.
    """

    def to_text(x: preprocessors.Example) -> preprocessors.Example:
        inputs, targets = _in_python(_wnli_text, [x["sentence1"], x["sentence2"]], outputs=2)
        names = {"sentence1": "premise", "sentence2": "hypothesis", "label": "label", "idx": "idx"}
        return {"inputs": inputs, "targets": targets} | {new: x[old] for old, new in names.items()}

    return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE)


_PRONOUNS = frozenset(["he", "she", "they", "it", "her", "his", "their", "them", "him"])
_STOPS = (".", ",", "!", "?")


class _Match(NamedTuple):
    """How a pronoun of the premise fits the hypothesis."""

    score: int  # words around it that the hypothesis has too
    place: int
    candidate: str  # what the hypothesis has in its place


def _wnli_text(premise: str, hypothesis: str) -> list[str]:
    words, other = _clean_words(premise), _clean_words(hypothesis)
    matches = [_match(words, other, place) for place, word in enumerate(words) if word in _PRONOUNS]
    if not matches:
        raise UserError(f"WNLI: no pronoun in {premise!r}")
    best = max(matches, key=lambda match: match.score)
    raw = premise.split(" ")
    word = raw[best.place]
    raw[best.place] = f"*{word[:-1]}* {word[-1]}" if word.endswith(_STOPS) else f"*{word}*"
    return [f"wsc: {' '.join(raw)}", _as_written(best.candidate, hypothesis)]


def _clean_words(text: str) -> list[str]:
    """Return lower-case words without a stop at their end."""
    words = (re.sub(r"[.,?!]$", "", word) for word in text.strip().lower().split(" "))
    return [word for word in words if word]


def _match(premise: list[str], hypothesis: list[str], place: int) -> _Match:
    before, after = premise[:place], premise[place + 1 :]
    sizes = _common(hypothesis[::-1], before[::-1]), _common(hypothesis, after)
    left, right = before[len(before) - sizes[0] :], after[: sizes[1]]
    candidate = ""
    if any(sizes):
        # Words of both sides, or of one if the candidate is at an end of the hypothesis. As in t5 they are patterns.
        patterns = ([*left, "(.+)", *right], ["^(.+)", *right], [*left, "(.+)$"])
        text = " ".join(hypothesis)
        found = next(filter(None, (re.search(" ".join(pattern), text) for pattern in patterns)), None)
        candidate = found[1] if found else ""
    return _Match(sum(sizes), place, candidate)


def _common(hypothesis: list[str], words: list[str]) -> int:
    """Return how many of the first words stand together in the hypothesis, as letters."""
    text, size = " ".join(hypothesis), 0
    while size < len(words) and " ".join(words[: size + 1]) in text:
        size += 1
    return size


def _as_written(candidate: str, hypothesis: str) -> str:
    """Return a candidate as the hypothesis writes it, from its last article on, without a stop or possessive."""
    words = candidate.split(" ")
    start = max([words.index(article) for article in ("a", "an", "the") if article in words], default=0)
    pattern = " ".join(re.escape(word) + "[.,?!]?" for word in words[start:])
    found = re.search(pattern, hypothesis, re.IGNORECASE)
    if found is None:
        raise UserError(f"WNLI: {candidate!r} is not in {hypothesis!r}")
    text = found[0]
    text = text[:-1] if text.endswith(_STOPS) else text
    return text.removesuffix("'") if text.endswith("'") else text.removesuffix("'s")


# --------------------------------------------------------------------------------------------------------------- tasks

sentinels.add_twin(
    text_to_text.add(
        "dpr_v001_simple",
        data_sources.CorpusSource(
            folder="dpr",
            files={"train": "train.c.txt", "test": "test.c.txt"},
            build=functools.partial(data_sources.MemorySource, read=read_dpr),
            tfds_name="definite_pronoun_resolution:1.1.0",
            tfds_splits=("train", "test"),
        ),
        [dpr],
        [metrics.accuracy],
    )
)
for _name, _splits, _true_only in (("train", ("train",), True), ("eval", ("validation", "test"), False)):
    sentinels.add_twin(
        text_to_text.add(
            f"super_glue_wsc_v102_simple_{_name}",
            super_glue.source("WSC", "wsc.fixed", read_wsc, {split: super_glue.JSONL[split] for split in _splits}),
            [functools.partial(wsc, true_only=_true_only)],
            [] if _true_only else [metrics.accuracy],
            None if _true_only else metrics.wsc_simple,
        )
    )
(_wnli,) = (config for config in glue.CONFIGS if config.name == "wnli")
text_to_text.add(
    "glue_wnli_v002_simple_eval",
    glue.source(_wnli, ("validation", "test")),
    [wnli],
    [metrics.accuracy],
    metrics.wsc_simple,
)
