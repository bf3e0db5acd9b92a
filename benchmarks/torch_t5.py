"""The same training step in Hugging Face's torch T5, to compare with `train_step.py`; prints one JSON line.

Runs in an environment of its own (`pip install torch transformers`), on the same shape, threads and batch: T5 1.1
small, float32, dropout 0, cross entropy over all targets, AdamW. `benchmarks/accelerator.py` uses the functions below
on a GPU.
"""

import argparse
import json
import pathlib
import resource
import statistics
import sys
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5ForConditionalGeneration

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.sizes import gin_values


def make_model(sizes: dict[str, Any], attention: str | None = None) -> T5ForConditionalGeneration:
    """A T5 1.1 of random weights; `sizes` are fields of t5x_lite's T5Config, as a file of gin_configs/ has them."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=sizes["vocab_size"],
        d_model=sizes["d_model"],
        d_kv=sizes["head_dim"],
        d_ff=sizes["d_ff"],
        num_layers=sizes["num_encoder_layers"],
        num_decoder_layers=sizes["num_decoder_layers"],
        num_heads=sizes["num_heads"],
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    if attention is not None:
        config._attn_implementation = attention
    model = T5ForConditionalGeneration(config)
    # Some releases tie the output of any model that is built from a config: untie it, as T5 1.1 is.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * config.d_model**-0.5)
    return model


def matmul_rate(device: torch.device, size: int = 2048, calls: int = 5) -> float:
    """The FLOP/s of the fastest of some float32 products of square matrices, as in `train_step.matmul_rate`."""
    a = torch.randn(size, size, device=device)
    seconds = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def flops_of_step(model: T5ForConditionalGeneration, batch_size: int, inputs: int, targets: int) -> int:
    """The FLOPs of the step's matrix products, three times those of the forward pass; counted as PyTorch runs it."""
    fused = model.config._attn_implementation
    model.set_attn_implementation("eager")  # whose products are counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        input_ids, labels = (torch.full((batch_size, n), 2, device=model.device) for n in (inputs, targets))
        model(input_ids=input_ids, labels=labels)
    model.set_attn_implementation(fused)
    return 3 * counter.get_total_flops()


def measure(
    model: T5ForConditionalGeneration,
    *,
    batch_size: int,
    inputs: int,
    targets: int,
    steps: int = 5,
    steps_a_round: int = 1,
    autocast: torch.dtype | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Times training steps with AdamW on the model's device and returns what one JSON line holds.

    Args:
      steps: rounds that are timed, after two that are not.
      steps_a_round: steps that are launched before the last one's loss is fetched.
      autocast: dtype of activations where it is not the parameters'.
      backend: of torch.compile, through which the model's loss is run; None: not compiled.
    """
    device, vocab_size = model.device, model.config.vocab_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type == "cuda")
    input_ids = torch.randint(2, vocab_size, (batch_size, inputs), device=device)
    labels = torch.randint(2, vocab_size, (batch_size, targets), device=device)

    def compute_loss() -> torch.Tensor:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return model(input_ids=input_ids, labels=labels).loss

    rate = matmul_rate(device)
    loss_of_batch = torch.compile(compute_loss, backend=backend) if backend else compute_loss
    seconds, losses = [], []
    for _ in range(steps + 2):
        started = time.perf_counter()
        for _ in range(steps_a_round):
            loss = loss_of_batch()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append((time.perf_counter() - started) / steps_a_round)
    median = statistics.median(seconds[2:])
    rate = max(rate, matmul_rate(device))
    flops = flops_of_step(model, batch_size, inputs, targets)
    return {
        "threads": torch.get_num_threads(),
        "model_flops_per_step": flops,
        "matmul_flops_per_second": round(rate),
        "share_of_floor": round(flops / rate / median, 4),
        "parameters": sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()),
        "step_seconds": round(median, 5),
        "step_seconds_all": [round(s, 5) for s in seconds[2:]],
        "sequences_per_second": round(batch_size / median, 2),
        "tokens_per_second": round(batch_size * (inputs + targets) / median),
        "first_step_seconds": round(seconds[0], 2),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "peak_device_gb": round(torch.cuda.max_memory_allocated() / 2**30, 3) if device.type == "cuda" else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=114)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    model = make_model(gin_values("models/t5_1_1/small"))
    print(json.dumps(vars(args) | measure(model, **vars(args))))


if __name__ == "__main__":
    main()
