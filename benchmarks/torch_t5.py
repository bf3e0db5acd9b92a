"""The same training step in Hugging Face's torch T5, to compare with `train_step.py`; prints one JSON line.

Runs in an environment of its own (`pip install torch transformers`), on the same shape, threads and batch: T5 1.1
small, float32, dropout 0, cross entropy over all targets, AdamW.
"""

import argparse
import json
import resource
import statistics
import time

import torch
from transformers import T5Config, T5ForConditionalGeneration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=114)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    # Some releases tie the output of any model that is built from a config: untie it, as T5 1.1 is.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * config.d_model**-0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = torch.randint(2, config.vocab_size, (args.batch_size, args.inputs))
    labels = torch.randint(2, config.vocab_size, (args.batch_size, args.targets))
    seconds, losses = [], []
    for _ in range(args.steps + 2):
        started = time.perf_counter()
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[2:])
    print(
        json.dumps(
            vars(args)
            | {
                "threads": torch.get_num_threads(),
                "parameters": sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()),
                "step_seconds": round(median, 5),
                "step_seconds_all": [round(s, 5) for s in seconds[2:]],
                "tokens_per_second": round(args.batch_size * (args.inputs + args.targets) / median),
                "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
                "first_loss": losses[0],
                "last_loss": losses[-1],
            }
        )
    )


if __name__ == "__main__":
    main()
