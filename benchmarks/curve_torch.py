"""Hugging Face's torch T5 as one side of `curve.py`, which starts it in an environment with torch and transformers."""

import argparse
import os
import pathlib
import sys
import time

import torch
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration
from transformers.optimization import Adafactor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import curve


def load_model(start: pathlib.Path) -> T5ForConditionalGeneration:
    """The model in float32 and without dropout. Raises ValueError where a parameter is not as the file has it."""
    model = T5ForConditionalGeneration.from_pretrained(start, dtype=torch.float32, dropout_rate=0.0)
    stored = load_file(start / "model.safetensors")
    if "lm_head.weight" in stored:  # some releases tie it to the embeddings all the same
        model.lm_head.weight = torch.nn.Parameter(stored["lm_head.weight"].clone())
    loaded = model.state_dict()
    if wrong := [name for name, tensor in stored.items() if not torch.equal(loaded[name], tensor)]:
        raise ValueError(f"transformers reads these otherwise than {start} has them: {', '.join(wrong)}")
    return model.train()


class ExactRmsAdafactor(Adafactor):
    """transformers' Adafactor without the error of torch's norm, by which it scales steps.

    In float32 on a CPU that norm of the 16 million embeddings of T5 1.1 small is too small by 6e-4 [torch 2.13.0].
    """

    @staticmethod
    def _rms(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.square().mean().sqrt()


def make_optimizer(name: str, model: T5ForConditionalGeneration, exact_rms: bool) -> torch.optim.Optimizer:
    settings = curve.OPTIMIZERS[name]
    if name == "adafactor":
        return (ExactRmsAdafactor if exact_rms else Adafactor)(
            model.parameters(),
            lr=settings["learning_rate"],
            eps=(settings["epsilon1"], settings["epsilon2"]),
            clip_threshold=settings["clipping_threshold"],
            decay_rate=-settings["decay_rate"],
            beta1=None,
            weight_decay=0.0,
            scale_parameter=True,
            relative_step=False,
            warmup_init=False,
        )
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings["learning_rate"],
        betas=(settings["b1"], settings["b2"]),
        eps=settings["eps"],
    )


def train(run: curve.Run, start: pathlib.Path, steps: int, save_every: int) -> None:
    """Trains to `steps`, from the saved state or from `start`, and logs each step's loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(start).to(device)
    optimizer = make_optimizer(run.optimizer, model, exact_rms=run.side == "torch_exact_rms")
    saved, done = run.state / "state.pt", 0
    if saved.exists():
        state = torch.load(saved, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    run.state.mkdir(parents=True, exist_ok=True)
    run.rewind(done)
    for step, batch in zip(range(done + 1, steps + 1), curve.batches(run.out, done), strict=False):
        started = time.perf_counter()
        tokens = {name: torch.from_numpy(x).long().to(device) for name, x in batch.items()}
        output = model(
            input_ids=tokens["encoder_input_tokens"],
            attention_mask=(tokens["encoder_input_tokens"] != 0).long(),
            decoder_input_ids=tokens["decoder_input_tokens"],
            labels=tokens["decoder_target_tokens"].masked_fill(tokens["decoder_loss_weights"] == 0, -100),
            use_cache=False,
        )
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.append(step, output.loss.item(), time.perf_counter() - started)
        if step == steps or (save_every and step % save_every == 0):
            temporary = saved.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
            os.replace(temporary, saved)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--start", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save_every", type=int, required=True)
    parser.add_argument("--optimizer", choices=list(curve.OPTIMIZERS), required=True)
    parser.add_argument("--side", choices=curve.TORCH_SIDES, default="torch")
    args = parser.parse_args()
    train(curve.Run(args.out, args.optimizer, args.side), args.start, args.steps, args.save_every)


if __name__ == "__main__":
    main()
