"""Trains the tiny T5 for 30 steps by the training loop, and prints the loss of each step as JSON.

    python tests/loss_curve/train.py [--folder=MODEL_DIR] [--kill_after=STEP]

With a folder it saves every tenth step there and resumes from the newest; --kill_after ends the process by SIGKILL once
the step is logged. `--write` stores the losses as those that tests/core/test_loss_curve.py compares with; do so only
where the numbers are meant to change, and say why in the commit.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import jax  # noqa: E402
import tiny  # noqa: E402

from t5x_lite import sharding  # noqa: E402
from t5x_lite.checkpoint import saving  # noqa: E402
from t5x_lite.model.config import T5Config  # noqa: E402
from t5x_lite.training import (  # noqa: E402
    loop,
    optim,
    step,
)

STEPS = 30


def train(
    config: T5Config = tiny.CONFIG,
    mesh: tuple[int, int, int] = (1, 1, 1),
    num_microbatches: int = 1,
    packed: bool = False,
    folder: Path | None = None,
    logger: Any = None,
) -> dict[int, float]:
    """The loss of each step that this call trained."""
    optimizer = optim.make_optimizer(optim.adafactor(min_dim_size_to_factor=32), optim.rsqrt_decay(0.2, 10))
    compiler = step.Compiler(sharding.make_mesh(*mesh, devices=jax.devices()[: mesh[0] * mesh[1] * mesh[2]]))
    abstract = step.abstract_state(config, optimizer, compiler.mesh)
    train_step = compiler.train_step(abstract, config=config, optimizer=optimizer, num_microbatches=num_microbatches)
    batches, logger = tiny.Batches(packed), logger or tiny.Losses()
    saver = saving.Checkpointer(folder) if folder is not None else None
    newest = saver.latest_step() if saver is not None else None
    if saver is not None and newest is not None:
        state = saver.restore(newest, abstract, batches)
    else:
        state = tiny.initial_state(config, optimizer, abstract)
    rows = sharding.batch_sharding(compiler.mesh)
    key = jax.device_put(jax.random.key(1), compiler.replicated())
    schedule = loop.Schedule(STEPS, log=1, save=10)
    loop.train(state, train_step, batches, key, rows=rows, schedule=schedule, logger=logger, saver=saver)
    if saver is not None:
        saver.close()
    return logger.losses


class Killing(tiny.Losses):
    """Prints each loss at once, and kills its process after a step, once the checkpoint before it is written."""

    def __init__(self, last: int | None, folder: Path | None) -> None:
        super().__init__()
        self._last, self._folder = last, folder

    def train(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        super().train(step, metrics, seconds)
        print(json.dumps({"step": step, "loss": metrics["loss"]}), flush=True)
        if step == self._last:
            while self._folder is not None and not (self._folder / "checkpoints" / f"{step // 10 * 10}").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kill_after", type=int)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    losses = train(folder=arguments.folder, logger=Killing(arguments.kill_after, arguments.folder))
    if arguments.write:
        content = {"jax": jax.__version__, "losses": [losses[n] for n in sorted(losses)]}
        (tiny.FOLDER / "losses.json").write_text(json.dumps(content, indent=1) + "\n")
