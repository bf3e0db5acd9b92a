"""One recipe of `runs/speedrun.sh`: train for N minutes from nothing, then measure what C4's validation text costs.

    python benchmarks/speedrun.py NAME [--out=runs/speedrun] [--minutes=10] [--pieces=8092] RUN_FLAG... [-- RUN_FLAG...]

RUN_FLAGs are those of run.py that begin with --gin. `--` begins another run, which starts from the parameters of that
before it. All runs have the model of study/model.gin, the study's text and a vocabulary of --pieces pieces learnt from
it. The clock is that of the processes of run.py together: they start, compile (no compiled program is kept from
elsewhere), train and save. A recipe that takes more than --minutes has no result. Text and vocabulary are made before,
and are not in the time.

The measure is one for all recipes: 100 documents in rows of at most 1,000 characters, of whose words 15 % are cut out
in spans of two on average, drawn once. Inputs and targets are texts, the same for any vocabulary. `--mode=score` gives
the log-likelihood of the targets, with their sentinels and EOS:

    bits per byte     of the words that were cut out: of any vocabulary, so the figure to compare
    nats per token    of the targets, sentinels and EOS included: for recipes with the same vocabulary

A result is a line of OUT/results.jsonl, and a recipe whose NAME is there is not trained again; one that was interrupted
is begun anew, since its clock has stopped. Needs $T5X_LITE_DATA_DIR.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import study  # noqa: E402
from benchmarks.transfer import Results  # noqa: E402
from tasks import noise  # noqa: E402

CHARACTERS = 1000  # of a row: about the 256 tokens of study/pretrain.gin
SENTINEL = "<extra_id_{}>"


@dataclasses.dataclass(frozen=True)
class Recipe:
    name: str


# The measure.


def rows(texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield rows of inputs and targets, and how many UTF-8 bytes the words have that were cut out."""
    pieces = [piece for text in texts for piece in cut(text.split())]
    for number, words in enumerate(pieces):
        seeds = np.array([[[number, 0], [number, 1]]])
        (mask,) = noise.random_spans_noise_mask(len(words), 0.15, seeds, mean_noise_span_length=2.0)
        sides: tuple[list[str], list[str]] = [], []  # inputs and targets
        spans: list[str] = []
        for word, cut_out, before in zip(words, mask, [False, *mask[:-1]], strict=True):
            if cut_out and not before:
                for side in sides:
                    side.append(SENTINEL.format(len(spans)))
                spans.append(word)
            elif cut_out:
                spans[-1] += f" {word}"
            sides[int(cut_out)].append(word)
        sides[1].append(SENTINEL.format(len(spans)))  # as in T5, the end
        inputs, targets = map(" ".join, sides)
        yield {"inputs": inputs, "targets": targets, "bytes": sum(len(span.encode()) for span in spans)}


