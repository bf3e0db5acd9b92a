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
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
METHODS = {"greedy": 1, "beam": 4}


def inputs(args: argparse.Namespace) -> np.ndarray:
    return np.random.default_rng(0).integers(2, 32000, (args.batch_size, args.inputs))


def make_model(folder: pathlib.Path, seed: int) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from train_step import model_config

    from t5x_lite.convert import huggingface
    from t5x_lite.model import T5

    config = model_config("t5_1_1/small")
    token = jnp.ones((1, 1), jnp.int32)
    params = nn.meta.unbox(jax.jit(T5(config).init)(jax.random.key(seed), token, token))["params"]
    kernel = params["decoder"]["logits_dense"]["kernel"]
    params["decoder"]["logits_dense"]["kernel"] = kernel.at[:, :2].set(0.0)  # neither padding nor the end
    huggingface.write(folder, config, params)


def generate_here(args: argparse.Namespace):
    sys.path.insert(0, str(ROOT))
    import jax

    from t5x_lite.load import LoadedModel, load

    model, rows = load(args.model), inputs(args).astype(np.int32)
    assert isinstance(model, LoadedModel)

    def generate(method: Any, tokens: int) -> np.ndarray:
        found, _ = model.generate(rows, method=method, beam_size=METHODS[method], max_length=tokens)
        return jax.device_get(found)[:, 0]

    return generate


def generate_in_torch(args: argparse.Namespace):
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import T5ForConditionalGeneration  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = T5ForConditionalGeneration.from_pretrained(args.model).eval()
    rows = torch.from_numpy(inputs(args))

    def generate(method: Any, tokens: int) -> np.ndarray:
        options = {"num_beams": METHODS[method], "max_new_tokens": tokens, "do_sample": False, "length_penalty": 0.6}
        with torch.inference_mode():
            found = model.generate(rows, attention_mask=torch.ones_like(rows), **options)
        return found[:, 1:].numpy()

    return generate


def time_calls(args: argparse.Namespace) -> dict:
    generate = {"t5x_lite": generate_here, "torch": generate_in_torch}[args.side](args)
    times: dict[str, Any] = {}
    for name, tokens in (("one", 1), ("all", args.tokens)):
        generate(args.method, tokens)
        started = time.perf_counter(), time.process_time()
        times["tokens"] = generate(args.method, tokens).tolist()
        times[name] = time.perf_counter() - started[0]
        times[f"cpu_{name}"] = time.process_time() - started[1]
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
        print(json.dumps(time_calls(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            args.model = folder
            make_model(pathlib.Path(folder), seed=0)
        for method in [args.method] if args.method else METHODS:
            print(json.dumps(compare(args, method)), flush=True)


if __name__ == "__main__":
    main()
