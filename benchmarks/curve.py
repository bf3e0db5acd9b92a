"""Trains one T5 here and in Hugging Face's torch, on the same batches, and compares the loss of every step.

    T5X_LITE_DATA_DIR=... python benchmarks/curve.py --torch=/path/bin/python [--steps=200] [--batch_size=4]
        [--optimizer=adafactor,adamw] [--out=runs/curve] [--sides=torch,torch_exact_rms,float32,bfloat16,microbatches]

Both start from one Hugging Face folder, T5 1.1 small at random (or --start), and read the same rows of C4's span
corruption: one example a row, so that torch, which has no masks of segments, needs no other mask than that of padding.
Dropout is 0, the loss the mean over the target tokens without z-loss, the learning rate constant. Each optimizer is one
algorithm:

    adafactor   T5X's, against transformers' with scale_parameter and without relative_step. transformers factors the
                second moments of every matrix; here those of matrices below 128 are whole, so that
                min_dim_size_to_factor is 1 for this.
    adamw       without scaling by parameters' RMS, against torch.optim.AdamW with two groups: weight decay leaves
                out the scales of norms. With two rows a step and ten times its learning rate, differences in rounding
                grow tenfold in every four steps.

--torch is a Python with torch and transformers. The sides, each a process:

    torch               transformers as it is, in float32
    torch_exact_rms     the same, but for the RMS in its Adafactor: torch's norm of a large tensor in float32 on a CPU
                        is too small (6e-4 for the embeddings), and so are the steps scaled by it
    float32, bfloat16   this project
    microbatches        float32 with each row a micro-batch of its own: the same mathematics rounded otherwise, so its
                        distance from `float32` is what rounding alone comes to in so many steps

DIR holds a file of JSON lines a side, curves.png and summary.md. The same command resumes. Exits with 1 where torch and
float32 differ by more than --tolerance, relatively, at any step.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent

OPTIMIZERS: Mapping[str, Mapping[str, float]] = {
    "adafactor": {
        "learning_rate": 1e-3,
        "decay_rate": 0.8,
        "clipping_threshold": 1.0,
        "epsilon1": 1e-30,
        "epsilon2": 1e-3,
    },
    "adamw": {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.999, "eps": 1e-6, "weight_decay": 0.1},
}
TORCH_SIDES = ("torch", "torch_exact_rms")
SIDES = (*TORCH_SIDES, "float32", "bfloat16", "microbatches")
REFERENCE = "float32"  # the side that the others are compared with
LENGTHS = {"inputs": 512, "targets": 114}
TASK = "c4_v220_span_corruption"

Losses = Mapping[int, float]  # by step, from 1


@dataclasses.dataclass(frozen=True)
class Run:
    """One side's training with one optimizer: its losses, as JSON lines, and the folder of its saved state."""

    out: pathlib.Path
    optimizer: str
    side: str

    @property
    def log(self) -> pathlib.Path:
        return self.out / f"{self.optimizer}-{self.side}.jsonl"

    @property
    def state(self) -> pathlib.Path:
        return self.out / "states" / f"{self.optimizer}-{self.side}"

    def append(self, step: int, loss: float, seconds: float) -> None:
        """Adds a step; `seconds` is 0 where it was not timed."""
        line = {"step": step, "loss": loss, "seconds": round(seconds, 4)}
        with self.log.open("ab", buffering=0) as file:  # one write: a kill leaves all of a line or none
            file.write((json.dumps(line) + "\n").encode())

    def lines(self) -> list[dict[str, float]]:
        """The steps done; a last line that a kill has cut is left out."""
        content = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]

    def losses(self) -> dict[int, float]:
        return {int(line["step"]): line["loss"] for line in self.lines()}

    def rewind(self, step: int) -> None:
        """Drops what comes after `step`, whose state is saved. Raises ValueError where steps before it are missing."""
        earlier = [line for line in self.lines() if line["step"] <= step]
        if [line["step"] for line in earlier] != list(range(1, step + 1)):
            raise ValueError(f"{self.log} lacks steps before {step}: remove it, and {self.state}")
        temporary = self.log.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in earlier))
        temporary.replace(self.log)


