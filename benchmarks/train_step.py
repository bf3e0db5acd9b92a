"""Times the training step on synthetic batches, and prints one JSON line.

    python benchmarks/train_step.py --model=t5_1_1/small --batch_size=8 --dtype=float32

The step is the one that `run.py` runs: Adafactor, z-loss, gradients and all. Batches are full rows of random tokens,
so that no time goes to padding; `--packed` splits each row into two segments. Needs neither TensorFlow nor gin: it
reads the sizes out of `gin_configs/models/`. Seconds are medians over `--steps` steps, after two that are not counted;
`temporaries_gb` is what the compiler set aside on each device for activations and the like. `matmul_flops_per_second`
is what the device reaches in one large matrix product, the best of some before and after the steps; `share_of_floor` is
the step's matrix products at this rate, as a part of the step.

What memory costs in time, each setting in a process of its own, so that peaks are its own:

    for remat in none minimal full; do for parts in 1 2 4; do
        python benchmarks/train_step.py --remat=$remat --microbatches=$parts
    done; done | tee sweep.jsonl

and with `--attention` likewise: batch, blocks, flash or cudnn; with `--adapt`, what training a part of the model saves:
full, adapters, lora, bias_norm or frozen_encoder, of gin_configs/adapt/ (`model_flops_per_step` is the whole's).
`benchmarks/accelerator.py` uses the functions below on a GPU or TPU.
"""

import argparse
import dataclasses
import json
import math
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

from benchmarks.sizes import gin_values  # noqa: E402
from t5x_lite import plan, sharding  # noqa: E402
from t5x_lite.metrics import metric_logger  # noqa: E402
from t5x_lite.model import families  # noqa: E402
from t5x_lite.model.attention import Implementation  # noqa: E402
from t5x_lite.model.config import ModelConfig  # noqa: E402
from t5x_lite.training import optim, step  # noqa: E402
from t5x_lite.training.freezing import ALL_PARAMETERS, ParameterFilter  # noqa: E402
from t5x_lite.training.losses import LossConfig  # noqa: E402


class DoesNotFit(MemoryError):
    """The compiled step needs more memory than the device has."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a training batch; `packed` rows hold two examples each."""

    batch_size: int
    inputs: int = 512
    targets: int = 114
    packed: bool = False


def model_config(name: str, **options) -> Any:
    """Returns the published size `name` ("t5_1_1/small"), as its gin file has it."""
    text = (ROOT / "gin_configs" / "models" / f"{name}.gin").read_text()
    kind = re.search(r"^Run.model = @(\w+)\(\)", text, re.MULTILINE)
    return families.config_types()[kind[1] if kind else "T5Config"](**gin_values(f"models/{name}") | options)


def make_optimizer(trainable: ParameterFilter = ALL_PARAMETERS) -> optim.Optimizer:
    return optim.Optimizer(optim.adafactor(), optim.constant(1e-3), trainable=trainable)


