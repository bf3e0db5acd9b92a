"""The command: python -m t5x_lite.report MODEL_DIR."""

import argparse
import sys
from pathlib import Path

from t5x_lite import report, storage
from t5x_lite.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m t5x_lite.report", description="Writes MODEL_DIR/report.html from the files of a run."
    )
    parser.add_argument("model_dir", help="a local folder")
    args = parser.parse_args(arguments)
    try:
        if storage.is_url(args.model_dir):
            raise UserError(f"{args.model_dir} is not a local folder: copy it, or use run.py --mode=eval")
        print(report.write_page(Path(args.model_dir)))
    except (UserError, OSError) as error:
        print(f"t5x_lite.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
