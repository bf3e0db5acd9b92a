"""Train a SentencePiece vocabulary on a task's text or on files, and report its statistics on that text.

    python -m tasks.vocabulary train --output=DIR/NAME.model --size=8000 --task=c4_v220_span_corruption
    python -m tasks.vocabulary train --output=DIR/NAME.model --size=8000 --type=bpe --files 'data/*.jsonl'
    python -m tasks.vocabulary check DIR/NAME.model --task=squad_v110 --split=validation

Use it in a run with `--gin.VOCABULARY="'DIR/NAME.model'"`. Exit codes: 1 if encoding and decoding change
normalised text without <unk>, 2 if the text or the model cannot be read or trained on.
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

_MEASURED = 10_000  # maximum number of texts for the report


def main(arguments: Sequence[str] | None = None) -> int:
    flags = _parser().parse_args(arguments)
    try:
        return _train(flags) if flags.command == "train" else _check(flags)
    except tf.errors.OpError as error:
        message = error.message
    except (OSError, ValueError) as error:
        message = str(error)
    print(f"tasks.vocabulary: {message.splitlines()[0]}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.vocabulary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a vocabulary, write it and report on it")
    train.add_argument("--output", required=True, metavar="FILE.model", help="path of the new model, local or gs://")
    train.add_argument(
        "--size",
        type=int,
        default=32_000,
        help="pieces, including special ones; 100 sentinels are added (%(default)s)",
    )
    train.add_argument("--type", choices=get_args(trainer.Kind), default="unigram", help="(%(default)s)")
    train.add_argument(
        "--normalization",
        choices=get_args(trainer.Normalization),
        default="nmt_nfkc",
        help="nmt_nfkc (T5's, the default) is NFKC with all white space as spaces; _cf folds case",
    )
    train.add_argument(
        "--coverage",
        type=float,
        default=0.9999,
        help="share of characters in the text that get a piece; 1 covers all (%(default)s)",
    )
    train.add_argument("--byte_fallback", action="store_true", help="encode other characters as bytes instead of <unk>")
    train.add_argument("--limit", type=int, default=1_000_000, help="maximum number of texts to train on (%(default)s)")
    check = commands.add_parser("check", help="report on an existing vocabulary")
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
        raise UserError(f"{flags.output} exists, and models trained with it need it: choose another name, or delete it")
    if flags.limit < 1:
        raise UserError(f"--limit={flags.limit}: at least one text is needed")
    iterator = _texts(flags)
    trainer.train(
        itertools.islice(iterator, flags.limit),
        flags.output,
        flags.size,
        flags.type,
        normalization=flags.normalization,
        character_coverage=flags.coverage,
        byte_fallback=flags.byte_fallback,
    )
    if next(iterator, None) is not None:
        print(f"The vocabulary was trained on the first {flags.limit:,} texts; there are more (--limit).")
    return _report(flags.output, flags)


def _check(flags: argparse.Namespace) -> int:
    return _report(flags.model, flags)


def _report(model_file: str, flags: argparse.Namespace) -> int:
    loaded = vocabulary.load(model_file)  # raises an error if its special ids are not T5's
    with tf.io.gfile.GFile(model_file, "rb") as file:  # the file itself, without the sentinels that SeqIO adds
        model = sentencepiece.SentencePieceProcessor(model_proto=file.read())
    measured = report.measure(model, itertools.islice(_texts(flags), _MEASURED))
    if not measured.texts:
        raise UserError("there is no text for the report: every row is empty")
    formats: Any = sentencepiece_model_pb2  # its classes are created at run time
    proto = formats.ModelProto.FromString(model.serialized_model_proto())
    kind = formats.TrainerSpec.ModelType.Name(proto.trainer_spec.model_type).lower()
    print(
        f"{model_file}: {kind}, {proto.normalizer_spec.name} normalisation, {model.get_piece_size():,} pieces "
        f"({loaded.vocab_size:,} ids with {vocabulary.sentinel_count(loaded)} sentinels)"
    )
    source = " ".join(flags.files) if flags.files else f"{flags.task}, {flags.split}"
    first = "the first " if measured.texts == _MEASURED else ""
    print(f"on {source}: {first}{measured.texts:,} texts, {measured.words:,} words, {measured.characters:,} characters")
    print(report.to_text(measured, model))
    return 0 if measured.lossless else 1


if __name__ == "__main__":
    sys.exit(main())
