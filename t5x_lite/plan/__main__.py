"""The command: python -m t5x_lite.plan MODEL_DIR/plan.json ..."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.plan import rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m t5x_lite.plan",
        description="Prints a Markdown table of plans, with every setting that --suggest compiled.",
    )
    parser.add_argument("files", nargs="+", type=Path, help="plan.json of --mode=plan")
    args = parser.parse_args(arguments)
    try:
        print(rows.markdown([plan for file in args.files for plan in _plans(file)]))
    except (UserError, OSError) as error:
        print(f"t5x_lite.plan: {error}", file=sys.stderr)
        return 2
    return 0


def _plans(file: Path) -> list[dict[str, Any]]:
    """Return the plans in a file: the candidates of --suggest, or its only plan."""
    try:
        plan = json.loads(file.read_text())
        plans = plan.get("candidates") or [plan]
        for each in plans:
            rows.row(each)
        return plans
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{file} is not a plan.json of --mode=plan") from None


if __name__ == "__main__":
    sys.exit(main())
