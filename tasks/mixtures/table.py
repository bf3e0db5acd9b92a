"""The share, passes over the data and tokens of each task of a mixture, as rows and as text.

Must not depend on mixing strategies.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import seqio

from tasks.errors import UserError

# T5's fine-tuning: 2^18 steps of 128 examples.
STEPS = 2**18
BATCH = 128
LENGTHS = {"inputs": 512, "targets": 114}
_MEASURED = 2_000  # examples for the mean length


@dataclasses.dataclass(frozen=True)
class Row:
    """One task of a mixture. `examples` and `passes`, `tokens` and `token_share` are None if unknown."""

    task: str
    examples: int | None
    rate: float
    share: float  # of the sampled examples
    passes: float | None  # over the task's examples, in all steps
    tokens: float | None  # mean per example, inputs and targets together
    token_share: float | None  # of the sampled tokens; known if `tokens` of every task is known


def rows(
    rates: Mapping[str, float],
    examples: Mapping[str, int | None],
    steps: int = STEPS,
    batch: float = BATCH,
    tokens: Mapping[str, float] | None = None,
) -> list[Row]:
    """Return a row for each task with a rate above 0, the largest first.

    Args:
      rates: task -> mixing rate, on any scale.
      examples: task -> number of training examples, None if unknown.
      steps, batch: number of sampled examples, the packed ones counted.
      tokens: task -> mean tokens per example.
    """
    drawn = {task: rate for task, rate in rates.items() if rate}
    total, tokens = sum(drawn.values()), tokens or {}
    all_tokens = sum(rate * tokens[task] for task, rate in drawn.items()) if drawn.keys() <= tokens.keys() else None

    def row(task: str, rate: float) -> Row:
        count = examples[task]
        return Row(
            task=task,
            examples=count,
            rate=rate,
            share=rate / total,
            passes=rate / total * steps * batch / count if count else None,
            tokens=tokens.get(task),
            token_share=rate * tokens[task] / all_tokens if all_tokens else None,
        )

    return sorted((row(task, rate) for task, rate in drawn.items()), key=lambda row: -row.share)


def mean_tokens(task: str, examples: int = _MEASURED, lengths: Mapping[str, int] = LENGTHS) -> float:
    """Return the mean tokens of the task's training examples: the sum of `mean_lengths`."""
    return sum(mean_lengths(task, examples, lengths).values())


def mean_lengths(task: str, examples: int, lengths: Mapping[str, int]) -> dict[str, float]:
    """Return the mean tokens of each feature of the task's training examples, with EOS, truncated to `lengths`.

    Reads the task's data with the current vocabulary, and raises their errors.
    """
    dataset = seqio.TaskRegistry.get(task).get_dataset(lengths, "train", shuffle=True, seed=0)
    sizes = [
        [len(example.get(feature, ())) for feature in lengths]
        for example in itertools.islice(dataset.as_numpy_iterator(), examples)  # pyright: ignore[reportArgumentType]
    ]
    if not sizes:
        raise UserError(f"task {task} has no examples for lengths {dict(lengths)}")
    return {
        feature: sum(column) / len(sizes) for feature, column in zip(lengths, zip(*sizes, strict=True), strict=True)
    }


def to_text(table: list[Row]) -> str:
    """Format the rows as a table with a line of sums."""
    sums = Row(
        task="all",
        examples=sum(row.examples for row in table if row.examples is not None)
        if _all_known(table, "examples")
        else None,
        rate=sum(row.rate for row in table),
        share=1.0,
        passes=None,
        tokens=sum(row.share * row.tokens for row in table if row.tokens is not None)
        if _all_known(table, "tokens")
        else None,
        token_share=1.0,
    )
    digits = 0 if all(row.rate == int(row.rate) for row in table) else 4
    cells = [
        ["task", "examples", "rate", "share", "passes"],
        *(_cells(row, digits) for row in table),
        [*_cells(sums, digits)[:4], ""],
    ]
    if any(row.tokens is not None for row in table):
        for line, row in zip(cells, [None, *table, sums], strict=True):
            line += ["tokens/example", "token share"] if row is None else _token_cells(row)
        if not _all_known(table, "tokens"):
            cells[-1][-2:] = ["", ""]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _all_known(table: list[Row], field: str) -> bool:
    return all(getattr(row, field) is not None for row in table)


def _cells(row: Row, digits: int) -> list[str]:
    examples = "?" if row.examples is None else f"{row.examples:,}"
    passes = "?" if row.passes is None else f"{row.passes:,.1f}" if row.passes >= 1 else f"{row.passes:.2g}"
    return [
        row.task,
        examples,
        f"{row.rate:,.{digits}f}",
        f"{row.share:.2%}",
        passes,
    ]


def _token_cells(row: Row) -> list[str]:
    return [
        "?" if row.tokens is None else f"{row.tokens:.1f}",
        "?" if row.token_share is None else f"{row.token_share:.2%}",
    ]
