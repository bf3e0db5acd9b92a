"""Writes the rows that a classification run trains on, batch by batch, and its dev rows, for `make transfer`'s peer.

    python benchmarks/transfer_rows.py OUT.npz FLAGS-OF-RUN.PY

The order of batches is that of the run with these flags, seed included. OUT.npz holds, for M = steps * B rows of S
tokens: train_inputs, train_segments [M, S], train_label [M], widths [steps] (the columns of each batch that the run
reads; the rest is padding), and dev_inputs, dev_segments, dev_label, with the texts dev_first and dev_second.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from t5x_lite.cli import main as run_py  # noqa: E402
from t5x_lite.cli import task_setup  # noqa: E402
from t5x_lite.run_config import last_step  # noqa: E402


def main(out: str, flags: list[str]) -> None:
    options = run_py.parse_flags(["run.py", *flags])
    run = run_py.configure(options.gin_file, options.gin_bindings, options.gin_search_paths)
    name = task_setup.register_tasks(run)
    length = run.task_feature_lengths["inputs"]
    source = task_setup.build_train_batches(run, name)
    batches = [next(source) for _ in range(last_step(run))]

    def column(key: str) -> np.ndarray:
        return np.concatenate([np.pad(b[key], ((0, 0), (0, length - b[key].shape[1]))) for b in batches])

    from t5x_lite.data import pipeline

    task = pipeline.find_provider(name)
    rows = task.get_dataset(run.task_feature_lengths, run.eval_split, shuffle=False, num_epochs=1)
    dev = list(rows.as_numpy_iterator())
    texts = [row["inputs_pretokenized"].decode().split(" [SEP] ", 1) for row in dev]

    def padded(key: str) -> np.ndarray:
        return np.array([np.pad(row[key], (0, length - len(row[key]))) for row in dev])

    np.savez_compressed(
        out,
        train_inputs=column("inputs"),
        train_segments=column("segments"),
        train_label=np.concatenate([b["label"][:, 0] for b in batches]),
        widths=np.array([b["inputs"].shape[1] for b in batches]),
        dev_inputs=padded("inputs"),
        dev_segments=padded("segments"),
        dev_label=np.array([row["label"][0] for row in dev]),
        dev_first=np.array([text[0] for text in texts]),
        dev_second=np.array([text[1] if len(text) > 1 else "" for text in texts]),
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
