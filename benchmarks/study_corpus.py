"""The text that `make study` pre-trains on: all there is in $T5X_LITE_DATA_DIR and in Python itself, as JSON lines.

    python benchmarks/study_corpus.py OUT        writes OUT/train.jsonl and OUT/validation.jsonl, rows {"text": ...}

Train: C4's documents, SQuAD's paragraphs with the questions about them, the text of GLUE's rows (both sentences, one
after the other: what one says helps to fill in the other) and the passages of Python's own documentation, all of the
`train` splits alone, each text once. No answer and no label is in it. Validation: C4's.
"""

import json
import pathlib
import random
import sys
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import seqio  # noqa: E402

import tasks  # noqa: E402, F401  registers what is read
from tasks import glue, stdlib_text  # noqa: E402


def rows(task: str, split: str, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    source = seqio.TaskRegistry.get(task).source.get_dataset(split, shuffle=False, num_epochs=1)
    for row in source.as_numpy_iterator():
        yield tuple(row[name].decode() for name in columns)


def train_texts() -> Iterator[str]:
    for (document,) in rows("c4_v220_span_corruption", "train", ("text",)):
        yield document
    asked: dict[str, list[str]] = {}
    for paragraph, question in rows("squad_v010_allanswers", "train", ("context", "question")):
        asked.setdefault(paragraph, []).append(question)
    for paragraph, questions in asked.items():
        yield " ".join([paragraph, *questions])
    for config in glue.CONFIGS:
        task = f"glue_{config.name}_v002"
        if "train" in seqio.TaskRegistry.get(task).splits:
            yield from whole(" ".join(texts) for texts in rows(task, "train", tuple(config.text)))
    for passage in stdlib_text.texts()["train"].passages:
        yield " ".join(passage.sentences)


def whole(texts: Iterable[str]) -> Iterator[str]:
    """Those that are no part of another: nine in ten of SST-2's are phrases of its sentences."""
    found = ""
    for text in sorted(set(texts), key=len, reverse=True):
        if text not in found:
            found += f"\n{text}"
            yield text


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    validation = (text for (text,) in rows("c4_v220_span_corruption", "validation", ("text",)))
    for split, texts in (("train", train_texts()), ("validation", validation)):
        found = sorted(dict.fromkeys(text for text in texts if text.strip()))
        random.Random(0).shuffle(found)  # kinds mixed: the pipeline joins neighbours into one sequence
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
        print(f"{folder / split}.jsonl: {len(found):,} texts, {sum(map(len, found)):,} characters")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
