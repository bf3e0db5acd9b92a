"""Upload a model to the Hugging Face hub: python -m t5x_lite.convert.push SOURCE OWNER/NAME.

SOURCE is anything that `convert.convert` takes. It is converted in a temporary folder, which gets a model card
(README.md) and the run's config.gin without local paths, and is uploaded as one commit. A README.md in SOURCE, or in
its MODEL_DIR, is uploaded instead of a new card.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

from t5x_lite import checkpoint, convert, storage
from t5x_lite.convert import hub
from t5x_lite.convert.bucket import AnyPath
from t5x_lite.errors import UserError
from t5x_lite.metrics import metric_logger

Format = Literal["huggingface", "peft"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_BASE = re.compile(r"(?:[\w.-]+/)?\w[\w.-]*")
CONFIG, CARD = "config.gin", "README.md"


def push(
    source: str | AnyPath,
    name: str,
    *,
    to: Format = "huggingface",
    base: str | None = None,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
) -> str:
    """Upload the model in `source` to the repository `name` (OWNER/NAME), and return its address.

    The repository is created if it does not exist; files in it that are not uploaded again stay.

    Args:
      base: name on the hub of the model that training started from; required for a PEFT folder.
      revision: a branch, created if it does not exist; None is the main branch.
      private: whether the repository must be private.
      message: the commit's message.

    Raises MissingPackageError without huggingface_hub, UserError if the repository cannot be written, and the errors of
    `convert.convert`. Nothing is created on the hub before the model has been converted.
    """
    if _REPOSITORY.fullmatch(name) is None:
        raise UserError(f"{name!r} is not the name of a repository: give OWNER/NAME, and a branch with --revision")
    if to == "peft" and base is None:
        raise UserError("a PEFT folder needs --base=NAME: the name on the hub of the model that it belongs to")
    if base is not None and (_BASE.fullmatch(base) is None or Path(base).exists()):
        raise UserError(f"--base={base} is a path: give the model's name on the hub, which others can load")
    hub.check_login(name)
    place = hub.located(source)
    with tempfile.TemporaryDirectory(prefix="t5x_lite_push_") as temporary:
        folder = Path(temporary, name.split("/")[1])
        config = convert.convert(place, folder, to, base)
        _describe(place, folder, config, name=name, to=to, base=base, revision=revision)
        message = message or f"Upload {name.split('/')[1]} with t5x_lite"
        return hub.upload(folder, name, revision=revision, private=private, message=message)


def _describe(source: AnyPath, folder: Path, config: Any, **pushed: Any) -> None:
    """Write README.md and config.gin to the folder to upload, from what is in `source` and its MODEL_DIR."""
    from t5x_lite.report import model_card  # above this package, and deletable

    run, newest = convert.run_folder(source), convert.own_checkpoint(source)
    step = int(newest.name) if newest is not None and newest.name.isdecimal() else None
    gin, settings = run / CONFIG, {}
    if gin.is_file():
        text = gin.read_text(encoding="utf-8")
        pushed["base"] = pushed["base"] or _hub_name(model_card.settings(text).get("INITIAL_CHECKPOINT_PATH"))
        text = model_card.without_paths(text)
        (folder / CONFIG).write_text(text, encoding="utf-8")
        settings = model_card.settings(text)
    own_card = next((place / CARD for place in (source, run) if (place / CARD).is_file()), None)
    if own_card is not None:
        (folder / CARD).write_bytes(own_card.read_bytes())
        return
    records = []
    if isinstance(run, Path) and (run / metric_logger.METRICS_FILE).is_file():
        records = metric_logger.read_metrics(run)
    card = model_card.card(folder, config, step=step, settings=settings, records=records, **pushed)
    (folder / CARD).write_text(card, encoding="utf-8")


def _hub_name(initial: Any) -> str | None:
    """Return the name on the hub of the model that a run's INITIAL_CHECKPOINT_PATH was converted from, if known."""
    if not isinstance(initial, str) or storage.is_url(initial) or checkpoint.find_checkpoint(initial) is None:
        return None
    return checkpoint.read_info(initial).get(convert.HUB_NAME)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m t5x_lite.convert.push", description="Upload a model to the Hugging Face hub."
    )
    parser.add_argument("source", help="MODEL_DIR, one of its checkpoints, or whatever t5x_lite.convert takes")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository, which is created if it does not exist")
    parser.add_argument("--as", dest="to", default="huggingface", choices=get_args(Format))
    parser.add_argument("--base", help="name on the hub of the model that training started from; --as=peft needs it")
    parser.add_argument("--revision", metavar="BRANCH", help="a branch, which is created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--message", help="the commit's message")
    args = parser.parse_args(arguments)
    try:
        print(push(**vars(args)))
    except (UserError, OSError) as error:
        print(f"t5x_lite.convert.push: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
