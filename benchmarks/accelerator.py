"""Measures all that an accelerator can tell, within a few minutes, and appends it to DIR/results.jsonl.

    python benchmarks/accelerator.py --out=DIR [--minutes=8] [--only=PART,PART] [--toy]
    python benchmarks/accelerator.py --summary DIR      prints the table for RESULTS.md, and writes DIR/summary.md

The parts, the most valuable first:

    device          driver, versions, memory, peak bfloat16 matrix rate
    parity          every attention implementation against XLA's in float32; three optimizer steps against a CPU's
    train           the training step: every size at the largest batch that fits, scanned and unrolled, ...
    torch_train     Hugging Face's torch T5 on the same shapes, where torch is
    decode          greedy and beam-4 decoding;   torch_decode: torch's
    checkpoints     saves and restores of the large model's state; how long a save holds the step up
    profile         a trace of the large model's step, its ten costliest operations as text
    plan            what --mode=plan says of the steps measured; needs no accelerator and may be run later

Each part has a process of its own, which is killed at its time limit: a share of what is left of --minutes, to which
comes what earlier parts did not use. Each measurement is a line as soon as there is one. Give the command again to
resume: what has been measured is not measured again, what failed is tried once more. A part that fails says so in its
line. What the parts print is in DIR/logs.

Needs jax, flax, optax, orbax-checkpoint, numpy, absl-py and tqdm. One device is measured. --toy measures tiny sizes on
a CPU, to test all this. --write_cpu_values computes the values of the optimizer steps anew.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.accelerator_parts import child, summary  # noqa: E402
from benchmarks.accelerator_parts.results import TIME_LIMIT, Results  # noqa: E402

LEAST_SECONDS = 30.0  # of a part's limit, as long as so much is left: starting and compiling take most of it
MEMORY_FRACTION = "0.92"  # of a GPU's memory, which JAX takes at the start; its own default is 0.75


@dataclasses.dataclass(frozen=True)
class Part:
    """One part, in `module`. seconds: what it should take, of eight minutes; the limits keep the proportions."""

    name: str
    module: str
    seconds: float
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


PACKAGE = "benchmarks.accelerator_parts"
PARTS = (
    Part("device", f"{PACKAGE}.device", 40),
    Part("parity", f"{PACKAGE}.parity", 60),
    Part("train", f"{PACKAGE}.train", 180),
    Part("torch_train", f"{PACKAGE}.torch_train", 75),
    Part("decode", f"{PACKAGE}.decoding", 45),
    Part("torch_decode", f"{PACKAGE}.torch_decoding", 25),
    Part("checkpoints", f"{PACKAGE}.saves", 30),
    Part("profile", f"{PACKAGE}.trace", 20),
    Part("plan", f"{PACKAGE}.planning", 20, {"JAX_PLATFORMS": "cpu"}),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", metavar="PART", help=f"{', '.join(part.name for part in PARTS)}; several with commas")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--summary", type=Path, metavar="DIR")
    parser.add_argument("--write_cpu_values", action="store_true")
    for name in ("child", "module", "run"):  # how the command starts its own processes
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.summary:
        return summary.write(args.summary)
    if args.write_cpu_values:
        child.use_stand_ins()
        from benchmarks.accelerator_parts import three_steps

        three_steps.write()
        return 0
    if args.out is None:
        parser.error("--out=DIR is needed")
    if args.child:
        child.end_with_parent(args.parent)
        child.use_stand_ins()
        settings = child.Settings(args.out, args.toy, Results(args.out, args.run))
        return child.run(args.child, args.module, settings)
    wanted = args.only.split(",") if args.only else [part.name for part in PARTS]
    if unknown := set(wanted) - {part.name for part in PARTS}:
        parser.error(f"--only={unknown.pop()}: the parts are {', '.join(part.name for part in PARTS)}")
    run_parts([part for part in PARTS if part.name in wanted], args.out, 60 * args.minutes, args.toy)
    return 0


def run_parts(parts: Sequence[Part], out: Path, seconds: float, toy: bool) -> None:
    """Runs the parts one after the other; returns when all have ended, or `seconds` are over."""
    end = time.monotonic() + seconds
    (out / "logs").mkdir(parents=True, exist_ok=True)
    results = Results(out, datetime.datetime.now().isoformat())
    results.repair()
    for number, part in enumerate(parts):
        left = end - time.monotonic()
        share = part.seconds / sum(later.seconds for later in parts[number:])
        limit = min(max(left * share, LEAST_SECONDS), left)
        print(f"{part.name}: at most {max(limit, 0):.0f} s", flush=True)
        run_part(part, results, limit, toy)
        lines = [line for line in results.lines(part.name) if line["run"] == results.run and "started" not in line]
        errors = [line["error"] for line in lines if "error" in line]
        print(
            f"{part.name}: {len(lines) - len(errors)} lines, {len(errors)} errors", *errors[:3], sep="\n  ", flush=True
        )


def run_part(part: Part, results: Results, limit: float, toy: bool) -> None:
    """Runs one part, in one process after another if it asks for that or if one crashes, for `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        left = end - time.monotonic()
        code = run_child(part, results, left, toy) if left > 0 else None
        key = results.running(part.name)
        if code is None:
            results.append(part.name, key, error=TIME_LIMIT, limit_seconds=round(limit))
            return
        if code not in (0, child.MORE):
            results.append(part.name, key, error=crash(code, log_file(part, results)))
            if key is None:
                return
        elif code != child.MORE:
            return


def run_child(part: Part, results: Results, seconds: float, toy: bool) -> int | None:
    """Returns the exit code of a process of `part`, or None: it was killed after `seconds`, with its own children."""
    command = [sys.executable, str(Path(__file__).resolve()), f"--child={part.name}", f"--module={part.module}"]
    command += [f"--out={results.folder}", f"--run={results.run}", f"--parent={os.getpid()}", *(["--toy"] * toy)]
    with log_file(part, results).open("ab") as log:
        process = subprocess.Popen(
            command,
            env=environment(part, results, toy),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # compilers' workers, too
            process.wait()


def environment(part: Part, results: Results, toy: bool) -> dict[str, str]:
    """Compiled programs are kept in DIR, so that a second run has them; what the user has set is left as it is."""
    defaults = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION,
        "JAX_COMPILATION_CACHE_DIR": str((results.folder / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str((results.folder / "compiled" / "torch").absolute()),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TOKENIZERS_PARALLELISM": "false",
    }
    toy_defaults = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if toy else {}  # nearly all of its time goes to compiling
    return {**defaults, **toy_defaults, **os.environ, **part.environment}


def log_file(part: Part, results: Results) -> Path:
    return results.folder / "logs" / f"{part.name}.log"


def crash(code: int, log: Path) -> str:
    """Describes a process that ended without saying why: its exit code or signal, and the last of what it printed."""
    end = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    return f"the process ended with {end}: {' '.join(last)}"[:500]


if __name__ == "__main__":
    sys.exit(main())
