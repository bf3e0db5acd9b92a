"""Write the tables for RESULTS.md: our figures next to published ones. This module imports neither JAX nor torch."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accelerator_parts.results import FILE, Line, Results, is_result
from benchmarks.sizes import ROOT

PUBLISHED = ROOT / "t5x_lite" / "plan" / "published.json"
LONG_TEXT = 200


def write(folder: Path) -> int:
    """Prints the summary of DIR and writes it to DIR/summary.md; returns the exit code."""
    if not (folder / FILE).exists():
        print(f"{folder / FILE} does not exist: nothing has been measured there")
        return 1
    text = summary(Results(folder, run=""))
    (folder / "summary.md").write_text(text)
    print(text, end="")
    return 0


def summary(results: Results) -> str:
    published = json.loads(PUBLISHED.read_text())
    sections = (
        ("Device", device(results)),
        ("Parity", parity(results)),
        ("Training step", training(results, published["bars"])),
        ("Training step, published", published_training(published["training"])),
        ("Decoding, tokens/s", decoding(results, published["decoding"])),
        ("Checkpoints", checkpoints(results)),
        ("Costliest operations", operations(results)),
        ("Errors, and what could not be measured", errors(results)),
    )
    return "\n".join(f"### {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Returns the lines of a table in Markdown; None is an empty cell."""
    if not rows:
        return ["Nothing has been measured."]
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines]


def number(value: float | None, digits: int = 0) -> str | None:
    return None if value is None else f"{value:,.{digits}f}"


def percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def device(results: Results) -> list[str]:
    lines = []
    for line in results.measured("device").values():
        versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
        share = percent(line["share_of_published"])
        lines += [
            f"{line['device']} ({line['platform']}); driver {line['driver']}; {line['platform_version']}",
            f"Python {line['python']}, {versions}",
            f"Memory for JAX: {line['memory_limit_gb']} GiB (fraction {line['memory_fraction']})",
            f"Matrix products, {line['matrix']}: {line['matrix_flops'] / 1e12:,.4g} TFLOP/s"
            + (f", {share} of what is published" if share else ""),
            f"Copying: {line['copy_bytes_per_second'] / 1e9:,.0f} GB/s",
        ]
    return lines or ["Nothing has been measured."]


def parity(results: Results) -> list[str]:
    """Returns the largest error of each implementation, and every case above its tolerance."""
    worst: dict[str, tuple[float, int, int]] = {}
    lines, failures = results.measured("parity"), []
    for key, line in lines.items():
        for name, errors in line["errors"].items():
            if not isinstance(errors, dict):
                continue  # a number of the three steps, or "not available"
            values = [value for value in errors.values() if isinstance(value, float)]
            largest, count, wrong = worst.get(name, (0.0, 0, 0))
            worst[name] = max(largest, *values) if values else largest, count + 1, wrong + (not errors["ok"])
            if not errors["ok"]:
                failures.append(f"- NOT OK: {key}, {name}: {json.dumps(errors)[:LONG_TEXT]}")
        if line["errors"].keys() <= {"loss", "grad_norm", "norm", "moved"}:
            verdict = "ok" if line["ok"] else "NOT OK"
            failures.append(f"- {key}, relative differences to a CPU: {json.dumps(line['errors'])}: {verdict}")
    rows = [[name, count, f"{largest:.2e}", wrong] for name, (largest, count, wrong) in worst.items()]
    return [*table(("implementation, dtype", "cases", "largest relative error", "not ok"), rows), "", *failures]


def training(results: Results, bars: dict[str, Any]) -> list[str]:
    steps, plans = results.measured("train"), results.measured("plan")
    torch = best_of_torch(results)
    rows = []
    for key, line in sorted(steps.items(), key=lambda item: item[1]["size"]):
        plan, theirs, bar = plans.get(key, {}), torch.get(line["size"]), bars["sizes"].get(line["size"], {})
        ours = line["sequences_per_second"]
        on_bar = any(line["device"].startswith(kind) for kind in bars["devices"])
        cells = [key, line["batch_size"], f"{line['step_seconds']:.4f}", number(ours, 1)]
        cells += [number(line["tokens_per_second"]), percent(line["mfu"])]
        cells += [line["fused_attention_calls"], line["needed_gb"], line["peak_device_gb"], plan.get("needed_gb")]
        cells += [number(plan.get("bound_sequences_per_second"), 1), number(bar.get("aim")) if on_bar else None]
        rows.append([*cells, f"{ours / theirs['sequences_per_second']:.2f}" if theirs else None])
    for key, line in results.measured("torch_train").items():
        ours = next((other for other in steps.values() if other["size"] == line["size"] and other["mfu"]), None)
        mfu = ours["mfu"] * line["sequences_per_second"] / ours["sequences_per_second"] if ours else None
        cells = [f"torch: {key}, {line['attention']}", line["batch_size"], f"{line['step_seconds']:.4f}"]
        cells += [number(line["sequences_per_second"], 1), number(line["tokens_per_second"]), percent(mfu), None, None]
        rows.append([*cells, line["peak_device_gb"], None, None, None, None])
    head = (
        "step",
        "rows",
        "seconds",
        "sequences/s",
        "tokens/s",
        "MFU",
        "fused attention calls",
        "GiB by the compiler",
        "GiB peak of the process",
    )
    return table((*head, "GiB by the plan", "plan's bound, sequences/s", "aim", "times torch"), rows)


