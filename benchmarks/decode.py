"""Times decoding against Hugging Face's torch T5, and prints one JSON line for each method.

    python benchmarks/decode.py --torch=/path/to/an/environment/bin/python

Both read one Hugging Face directory with a T5 1.1 small of random weights (in which the end token never wins, so that
all rows are decoded to `--tokens`), float32, the same threads and full rows of inputs. Each call runs in a process of
its own, ours and theirs by turns; seconds are of whole calls, encoder included, medians of `--rounds` after one call to
warm up. `ms_per_token` is what a further token costs: the difference to a call that decodes one. `cpu_*` is the same in
the time that its threads ran, which on a machine that others use says more: give it one core (`taskset -c 0`). Without
`--torch` (pip install torch transformers safetensors) only ours is timed. The results of both are compared.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
METHODS = {"greedy": 1, "beam": 4}
Generate = Callable[[Any, int], np.ndarray]


def input_rows(batch_size: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(2, 32000, (batch_size, length))


def random_params(config: Any, seed: int) -> dict[str, Any]:
    """Random parameters of a T5 in which neither padding nor the end token ever wins."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from t5x_lite.model.t5 import T5

    token = jnp.ones((1, 1), jnp.int32)
    params = nn.meta.unbox(jax.jit(T5(config).init)(jax.random.key(seed), token, token))["params"]
    kernel = params["decoder"]["logits_dense"]["kernel"]
    params["decoder"]["logits_dense"]["kernel"] = kernel.at[:, :2].set(0.0)
    return params


def make_model(folder: pathlib.Path, seed: int) -> None:
    """Writes a T5 1.1 small of random weights as a Hugging Face directory."""
    from benchmarks.train_step import model_config
    from t5x_lite.convert import huggingface

    config = model_config("t5_1_1/small")
    huggingface.write(folder, config, random_params(config, seed))


def generator(model: Any, rows: np.ndarray) -> Generate:
    """Returns a function (method, number of tokens) -> tokens [B, T] of a `LoadedModel`."""
    import jax

    def generate(method: Any, tokens: int) -> np.ndarray:
        tokens_BNT, _ = model.generate(
            rows.astype(np.int32), method=method, beam_size=METHODS[method], max_length=tokens
        )
        return jax.device_get(tokens_BNT)[:, 0]

    return generate


def torch_generator(model: Any, rows: np.ndarray) -> Generate:
    """Returns the same of a Hugging Face model, on whatever device the model is."""
    import torch  # pyright: ignore[reportMissingImports]

    inputs = torch.from_numpy(rows).to(model.device)

    def generate(method: Any, tokens: int) -> np.ndarray:
        options = {"num_beams": METHODS[method], "max_new_tokens": tokens, "do_sample": False, "length_penalty": 0.6}
        with torch.inference_mode():
            tokens_BT = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        return tokens_BT[:, 1:].cpu().numpy()

    return generate


def load_generator(args: argparse.Namespace) -> Generate:
    """Loads `args.model` into the library that `args.side` names."""
    rows = input_rows(args.batch_size, args.inputs)
    if args.side == "t5x_lite":
        from t5x_lite.inference.pretrained import load

        return generator(load(args.model), rows)
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import T5ForConditionalGeneration  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch_generator(T5ForConditionalGeneration.from_pretrained(args.model).eval(), rows)


def time_calls(generate: Generate, method: str, tokens: int, calls: int = 1) -> dict[str, Any]:
    """Returns the seconds of each of `calls` calls, after one that is not timed, their CPU seconds, and the tokens."""
    seconds, cpu_seconds = [], []
    result = generate(method, tokens)
    for _ in range(calls):
        started = time.perf_counter(), time.process_time()
        result = generate(method, tokens)
        seconds.append(time.perf_counter() - started[0])
        cpu_seconds.append(time.process_time() - started[1])
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": result}


def time_side(args: argparse.Namespace) -> dict[str, Any]:
    """Times one side's call for a single token and for all of them."""
    generate = load_generator(args)
    times: dict[str, Any] = {}
    for name, tokens in (("one", 1), ("all", args.tokens)):
        result = time_calls(generate, args.method, tokens)
        times |= {name: result["seconds"][0], f"cpu_{name}": result["cpu_seconds"][0]}
        times["tokens"] = result["tokens"].tolist()
    return times


def compare(args: argparse.Namespace, method: str) -> dict:
    sides = {"t5x_lite": sys.executable} | ({"torch": args.torch} if args.torch else {})
    runs = {side: [] for side in sides}
    shape = [f"--{name}={getattr(args, name)}" for name in ("batch_size", "inputs", "tokens", "model")]
    for _ in range(args.rounds):
        for side, python in sides.items():
            command = [python, __file__, f"--side={side}", f"--method={method}", *shape]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    said = {"method": method, "batch_size": args.batch_size, "inputs": args.inputs, "tokens": args.tokens}
    for side, results in runs.items():
        said[side] = {"seconds": [round(run["all"], 3) for run in results]}
        for kind in ("", "cpu_"):
            seconds = statistics.median(run[f"{kind}all"] for run in results)
            each = statistics.median((run[f"{kind}all"] - run[f"{kind}one"]) / (args.tokens - 1) for run in results)
            said[side][f"{kind}tokens_per_second"] = round(args.batch_size * args.tokens / seconds, 1)
            said[side][f"{kind}ms_per_token"] = round(1000 * each, 1)
    if args.torch:
        for kind in ("", "cpu_"):
            rates = [said[side][f"{kind}tokens_per_second"] for side in ("t5x_lite", "torch")]
            said[f"{kind}times_faster"] = round(rates[0] / rates[1], 2)
        ours, theirs = (np.asarray(runs[side][0]["tokens"]) for side in ("t5x_lite", "torch"))
        said["tokens_equal"] = float(np.mean(ours == theirs))
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="Python of an environment with torch and transformers")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--model", help="a Hugging Face directory instead of random weights")
    parser.add_argument("--side", choices=["t5x_lite", "torch"], help="time one side here, once")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(time_side(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            args.model = folder
            make_model(pathlib.Path(folder), seed=0)
        for method in [args.method] if args.method else METHODS:
            print(json.dumps(compare(args, method)), flush=True)


if __name__ == "__main__":
    main()
