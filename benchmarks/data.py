"""Times the data pipeline on C4: span corruption from raw JSON lines, packed; prints one JSON line.

    T5X_LITE_DATA_DIR=... python benchmarks/data.py [--task=c4_v220_span_corruption] [--cache_dir=DIR]

Counts input tokens (encoder, without padding) a second of what training gets: batches of int32 arrays. The first
batches are not counted. `--pipeline=t5` runs the t5 package's preprocessors (where `pip install t5` is) on the same
documents, handed to it from memory. Needs no JAX device.
"""

import argparse
import glob
import gzip
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402

import tasks  # noqa: E402
from t5x_lite.data import pipeline  # noqa: E402


def t5_batches(task: str, lengths: dict[str, int], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the t5 package's own preprocessors and SeqIO's packing; our vocabulary, documents from memory."""
    from t5.data import preprocessors  # pyright: ignore[reportMissingImports]

    folder = os.environ["T5X_LITE_DATA_DIR"]
    documents = []
    for path in sorted(glob.glob(f"{folder}/c4/c4-train.*.json.gz")):
        with gzip.open(path, "rt") as lines:
            documents += [json.loads(line)["text"] for line in lines]

    def read(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices({"text": tf.constant(documents)})  # pyright: ignore[reportArgumentType]

    seqio.TaskRegistry.add(
        "t5_reference",
        source=seqio.FunctionDataSource(read, splits=["train"]),  # pyright: ignore[reportArgumentType]
        preprocessors=[
            lambda ds: preprocessors.rekey(ds, {"inputs": None, "targets": "text"}),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            getattr(preprocessors, task.removeprefix("c4_v220_")),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={
            name: seqio.Feature(tasks.vocabulary.default_vocabulary(), required=name == "targets")
            for name in ("inputs", "targets")
        },
    )
    dataset = seqio.get_dataset(
        "t5_reference",
        lengths,
        dataset_split="train",
        shuffle=True,
        num_epochs=None,
        feature_converter=seqio.EncDecFeatureConverter(pack=True),
        seed=0,
    )
    return dataset.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="c4_v220_span_corruption")
    parser.add_argument("--pipeline", default="t5x_lite", choices=["t5x_lite", "t5"])
    parser.add_argument("--cache_dir", help="read the task's offline cache from here (see the README)")
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=114)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each window")
    parser.add_argument("--windows", type=int, default=3)
    args = parser.parse_args()

    if args.cache_dir:
        seqio.add_global_cache_dirs([args.cache_dir])
    lengths = {"inputs": args.inputs, "targets": args.targets}
    if args.pipeline == "t5":
        batches = t5_batches(args.task, lengths, args.batch_size)
    else:
        cached = args.cache_dir is not None
        batches = pipeline.TrainBatches(args.task, lengths, batch_size=args.batch_size, seed=0, use_cached=cached)
    for _ in range(5):
        next(batches)
    rates, cpu = [], []
    for _ in range(args.windows):
        tokens, started, cpu_started = 0, time.perf_counter(), time.process_time()
        while (seconds := time.perf_counter() - started) < args.seconds:
            tokens += int(np.count_nonzero(next(batches)["encoder_input_tokens"]))
        rates.append(tokens / seconds)
        cpu.append(1e6 * (time.process_time() - cpu_started) / tokens)
    shown = {k: v for k, v in vars(args).items() if k not in ("seconds", "windows")}
    print(
        json.dumps(
            shown
            | {
                "input_tokens_per_second": round(statistics.median(rates)),
                "all": [round(rate) for rate in rates],
                "cpu_seconds_per_million": round(statistics.median(cpu), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
