"""Weights & Biases as a second place for the records of metrics.jsonl; needs the package wandb, imported on use."""

import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.metrics.tensorboard_events import tagged

RUN_ID_FILE = "wandb_run_id"  # in MODEL_DIR, so that a resumed run continues the same W&B run


def check_installed(project: str) -> None:
    """Raises UserError if the package wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"WANDB_PROJECT = {project!r} needs the package wandb: pip install wandb, or unset WANDB_PROJECT"
        )


class WandbRun:
    """One W&B run. Metrics are named as in TensorBoard, split/[task/]name, over the training step.

    Without a network set WANDB_MODE=offline: the files are written to MODEL_DIR/wandb, and `wandb sync` uploads them.

    Raises:
      UserError: W&B rejects the run, for example because there is no API key.
    """

    def __init__(self, project: str, model_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb
        import wandb.errors

        id_file = model_dir / RUN_ID_FILE
        model_dir.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                name=model_dir.resolve().name,
                id=id_file.read_text().strip(),
                resume="allow",
                dir=os.fspath(model_dir),
                config=dict(config),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"WANDB_PROJECT = {project!r}: {error}. Run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        # A resumed run repeats steps that were logged after its checkpoint, which W&B's own step counter would drop.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Logs records of metrics.jsonl."""
        for record in records:
            numbers = {tag: x for tag, x in tagged(record).items() if x is not None}
            self._run.log({"step": record["step"], **numbers})

    def flush(self) -> None:
        """Does nothing: W&B writes in a process of its own."""

    def close(self) -> None:
        self._run.finish()
