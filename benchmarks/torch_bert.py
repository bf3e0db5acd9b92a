"""Fine-tunes a BERT with transformers' Trainer, to compare with run.py; prints one JSON line. See `transfer.py`.

    python benchmarks/torch_bert.py MODEL ROWS.npz --steps=344 --learning_rate=5e-5 --warmup_steps=34 --seed=0 ...

Runs in an environment of its own (`pip install torch transformers accelerate`). MODEL is a Hugging Face folder; ROWS
is a file of `transfer_rows.py`. Differences from run.py on runs/finetune_bert.gin that remain are in `transfer.py`.
With --check it only compares the ids of MODEL's own tokenizer with those of the dev rows.
"""

import argparse
import json
import re
import tempfile
import time
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Rows(torch.utils.data.Dataset):
    """Rows of `inputs`, each as wide as `widths` says for the batch that it is in."""

    def __init__(self, inputs: np.ndarray, segments: np.ndarray, label: np.ndarray, widths: np.ndarray):
        self.inputs, self.segments, self.label, self.widths = inputs, segments, label, widths

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = torch.from_numpy(self.inputs[i, : self.widths[i]].astype(np.int64))
        segments = torch.from_numpy(self.segments[i, : self.widths[i]].astype(np.int64))
        mask = (tokens != 0).long()
        return {"input_ids": tokens, "token_type_ids": segments, "attention_mask": mask, "labels": self.label[i]}


class Clock(TrainerCallback):
    """The seconds at which each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def widths_of_dev(inputs: np.ndarray, batch_size: int) -> np.ndarray:
    """Each batch of dev rows is padded to its longest row."""
    lengths = (inputs != 0).sum(axis=1)
    longest = [lengths[i : i + batch_size].max() for i in range(0, len(lengths), batch_size)]
    return np.repeat(longest, batch_size)[: len(lengths)]


def make_model(folder: str, num_labels: int, seed: int, trainable: str) -> BertForSequenceClassification:
    """MODEL with a new head, whose kernel is drawn from run.py's distribution; `trainable` matches what trains."""
    set_seed(seed)
    model = BertForSequenceClassification.from_pretrained(
        folder,
        num_labels=num_labels,
        problem_type="regression" if num_labels == 1 else "single_label_classification",
        dtype=torch.float32,
    )
    torch.nn.init.trunc_normal_(model.classifier.weight, std=0.02, a=-0.04, b=0.04)
    torch.nn.init.zeros_(model.classifier.bias)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(trainable, name) is not None)
    return model


def check(folder: str, rows: Any) -> dict[str, int]:
    """How many dev rows have other ids or segments than MODEL's tokenizer gives."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length, differing = rows["dev_inputs"].shape[1], 0
    texts = zip(rows["dev_first"].tolist(), rows["dev_second"].tolist(), strict=True)
    for (first, second), ids, segments in zip(texts, rows["dev_inputs"], rows["dev_segments"], strict=True):
        pair = (first, second) if second else (first,)
        theirs = tokenizer(*pair, truncation="longest_first", max_length=length, return_token_type_ids=True)
        width = len(theirs["input_ids"])
        same = theirs["input_ids"] == ids[:width].tolist() and not ids[width:].any()
        differing += not (same and theirs["token_type_ids"] == segments[:width].tolist())
    return {"dev_rows": len(rows["dev_label"]), "differing": differing}


def train(args: argparse.Namespace, rows: Any) -> dict[str, Any]:
    is_number = args.num_labels == 1
    label = (rows["train_label"].astype(np.float32 if is_number else np.int64)).tolist()
    dev_label = (rows["dev_label"].astype(np.float32 if is_number else np.int64)).tolist()
    widths = np.repeat(rows["widths"], args.batch_size)
    train_rows = Rows(rows["train_inputs"], rows["train_segments"], label, widths)
    dev_widths = widths_of_dev(rows["dev_inputs"], args.batch_size)
    dev_rows = Rows(rows["dev_inputs"], rows["dev_segments"], dev_label, dev_widths)
    model = make_model(args.model, args.num_labels, args.seed, args.trainable)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=args.batch_size,
                train_sampling_strategy="sequential",  # the rows are in the order of run.py's batches
                learning_rate=args.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=args.warmup_steps,
                weight_decay=0.01,
                adam_beta1=0.9,
                adam_beta2=0.999,
                adam_epsilon=1e-6,
                max_grad_norm=1.0,
                seed=args.seed,
                save_strategy="steps",
                save_steps=args.steps,  # one checkpoint at the end, as run.py leaves
                logging_steps=max(args.steps // 10, 1),
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=train_rows,
            callbacks=[clock],
        )
        trainer.train()
        outputs = trainer.predict(dev_rows).predictions
    predictions = outputs[:, 0] if is_number else outputs.argmax(axis=-1)
    return {
        "predictions": predictions.tolist(),
        "targets": dev_label,
        "train_seconds": round(clock.ends[-1] - clock.ends[0], 2),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "threads": torch.get_num_threads(),
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--warmup_steps", type=int)
    parser.add_argument("--num_labels", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainable", default=".", help="regular expression of the names that train")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    with np.load(args.rows, allow_pickle=False) as file:
        rows = dict(file)
    print(json.dumps(check(args.model, rows) if args.check else train(args, rows)))


if __name__ == "__main__":
    main()
