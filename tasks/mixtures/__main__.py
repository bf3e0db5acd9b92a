"""Print the share, passes over the data and tokens of each task of a mixture.

    python -m tasks.mixtures glue_squad_proportional
    python -m tasks.mixtures c4_glue_squad --strategy=temperature --limit=2^21 --temperature=2 --plot=mix.png
    python -m tasks.mixtures glue_mnli_v002,glue_rte_v002,mine=5000 --strategy=equal --steps=10000 --batch=64

NAME is a registered mixture or task, one of the sets (glue_v002, glue_squad, c4_glue_squad), or a comma-separated list
of tasks, with =COUNT for those without a published number of examples. The exit code is 2 if NAME is unknown.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import get_args

import seqio
import tensorflow as tf

from tasks import mixtures
from tasks.errors import UserError
from tasks.mixtures import plot, table


def main(arguments: Sequence[str] | None = None) -> int:
    flags = _parser().parse_args(arguments)
    try:
        _show(flags)
    except (OSError, ValueError) as error:
        print(f"tasks.mixtures: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.mixtures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--strategy",
        choices=get_args(mixtures.Strategy),
        help="mixing strategy; default: registered rates for a registered mixture, else proportional",
    )
    parser.add_argument(
        "--limit", type=_number, metavar="K", help="artificial limit on a task's examples, such as 65536 or 2^16"
    )
    parser.add_argument(
        "--max_epochs", type=float, metavar="N", help="for --strategy=unimax: passes over a task at most (1)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="for --strategy=temperature")
    parser.add_argument(
        "--steps", type=_number, default=table.STEPS, metavar="N", help="(%(default)s, T5's fine-tuning)"
    )
    parser.add_argument(
        "--batch",
        type=_number,
        default=table.BATCH,
        metavar="B",
        help="examples per step, before packing (%(default)s)",
    )
    parser.add_argument(
        "--measure", action="store_true", help="read some examples of each task for its mean length and share of tokens"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="write a figure that compares the strategies")
    return parser


def _number(text: str) -> int:
    base, _, exponent = text.replace("**", "^").partition("^")
    value = int(base) ** int(exponent) if exponent else int(base)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def _show(flags: argparse.Namespace) -> None:
    rates, counts, description = _chosen(flags)
    tokens, unread = _measured(rates) if flags.measure else ({}, [])
    print(f"{flags.name}, {description}; passes over the data in {flags.steps:,} steps of {flags.batch:,} examples\n")
    print(table.to_text(table.rows(rates, counts, flags.steps, flags.batch, tokens)))
    print()
    if evaluated := [task for task, rate in rates.items() if not rate]:
        print(f"Evaluated, not trained on: {', '.join(evaluated)}.")
    if any(task.startswith("c4_") for task in rates):
        print("C4 is counted in documents; objectives split or join them, so its passes are approximate.")
    if not flags.measure:
        print("--measure reads some examples of each task and adds its share of tokens.")
    for line in unread:
        print(line)
    if flags.plot:
        examples = {task: count for task, count in counts.items() if rates[task] and count}
        if missing := [task for task, rate in rates.items() if rate and task not in examples]:
            raise UserError(f"cannot plot strategies without the number of examples of {', '.join(missing)}")
        total = sum(rates.values())
        shares = {task: rates[task] / total for task in examples}
        plot.draw(f"{flags.name}, {description}", examples, shares, flags.steps, flags.batch, flags.plot)
        print(f"Figure: {flags.plot}")


def _chosen(flags: argparse.Namespace) -> tuple[dict[str, float], dict[str, int | None], str]:
    """Return rates and numbers of examples by task, and a description of the strategy."""
    name = flags.name
    counts: dict[str, int | None]
    if name in seqio.MixtureRegistry.names():
        mixture = seqio.MixtureRegistry.get(name)
        rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
        counts = {task: _examples(task) for task in rates}
        if not flags.strategy:
            if flags.limit or flags.temperature != 1:
                raise UserError(f"{name} is registered with its rates: --limit and --temperature need a --strategy")
            return rates, counts, "as registered"
        counts = {task: counts[task] for task, rate in rates.items() if rate}
    else:
        counts = _listed(name)
    if unknown := [task for task, count in counts.items() if count is None]:
        raise UserError(f"no number of examples is known for {', '.join(unknown)}: give TASK=COUNT in a list")
    strategy = flags.strategy or "proportional"
    examples = {task: float(count) for task, count in counts.items() if count is not None}
    budget = flags.steps * flags.batch if strategy == "unimax" else None
    settings = {"budget": budget, "max_epochs": flags.max_epochs}
    rates = mixtures.raw_rates(examples, strategy, flags.limit, flags.temperature, **settings)
    mixtures.rates(
        examples, strategy, flags.limit, flags.temperature, **settings
    )  # raises an error if all counts are 0
    limit = f", K = {flags.limit:,}" if flags.limit else ""
    return rates, counts, f"{strategy}{limit}" + (f", T = {flags.temperature:g}" if strategy == "temperature" else "")


def _listed(names: str) -> dict[str, int | None]:
    """Return the tasks of a set, or of a comma-separated list, with their numbers of examples."""
    counts: dict[str, int | None] = {}
    for item in mixtures.SETS.get(names, names.split(",")):
        task, equals, count = item.strip().partition("=")
        if equals and not count.isdigit():
            raise UserError(f"{item!r}: give a number of examples, as in {task}=5000")
        if not equals and mixtures.train_examples(task) is None and task not in seqio.TaskRegistry.names():
            candidates = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names(), *mixtures.SETS]
            near = difflib.get_close_matches(task, candidates, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"known sets: {', '.join(mixtures.SETS)}"
            raise UserError(f"no mixture, task or set is called {task!r}; {hint}")
        counts[task] = int(count) if equals else _examples(task)
    return counts


def _examples(task: str) -> int | None:
    """Return the published number of examples, else the source's count; None if its data cannot be read."""
    published = mixtures.train_examples(task)
    if published is not None:
        return published
    try:
        return seqio.TaskRegistry.get(task).num_input_examples("train")
    except (OSError, ValueError, tf.errors.OpError):
        return None


def _measured(rates: dict[str, float]) -> tuple[dict[str, float], list[str]]:
    """Return the mean tokens of each task that can be read, and a message for each that cannot."""
    tokens, unread = {}, []
    for task in (task for task, rate in rates.items() if rate):
        try:
            tokens[task] = table.mean_tokens(task)
        except (OSError, ValueError, tf.errors.OpError) as error:
            unread.append(f"{task} was not measured: {str(error).splitlines()[0]}")
    return tokens, unread


if __name__ == "__main__":
    sys.exit(main())
