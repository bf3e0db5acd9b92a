"""The text that `make study` pre-trains on: all there is in $T5X_LITE_DATA_DIR and in Python itself, as JSON lines.

    python benchmarks/study_corpus.py OUT        writes OUT/train.jsonl and OUT/validation.jsonl, rows {"text": ...}

Train: C4's documents, SQuAD's paragraphs, the sentences of GLUE and the passages of Python's own documentation, all of
the `train` splits alone, each text once. Validation: C4's.
"""

import json
import pathlib
import random
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import seqio  # noqa: E402

import tasks  # noqa: E402, F401  registers what is read
from tasks import glue, stdlib_text  # noqa: E402


def column(task: str, split: str, names: tuple[str, ...]) -> Iterator[str]:
    rows = seqio.TaskRegistry.get(task).source.get_dataset(split, shuffle=False, num_epochs=1)
    for row in rows.as_numpy_iterator():
        for name in names:
            yield row[name].decode()


def train_texts() -> Iterator[str]:
    yield from column("c4_v220_span_corruption", "train", ("text",))
    yield from column("squad_v010_allanswers", "train", ("context",))
    for config in glue.CONFIGS:
        task = f"glue_{config.name}_v002"
        if "train" in seqio.TaskRegistry.get(task).splits:
            yield from column(task, "train", tuple(config.text))
    for passage in stdlib_text.texts()["train"].passages:
        yield " ".join(passage.sentences)


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    validation = column("c4_v220_span_corruption", "validation", ("text",))
    for split, texts in (("train", train_texts()), ("validation", validation)):
        found = sorted(dict.fromkeys(text for text in texts if text.strip()))
        random.Random(0).shuffle(found)  # kinds mixed: the pipeline joins neighbours into one sequence
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
        print(f"{folder / split}.jsonl: {len(found):,} texts, {sum(map(len, found)):,} characters")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
