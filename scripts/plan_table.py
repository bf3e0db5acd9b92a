"""Prints plans as a Markdown table, a row a file.

python scripts/plan_table.py runs/*/plan.json
"""

import json
import sys

HEAD = (
    "parameters",
    "topology",
    "mesh",
    "remat",
    "state",
    "memory a device",
    "fits",
    "step at least",
    "MFU at most",
    "bound by",
)


def row(plan: dict) -> tuple[str, ...]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    state = (plan["parameter_bytes"] + plan["optimizer_bytes"]) / 2**30
    memory, seconds = plan["memory"]["needed"] / 2**30, plan["step_seconds"]
    capacity = f" of {plan['capacity'] / 2**30:.1f}" if plan["capacity"] else ""
    times = {bound: time for bound, time in plan["times"].items() if time is not None}
    parts = f", {plan['num_microbatches']} micro-batches" if plan["num_microbatches"] > 1 else ""
    return (
        f"{plan['parameters'] / 1e6:,.0f} M",
        plan["topology"],
        mesh,
        plan["remat"] + parts,
        f"{state:.2f} GiB",
        f"{memory:.2f}{capacity} GiB",
        {True: "yes", False: "no", None: ""}[plan["fits"]],
        f"{seconds * 1e3:,.1f} ms" if seconds else "",
        f"{plan['mfu']:.0%}" if plan["mfu"] else "",
        max(times, key=lambda bound: times[bound]) if times else "",
    )


def main(files: list[str]) -> None:
    rows = []
    for file in files:
        with open(file, encoding="utf-8") as opened:
            plan = json.load(opened)
        rows.append(row(plan))
    for cells in (HEAD, ("---",) * len(HEAD), *rows):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
