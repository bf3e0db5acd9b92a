"""Trains two sides alike and prints the first step at which their losses differ; exits with 1 if they do.

    python scripts/compare_losses.py HEAD~3 HEAD                                   two commits
    python scripts/compare_losses.py . ". --gin.SCAN_LAYERS=False" --rtol=1e-4     two settings of the working tree

A side is a commit (".": the working tree), and perhaps flags of run.py. Both train tests/tiny.gin on the text next to
it, for some steps, from this copy of the two files, each side in a process and a MODEL_DIR of its own.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """The source tree of a commit; of ".", this one."""
    if commit == ".":
        yield ROOT
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def train(side: str, folder: Path, steps: int, gin_file: Path) -> dict[int, float]:
    """Step -> loss."""
    commit, *options = shlex.split(side)
    model_dir = folder / "model"
    command = [
        *(sys.executable, "run.py", f"--gin_file={gin_file}", f"--gin.MODEL_DIR='{model_dir}'"),
        *(f"--gin.TRAIN_FILES='{ROOT}/tests/loss_curve/text.txt'", f"--gin.TRAIN_STEPS={steps}", "--gin.LOG_PERIOD=1"),
        *options,
    ]
    with checkout(commit, folder / "tree") as tree:
        print(f"{side}: training {steps} steps", file=sys.stderr, flush=True)
        path = f"{tree}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        done = subprocess.run(
            command, cwd=tree, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout.decode()[-3000:]}")
    records = map(json.loads, (model_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["split"] == "train"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs=2, help='"COMMIT [FLAGS]"; ".": the working tree')
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rtol", type=float, default=0.0, help="largest relative difference that counts as none")
    parser.add_argument("--gin_file", type=Path, default=ROOT / "tests" / "tiny.gin")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        losses = []
        for n, side in enumerate(arguments.sides):
            Path(folder, str(n)).mkdir()
            losses.append(train(side, Path(folder, str(n)), arguments.steps, arguments.gin_file.resolve()))
    first, second = losses
    steps = sorted(first.keys() | second.keys())
    different = []
    for n in steps:
        a, b = first.get(n, float("nan")), second.get(n, float("nan"))
        if not abs(a - b) <= arguments.rtol * abs(a):
            different.append(n)
        print(f"{n:6d} {a:.8f} {b:.8f} {abs(a - b) / abs(a):9.2e}{'  *' if n in different else ''}")
    if different:
        print(f"The losses differ from step {different[0]} on.")
        return 1
    print(f"The losses of all {len(steps)} steps agree" + (" to the last bit." if not arguments.rtol else "."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