def batches(out: pathlib.Path, first: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps first + 1, first + 2, ...: arrays [B, length] under the names of t5x_lite."""
    with np.load(out / "batches.npz") as file:
        arrays = dict(file)
    for step in range(first, len(arrays["encoder_input_tokens"])):
        yield {name: x[step] for name, x in arrays.items()}


def relative_differences(losses: Losses, reference: Losses) -> dict[int, float]:
    """|loss - reference| / |reference| of the steps that both have. A loss that is not finite differs infinitely."""
    shared = sorted(losses.keys() & reference.keys())
    return {n: _relative(losses[n], reference[n]) for n in shared}


def _relative(value: float, reference: float) -> float:
    difference = abs(value - reference) / abs(reference) if reference else float("inf")
    return difference if np.isfinite(difference) else float("inf")


def summary(runs: Sequence[Run]) -> str:
    """A table: for each run that has a reference, the relative differences from it, and seconds a step."""
    marks = (1, 2, 5, 10, 20, 50, 100, 200)
    losses = {(run.optimizer, run.side): run.losses() for run in runs}
    steps = max((max(of, default=0) for of in losses.values()), default=0)
    marks = tuple(n for n in marks if n <= steps)
    lines = [
        "| optimizer | side | steps | first loss | last loss | s a step | largest difference | at step | mean | "
        + " | ".join(f"at {n}" for n in marks)
        + " |",
        "| --- " * 2 + "| ---: " * (7 + len(marks)) + "|",
    ]
    for run in runs:
        if not (own := losses[run.optimizer, run.side]):
            continue
        seconds = [line["seconds"] for line in run.lines() if line["seconds"]]
        cells = [run.optimizer, run.side, str(len(own)), f"{own[min(own)]:.4f}", f"{own[max(own)]:.4f}"]
        cells.append(f"{statistics.median(seconds):.2f}" if seconds else "")
        different = relative_differences(own, losses.get((run.optimizer, REFERENCE), {}))
        if different and run.side != REFERENCE:
            worst = max(different, key=lambda n: different[n])
            mean = statistics.fmean(different.values())
            cells += [f"{different[worst]:.1e}", str(worst), f"{mean:.1e}"]
            cells += [f"{different[n]:.1e}" if n in different else "" for n in marks]
        else:
            cells += [""] * (3 + len(marks))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], file: pathlib.Path) -> None:
    """A column an optimizer: the losses of all sides, and below them the relative differences on a log axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    labels = {
        "torch": "transformers, torch, float32",
        "torch_exact_rms": "the same, exact RMS",
        "float32": "t5x_lite, float32",
        "bfloat16": "t5x_lite, bfloat16",
        "microbatches": "t5x_lite, float32, micro-batches",
    }
    colours = {
        side: f"C{n}" for n, side in enumerate((REFERENCE, "torch", "bfloat16", "torch_exact_rms", "microbatches"))
    }
    optimizers = list(dict.fromkeys(run.optimizer for run in runs))
    figure, axes = pyplot.subplots(
        2, len(optimizers), figsize=(5.5 * len(optimizers), 6), sharex=True, squeeze=False, layout="constrained"
    )
    for optimizer, (top, bottom) in zip(optimizers, axes.T, strict=True):
        losses = {run.side: run.losses() for run in runs if run.optimizer == optimizer}
        for side in (side for side in colours if losses.get(side)):
            style = {"linewidth": 3.0, "alpha": 0.4} if side == REFERENCE else {"linewidth": 1.0}
            top.plot(*zip(*losses[side].items(), strict=True), color=colours[side], label=labels[side], **style)
            different = relative_differences(losses[side], losses.get(REFERENCE, {}))
            if different and side != REFERENCE:
                # A difference of nothing has no place on a log axis.
                points = [(n, difference or float("nan")) for n, difference in different.items()]
                bottom.plot(*zip(*points, strict=True), color=colours[side], linewidth=1.0)
        bottom.set_yscale("log")
        bottom.axhline(1e-3, color="grey", linestyle=":")
        top.set_title({"adafactor": "Adafactor", "adamw": "AdamW"}.get(optimizer, optimizer))
        bottom.set_xlabel("step")
        for ax in (top, bottom):
            ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("loss, nats per target token")
    axes[1][0].set_ylabel("relative difference\nfrom t5x_lite, float32")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def settings_agree(out: pathlib.Path, settings: Mapping[str, object]) -> None:
    """Writes the settings that all runs of `out` share. Raises ValueError where `out` holds runs with others."""
    file = out / "settings.json"
    if not file.exists():
        file.write_text(json.dumps(settings, indent=1) + "\n")
    elif (there := json.loads(file.read_text())) != settings:
        differing = ", ".join(f"{k} = {there.get(k)!r}, not {v!r}" for k, v in settings.items() if there.get(k) != v)
        raise ValueError(f"{out} holds runs with {differing}: name another --out")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="the Python of torch and transformers; without it that side is left out")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "curve", metavar="DIR")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--optimizer", default="adafactor,adamw", help="one or both, with a comma")
    parser.add_argument("--sides", default="torch,float32,bfloat16", help=f"of {', '.join(SIDES)}, with commas")
    parser.add_argument("--model", default="t5_1_1/small", help="of gin_configs/models/, started at random")
    parser.add_argument("--start", type=pathlib.Path, metavar="DIR", help="a Hugging Face folder to start from instead")
    parser.add_argument("--save_every", type=int, default=50, help="steps between saved states; 0: only at the end")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args(arguments)
    out, optimizers, sides = args.out.resolve(), args.optimizer.split(","), args.sides.split(",")
    if not (set(optimizers) <= set(OPTIMIZERS) and set(sides) <= set(SIDES)):
        parser.error(f"--optimizer is of {', '.join(OPTIMIZERS)}, --sides of {', '.join(SIDES)}")
    out.mkdir(parents=True, exist_ok=True)
    start = args.start.resolve() if args.start else out / "start"
    try:
        settings_agree(out, {"batch_size": args.batch_size, "start": str(args.start and start) or args.model})
    except ValueError as error:
        parser.error(str(error))
    ours = str(ROOT / "benchmarks" / "curve_ours.py")
    common = [f"--out={out}", f"--start={start}", f"--steps={args.steps}", f"--save_every={args.save_every}"]
    if _call(sys.executable, ours, *common, f"--model={args.model}", f"--batch_size={args.batch_size}"):
        return 1
    for optimizer in optimizers:
        for side in sides:
            by_torch = side in TORCH_SIDES
            if len(Run(out, optimizer, side).losses()) >= args.steps or (by_torch and not args.torch):
                continue
            if side == "torch_exact_rms" and optimizer != "adafactor":
                continue
            script = (args.torch, str(ROOT / "benchmarks" / "curve_torch.py")) if by_torch else (sys.executable, ours)
            if _call(*script, *common, f"--optimizer={optimizer}", f"--side={side}"):
                return 1
    runs = [Run(out, optimizer, side) for optimizer in OPTIMIZERS for side in SIDES]
    runs = [run for run in runs if run.log.exists()]
    table = summary(runs)
    (out / "summary.md").write_text(table)
    print(table, end="")
    if runs:
        draw(runs, out / "curves.png")
    return int(not agree(out, optimizers, args.tolerance))


def agree(out: pathlib.Path, optimizers: Sequence[str], tolerance: float) -> bool:
    """Says how far torch and float32 are apart, and returns whether that is within the tolerance; True without both."""
    within = True
    for optimizer in optimizers:
        different = relative_differences(*(Run(out, optimizer, side).losses() for side in ("torch", REFERENCE)))
        if different:
            largest = max(different.values())
            print(f"{optimizer}: torch and float32 differ by {largest:.1e} at most, in {len(different)} steps")
            within &= largest <= tolerance
    return within


def _call(*command: str) -> int:
    """Runs a Python script from the repository's root; returns its exit status."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