def best_of_torch(results: Results) -> dict[str, Line]:
    """Returns torch's quickest step of each size with float32 parameters, as t5x_lite has them."""
    lines = [line for line in results.measured("torch_train").values() if line["precision"] == "autocast"]
    return {line["size"]: line for line in sorted(lines, key=lambda line: line["sequences_per_second"])}


def published_training(figures: list[dict[str, Any]]) -> list[str]:
    rows = []
    for figure in figures:
        sequences, tokens = figure.get("per_device"), figure.get("tokens_per_device")
        rate = f"{sequences:,} sequences/s" if sequences else f"{tokens:,} tokens/s" if tokens else None
        mfu = figure["mfu"] and f"{figure['mfu']:.1%}" + (" by our count" if figure["mfu_by"] == "us" else "")
        conditions = ", ".join(f"{name} {value}" for name, value in figure["conditions"].items())
        source = figure["source"] + (" (recalled)" if figure["recalled"] else "")
        rows.append([figure["what"], f"{figure['devices']} x {figure['hardware']}", rate, mfu, conditions, source])
    return table(("what", "on", "a device", "MFU", "conditions", "source"), rows)


def decoding(results: Results, published: dict[str, Any]) -> list[str]:
    ours, torch = results.measured("decode"), results.measured("torch_decode")
    figures = {(f["size"], f["batch_size"]): f for f in published["tokens_per_second"]}
    rows = []
    for key in sorted({*ours, *torch}, key=lambda key: [int(part) if part.isdigit() else part for part in key.split()]):
        line, theirs = ours.get(key), torch.get(key)
        either: Line = line or theirs or {}
        figure = figures.get((either["size"], either["batch_size"]), {}) if either["method"] == "beam" else {}
        rates = [other["tokens_per_second"] if other else None for other in (line, theirs)]
        times = f"{rates[0] / rates[1]:.2f}" if rates[0] and rates[1] else None
        cells = [key, f"{either['inputs']} / {either['tokens']}", *(number(rate, 1) for rate in rates), times]
        rows.append([*cells, number(figure.get("huggingface")), number(figure.get("fastertransformer"))])
    head = (
        "call",
        "inputs / tokens",
        "t5x_lite",
        "torch",
        "times torch",
        "Hugging Face, V100",
        "FasterTransformer, V100",
    )
    return [*table(head, rows), "", f"The last two: {published['what']} ({published['source']})."]


def checkpoints(results: Results) -> list[str]:
    lines = results.measured("checkpoints")
    hidden = ("part", "key", "run", "seconds", "size")
    rows = [[key, name, value] for key, line in lines.items() for name, value in line.items() if name not in hidden]
    return table(("what", "quantity", "value"), rows)


def operations(results: Results) -> list[str]:
    lines = []
    for key, line in results.measured("profile").items():
        lines += [f"{key}, batch {line['batch_size']}: {line['device_ms_a_step']} ms of operations a step", "", "```"]
        lines += [*line["operations"], "```"]
    return lines or ["Nothing has been measured."]


def errors(results: Results) -> list[str]:
    return list(_errors(results)) or ["None."]


def _errors(results: Results) -> Iterator[str]:
    """Yields the last word on what has no result, and the notes of what has."""
    last: dict[tuple[str, str], Line] = {}
    for line in results.lines():
        last[line["part"], line.get("key", "")] = line
    for (part, key), line in last.items():
        name = f"{part}: {key}" if key else part
        if not is_result(line):
            # A part that was skipped or failed as a whole is of no interest once it has measured something later.
            if key or not any(other["run"] >= line["run"] for other in results.measured(part).values()):
                yield f"- {name}: {line.get('error') or line.get('skipped') or 'ended before it was measured'}"
        if line.get("note"):
            yield f"- {name}: {line['note']}"
        if line.get("complete") is False:
            yield f"- {name}: some rows ended early"
