"""Learns a SentencePiece vocabulary from a task's text or from files, and says what it does to that text.

    python -m tasks.vocabulary train --output=DIR/NAME.model --size=8000 --task=c4_v220_span_corruption
    python -m tasks.vocabulary train --output=DIR/NAME.model --size=8000 --type=bpe --files 'data/*.jsonl'
    python -m tasks.vocabulary check DIR/NAME.model --task=squad_v110 --split=validation

A run takes it by `--gin.VOCABULARY="'DIR/NAME.model'"`. Exit codes: 1 when text without <unk> does not come back from
its tokens, 2 when nothing could be learnt or read.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import sentencepiece
import tensorflow as tf
from sentencepiece import sentencepiece_model_pb2

from tasks import vocabulary
from tasks.errors import UserError
from tasks.vocabulary import report, texts, trainer

_MEASURED = 10_000  # texts that the report is made from


def main(arguments: Sequence[str] | None = None) -> int:
    flags = _parser().parse_args(arguments)
    try:
        return _train(flags) if flags.command == "train" else _check(flags)
    except tf.errors.OpError as error:
        said = error.message
    except (OSError, ValueError) as error:
        said = str(error)
    print(f"tasks.vocabulary: {said.splitlines()[0]}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.vocabulary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="learn a vocabulary, write it and report on it")
    train.add_argument("--output", required=True, metavar="FILE.model", help="where the model goes, local or gs://")
    train.add_argument(
        "--size",
        type=int,
        default=32_000,
        help="pieces, special ones included; 100 sentinels come on top (%(default)s)",
    )
    train.add_argument("--type", choices=get_args(trainer.Kind), default="unigram", help="(%(default)s)")
    train.add_argument(
        "--normalization",
        choices=get_args(trainer.Normalization),
        default="nmt_nfkc",
        help="nmt_nfkc (T5's, the default) is NFKC with every white space as a space; _cf folds case",
    )
    train.add_argument(
        "--coverage",
        type=float,
        default=0.9999,
        help="share of all characters that get a piece; 1 for every one that occurs (%(default)s)",
    )
    train.add_argument("--byte_fallback", action="store_true", help="spell other characters in bytes, not as <unk>")
    train.add_argument("--limit", type=int, default=1_000_000, help="texts to learn from at most (%(default)s)")
    check = commands.add_parser("check", help="report on a vocabulary that exists")
    check.add_argument("model", help="a .model file, local or gs://")
    for command in (train, check):
        source = command.add_mutually_exclusive_group(required=True)
        source.add_argument("--task", help="a registered task with text")
        source.add_argument("--files", nargs="+", metavar="PATTERN", help=".txt, .jsonl, .csv, .tsv, each also .gz")
        command.add_argument("--split", default="train", help="the task's split (%(default)s)")
        command.add_argument("--template", default="{text}", help="for files with columns (%(default)s)")
    return parser


def _texts(flags: argparse.Namespace) -> Iterator[str]:
    return texts.of_files(flags.files, flags.template) if flags.files else texts.of_task(flags.task, flags.split)


def _train(flags: argparse.Namespace) -> int:
    if tf.io.gfile.exists(flags.output):
        raise UserError(
            f"{flags.output} exists, and what was trained with it needs it: choose another name, or delete it"
        )
    if flags.limit < 1:
        raise UserError(f"--limit={flags.limit}: at least one text is needed")
    found = _texts(flags)
    trainer.train(
        itertools.islice(found, flags.limit),
        flags.output,
        flags.size,
        flags.type,
        normalization=flags.normalization,
        character_coverage=flags.coverage,
        byte_fallback=flags.byte_fallback,
    )
    if next(found, None) is not None:
        print(f"There is more text than the first {flags.limit:,} that this was learnt from (--limit).")
    return _report(flags.output, flags)


def _check(flags: argparse.Namespace) -> int:
    return _report(flags.model, flags)


def _report(model_file: str, flags: argparse.Namespace) -> int:
    vocabulary.load(model_file)  # refuses what is no vocabulary of T5's form
    with tf.io.gfile.GFile(model_file, "rb") as file:  # as it is, without the sentinels that SeqIO puts into it
        model = sentencepiece.SentencePieceProcessor(model_proto=file.read())
    measured = report.measure(model, itertools.islice(_texts(flags), _MEASURED))
    if not measured.texts:
        raise UserError("there is no text to measure on: every row is empty")
    formats: Any = sentencepiece_model_pb2  # its classes are made at run time
    proto = formats.ModelProto.FromString(model.serialized_model_proto())
    kind = formats.TrainerSpec.ModelType.Name(proto.trainer_spec.model_type).lower()
    print(
        f"{model_file}: {kind}, {proto.normalizer_spec.name} normalisation, {model.get_piece_size():,} pieces "
        f"({model.get_piece_size() + vocabulary.EXTRA_IDS:,} ids with {vocabulary.EXTRA_IDS} sentinels)"
    )
    where = " ".join(flags.files) if flags.files else f"{flags.task}, {flags.split}"
    first = "the first " if measured.texts == _MEASURED else ""
    print(f"on {where}: {first}{measured.texts:,} texts, {measured.words:,} words, {measured.characters:,} characters")
    print(report.to_text(measured, model))
    return 0 if measured.lossless else 1


if __name__ == "__main__":
    sys.exit(main())