def synthetic_batch(shape: Shape, vocab_size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return random.integers(2, vocab_size, (shape.batch_size, length), dtype=np.int32)

    targets = tokens(shape.targets)
    batch = {
        "encoder_input_tokens": tokens(shape.inputs),
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": np.ones_like(targets),
    }
    if shape.packed:
        for side, length in (("encoder", shape.inputs), ("decoder", shape.targets)):
            segments = np.where(np.arange(length) < length // 2, 1, 2).astype(np.int32)
            batch[f"{side}_segment_ids"] = np.tile(segments, (shape.batch_size, 1))
    return batch


class CompiledStep:
    """The training step, compiled for one shape before anything is put on the devices.

    memory: what the compiler allotted on each device, counted as `--mode=plan` counts it.
    compiler: of a mesh of one's own; None: the first device alone.
    fused_attention_calls: custom calls of a fused attention kernel in the program; 0 where XLA does it.

    Raises DoesNotFit: the program needs more than the device's memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: Shape,
        optimizer: optim.Optimizer | None = None,
        compiler: step.Compiler | None = None,
        microbatches: int = 1,
    ):
        self.config, self.shape = config, shape
        self._optimizer = optimizer or make_optimizer()
        self._compiler = compiler or step.Compiler(sharding.make_mesh(1, devices=jax.devices()[:1]))
        self.devices = self._compiler.mesh.size
        self.abstract = step.abstract_state(config, self._optimizer, self._compiler.mesh)
        batch_sharding = sharding.batch_sharding(self._compiler.mesh)
        self.batch = sharding.shard_batch(synthetic_batch(shape, config.vocab_size), batch_sharding)
        self.key = jax.device_put(jax.random.key(1), self._compiler.replicated())
        train_step = self._compiler.train_step(
            self.abstract, config=config, optimizer=self._optimizer, loss=LossConfig(), num_microbatches=microbatches
        )
        lowered = train_step.lower(self.abstract, self.batch, self.key)
        self.fused_attention_calls = sum(lowered.as_text().count(name) for name in ("cudnn$fmha", "tpu_custom_call"))
        started = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - started
        self.memory = plan.memory_of(self.compiled)
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
        if self.memory.needed > limit:
            raise DoesNotFit(f"{shape}: the step needs {self.memory.needed:,} bytes of {limit:,}")

    def init_state(self) -> step.TrainState:
        return step.init_state(self.config, self._optimizer, jax.random.key(0), self.abstract)

    def __call__(self, state: step.TrainState) -> tuple[step.TrainState, dict[str, jax.Array]]:
        return self.compiled(state, self.batch, self.key)


def matmul_rate(dtype: str, size: int = 2048, calls: int = 5) -> float:
    """Returns the FLOP/s of the fastest of some products of square matrices on the first device."""
    a = jax.device_put(np.random.default_rng(0).standard_normal((size, size), np.float32)).astype(dtype)
    product = jax.jit(lambda a, b: a @ b)
    seconds = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def measure(train_step: CompiledStep, *, steps: int = 5, seconds_a_round: float = 0.0) -> dict[str, Any]:
    """Times the step and returns what one JSON line holds.

    Args:
      steps: rounds that are timed, after two steps that are not.
      seconds_a_round: how long a round is to take: so many steps are launched one behind the other, as training
        launches them, before the last one's loss is fetched; 0: one step a round.
    """
    config, shape = train_step.config, train_step.shape
    state, losses, seconds = train_step.init_state(), [], []
    parameters = step.param_count(state.params)
    optimizer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    steps_a_round = 1
    rate = matmul_rate(config.dtype)
    for number in range(steps + 2):
        started = time.perf_counter()
        for _ in range(steps_a_round):
            state, metrics = train_step(state)
        losses.append(float(metrics["loss"]))
        seconds.append((time.perf_counter() - started) / steps_a_round)
        if number == 1:
            steps_a_round = max(math.ceil(seconds_a_round / seconds[-1]), 1)
    median = statistics.median(seconds[2:])
    lengths = {"inputs": shape.inputs, "targets": shape.targets}
    flops = families.model_of(config).flops(shape.batch_size, lengths)
    peak = metric_logger.peak_flops(jax.devices()[0])
    rate = max(rate, matmul_rate(config.dtype))
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "devices": train_step.devices,
        "parameters": parameters,
        "optimizer_mb": round(optimizer_bytes / 2**20, 2),
        "step_seconds": round(median, 5),
        "step_seconds_all": [round(s, 5) for s in seconds[2:]],
        "sequences_per_second": round(shape.batch_size / median, 2),
        "tokens_per_second": round(shape.batch_size * (shape.inputs + shape.targets) / median),
        "model_flops_per_step": flops,
        "matmul_flops_per_second": round(rate),
        "share_of_floor": round(flops / rate / median / train_step.devices, 4),
        "mfu": round(flops / median / peak / train_step.devices, 4) if peak else None,
        "compile_seconds": round(train_step.compile_seconds, 2),
        "temporaries_gb": round((train_step.memory.temporaries or 0) / 2**30, 3),
        "needed_gb": round(train_step.memory.needed / 2**30, 3),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "peak_device_gb": round(memory["peak_bytes_in_use"] / 2**30, 3) if memory else None,
        "fused_attention_calls": train_step.fused_attention_calls,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="t5_1_1/small")
    parser.add_argument("--vocab_size", type=int, help="default: the model's own")
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

    adapt = gin_values(f"adapt/{args.adapt}")
    trainable = ParameterFilter(adapt.pop("TRAINABLE"))
    config = model_config(
        args.model,
        **adapt,
        **({"vocab_size": args.vocab_size} if args.vocab_size else {}),
        dtype=args.dtype,
        dropout_rate=args.dropout_rate,
        remat=args.remat,
        attention=args.attention,
        scan_layers=not args.unroll,
    )
    train_step = CompiledStep(
        config,
        Shape(args.batch_size, args.inputs, args.targets, args.packed),
        make_optimizer(trainable),
        step.Compiler(sharding.make_mesh(args.data, args.fsdp, args.tensor)),
        args.microbatches,
    )
    trained = {"trained": trainable.count(train_step.abstract.params)}
    print(json.dumps(vars(args) | trained | measure(train_step, steps=args.steps)))


if __name__ == "__main__":
    main()