def cut(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield pieces of at most CHARACTERS characters; one of fewer than ten words is left out."""
    piece: list[str] = []
    for word in words:
        if piece and len(" ".join([*piece, word])) > CHARACTERS:
            yield piece
            piece = []
        piece.append(word)
    if len(piece) >= 10:
        yield piece


def costs(scores: Sequence[float], num_bytes: int, num_tokens: int) -> dict[str, float]:
    """Bits per byte and nats per token of texts with these log-likelihoods, in nats."""
    nats = -math.fsum(scores)
    return {"bits_per_byte": nats / math.log(2) / num_bytes, "nats_per_token": nats / num_tokens}


def measure(out: pathlib.Path, model: pathlib.Path) -> dict[str, float]:
    """Scores the rows of the measure by the model in a MODEL_DIR."""
    from tasks import vocabulary

    file, scored = out / "rows.jsonl", model / "scored.jsonl"
    texts = [json.loads(line)["text"] for line in (out / "corpus" / "validation.jsonl").read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(texts)))
    options = {
        "INFER_INPUT": str(file),
        "INFER_OUTPUT": str(scored),
        "TASK_FEATURE_LENGTHS": {"inputs": 1024, "targets": 512},  # of which no vocabulary of pieces cuts anything
        "EVAL_BATCH_SIZE": 8,
    }
    call(["--mode=score", f"--gin_file={model / 'config.gin'}", *bindings(options)], model / "score.log")
    scores = [json.loads(line)["score"] for line in scored.read_text().splitlines()]
    examples = [json.loads(line) for line in file.read_text().splitlines()]
    if len(scores) != len(examples):
        raise RuntimeError(f"{scored} has {len(scores)} of {len(examples)} rows")
    encode = vocabulary.load(str(model / "spiece.model")).encode
    tokens = sum(len(encode(row["targets"])) + 1 for row in examples)  # and EOS
    return costs(scores, sum(row["bytes"] for row in examples), tokens)


# Training.


def bindings(options: dict[str, Any]) -> list[str]:
    return [f"--gin.{name}={value!r}" for name, value in options.items()]


def call(flags: Sequence[str], log: pathlib.Path, seconds: float | None = None, compiled: str | None = None) -> float:
    """Runs run.py to its end, within `seconds`, and returns the seconds it took. Raises RuntimeError where it fails."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | ({"JAX_COMPILATION_CACHE_DIR": compiled} if compiled else {})
    started = time.perf_counter()
    with log.open("w") as file:
        command = [sys.executable, "run.py", *flags]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{log.parent.name} takes more than its time") from None
        finally:
            process.terminate()  # nothing if it has ended
            process.wait()
    if status:
        raise RuntimeError(f"{log} ends\n{log.read_text()[-2000:]}\nThe process ended with {status}.")
    return time.perf_counter() - started


def is_run_flag(argument: str) -> bool:
    return argument == "--" or argument.startswith("--gin")


def phases(flags: Sequence[str]) -> list[list[str]]:
    """The flags of each run, which `--` separates."""
    runs: list[list[str]] = [[]]
    for flag in flags:
        if flag == "--":
            runs.append([])
        else:
            runs[-1].append(flag)
    return runs


def train(
    out: pathlib.Path, name: str, pieces: int, flags: Sequence[str], minutes: float
) -> tuple[pathlib.Path, float]:
    """Does a recipe's runs, and returns the last one's MODEL_DIR and the seconds of them all."""
    text, words = out / "corpus" / "train.jsonl", out / study.vocabulary_file(pieces)
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seconds, start = 0.0, None
    for number, own in enumerate(phases(flags)):
        model = folder / str(number)
        options = {
            "TRAIN_FILES": str(text),
            "VOCABULARY": str(words),
            "T5Config.vocab_size": pieces + 100,  # and the sentinels
            "INITIAL_CHECKPOINT_PATH": start,
            "MODEL_DIR": str(model),
            "CHECKPOINT_PERIOD": 10**9,  # after the last step only
        }
        command = [f"--gin_file={study.MODEL}", *own, *bindings(options)]
        log = folder / f"{number}.log"
        seconds += call(command, log, 60 * minutes - seconds, compiled=str(folder / "compiled"))
        start = str(model)
    return folder / str(number), seconds


def commit() -> str:
    """The short name of the commit, with "+" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "speedrun")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pieces", type=int, default=study.PIECES)
    given = sys.argv[1:] if arguments is None else arguments
    flags = [flag for flag in given if is_run_flag(flag)]
    args = parser.parse_args([argument for argument in given if not is_run_flag(argument)])
    if not os.environ.get("T5X_LITE_DATA_DIR"):
        print("speedrun: set T5X_LITE_DATA_DIR to the folder that holds c4/, glue/ and squad/", file=sys.stderr)
        return 2
    out, recipe = args.out.resolve(), Recipe(args.name)
    results = Results(out / "results.jsonl", Recipe)
    try:
        if recipe not in results.read():
            study.prepare(out, args.pieces)
            model, seconds = train(out, args.name, args.pieces, flags, args.minutes)
            settings = {"commit": commit(), "minutes": seconds / 60, "pieces": args.pieces, "flags": flags}
            results.add(recipe, settings | measure(out, model) | {"cores": len(os.sched_getaffinity(0))})
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"speedrun: {error}", file=sys.stderr)
        return 1
    print("| recipe | commit | cores | minutes | bits per byte | nats per token |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for one, row in results.read().items():
        cells = [f"{row['minutes']:.1f}", f"{row['bits_per_byte']:.3f}", f"{row['nats_per_token']:.3f}"]
        print(f"| {one.name} | {row['commit']} | {row['cores']} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so what it has started ends
    sys.exit(main())
