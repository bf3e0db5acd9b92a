"""The command: python -m t5x_lite.convert SOURCE DEST --to=huggingface|t5x_lite|peft."""

import argparse
import sys
from typing import get_args

from t5x_lite import convert
from t5x_lite.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m t5x_lite.convert", description=(convert.__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "source", help="Hugging Face directory or name, PEFT folder, T5X checkpoint, MODEL_DIR or checkpoint"
    )
    parser.add_argument("dest", help="folder to create")
    parser.add_argument("--to", required=True, choices=get_args(convert.Format))
    parser.add_argument(
        "--base",
        help="of --to=peft: Hugging Face name or folder of the model that LoRA was trained on; of the others: where "
        "the checkpoint is now that SOURCE started from, if SOURCE holds the trained parameters alone",
    )
    parser.add_argument(
        "--keep_lora",
        action="store_true",
        help="of --to=t5x_lite: keep the updates of a PEFT folder apart, as LoRA to train on, not in the weights",
    )
    args = parser.parse_args(arguments)
    try:
        config = convert.convert(args.source, args.dest, args.to, args.base, args.keep_lora)
    except (UserError, OSError) as error:
        print(f"t5x_lite.convert: {error}", file=sys.stderr)
        return 2
    print(f"{args.dest}: {config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
