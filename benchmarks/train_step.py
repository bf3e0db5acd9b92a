"""Times the training step on synthetic batches, and prints one JSON line.

    python benchmarks/train_step.py --model=t5_1_1/small --batch_size=8 --dtype=float32

The step is the one that `run.py` runs: Adafactor, z-loss, gradients and all. Batches are full rows of random tokens,
so that no time goes to padding; `--packed` splits each row into two segments. Needs neither TensorFlow nor gin: it
reads the sizes out of `gin_configs/models/`. Seconds are medians over `--steps` steps, after two that are not counted;
`temporaries_gb` is what the compiler set aside on each device for activations and the like.

What memory costs in time, each setting in a process of its own, so that peaks are its own:

    for remat in none minimal full; do for parts in 1 2 4; do
        python benchmarks/train_step.py --remat=$remat --microbatches=$parts
    done; done | tee sweep.jsonl

and with `--attention` likewise: batch, rows, flash or cudnn; with `--adapt`, what training a part of the model saves:
full, adapters, lora, bias_norm or frozen_encoder, of gin_configs/adapt/ (`model_flops_per_step` is the whole's).
"""

import argparse
import ast
import json
import pathlib
import re
import resource
import statistics
import sys
import time
from typing import Any, get_args

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from t5x_lite import logs, optim, sharding, step  # noqa: E402
from t5x_lite.attention import Implementation  # noqa: E402
from t5x_lite.losses import LossConfig  # noqa: E402
from t5x_lite.model import T5Config  # noqa: E402
from t5x_lite.trainable import Trainable  # noqa: E402


def said(file: str) -> dict[str, Any]:
    """The plain values of T5Config, and the macros, in a file of gin_configs/."""
    text = (ROOT / "gin_configs" / f"{file}.gin").read_text()
    found = re.findall(r"^\s*(?:T5Config\.)?([A-Za-z_]+) = ([^%@\n]+)$", text, re.MULTILINE)
    return {key: ast.literal_eval(value.strip()) for key, value in found}


def model_config(name: str, **options) -> T5Config:
    """The published size `name` ("t5_1_1/small"), as its gin file says it."""
    return T5Config(**said(f"models/{name}") | options)


def synthetic_batch(args: argparse.Namespace, vocab_size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return random.integers(2, vocab_size, (args.batch_size, length), dtype=np.int32)

    targets = tokens(args.targets)
    batch = {
        "encoder_input_tokens": tokens(args.inputs),
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": np.ones_like(targets),
    }
    if args.packed:
        for side, length in (("encoder", args.inputs), ("decoder", args.targets)):
            segments = np.where(np.arange(length) < length // 2, 1, 2).astype(np.int32)
            batch[f"{side}_segment_ids"] = np.tile(segments, (args.batch_size, 1))
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="t5_1_1/small")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=114)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--dropout_rate", type=float, default=0.0)
    parser.add_argument("--remat", default="none", choices=["none", "minimal", "full"])
    parser.add_argument("--attention", choices=get_args(Implementation), help="default: by platform and shape")
    parser.add_argument("--adapt", default="full", choices=["full", "adapters", "lora", "bias_norm", "frozen_encoder"])
    parser.add_argument("--unroll", action="store_true", help="layers unrolled instead of scanned")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    for axis, size in (("data", -1), ("fsdp", 1), ("tensor", 1)):
        parser.add_argument(f"--{axis}", type=int, default=size)
    args = parser.parse_args()

    adapt = said(f"adapt/{args.adapt}")
    trainable = Trainable(adapt.pop("TRAINABLE"))
    config = model_config(
        args.model,
        **adapt,
        dtype=args.dtype,
        dropout_rate=args.dropout_rate,
        remat=args.remat,
        attention=args.attention,
        scan_layers=not args.unroll,
    )
    optimizer = optim.Optimizer(optim.adafactor(), optim.constant(1e-3), trainable=trainable)
    compiler = step.Compiler(sharding.make_mesh(args.data, args.fsdp, args.tensor))
    abstract = step.abstract_state(config, optimizer, compiler.mesh)
    train_step = compiler.train_step(
        abstract, config=config, optimizer=optimizer, loss=LossConfig(), num_microbatches=args.microbatches
    )
    state = step.init_state(config, optimizer, jax.random.key(0), abstract)
    batch = sharding.shard_batch(synthetic_batch(args, config.vocab_size), sharding.batch_sharding(compiler.mesh))
    key = jax.device_put(jax.random.key(1), compiler.replicated())

    started = time.perf_counter()
    train_step = train_step.lower(state, batch, key).compile()
    compile_seconds = time.perf_counter() - started
    seconds, losses = [], []
    for _ in range(args.steps + 2):
        started = time.perf_counter()
        state, metrics = train_step(state, batch, key)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[2:])
    flops = logs.flops_per_step(config, args.batch_size, args.inputs, args.targets)
    peak = logs.peak_flops(jax.devices()[0])
    memory = jax.devices()[0].memory_stats() or {}
    print(
        json.dumps(
            vars(args)
            | {
                "device": jax.devices()[0].device_kind,
                "devices": jax.device_count(),
                "parameters": step.param_count(state.params),
                "trained": trainable.count(state.params),
                "optimizer_mb": round(sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) / 2**20, 2),
                "step_seconds": round(median, 5),
                "step_seconds_all": [round(s, 5) for s in seconds[2:]],
                "tokens_per_second": round(args.batch_size * (args.inputs + args.targets) / median),
                "model_flops_per_step": flops,
                "mfu": round(flops / median / peak / jax.device_count(), 4) if peak else None,
                "compile_seconds": round(compile_seconds, 2),
                "temporaries_gb": round(train_step.memory_analysis().temp_size_in_bytes / 2**30, 3),
                "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
                "peak_device_gb": round(memory["peak_bytes_in_use"] / 2**30, 3) if memory else None,
                "first_loss": losses[0],
                "last_loss": losses[-1],
            }
        )
    )


if __name__ == "__main__":
    main()
