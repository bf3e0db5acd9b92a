"""Count collectives and memory traffic of a compiled XLA program, per device and run.

The counts are parsed from the HLO text, because XLA's own (`cost_analysis`) count the body of a loop once. Here a body
counts once per iteration. Must not depend on models, meshes or chips.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from t5x_lite.errors import UserError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions without traffic of their own: aliases, and wrappers of computations that are counted separately.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
FREE |= {"partition-id", "replica-id", "opt-barrier", "iota"}

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAMES = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")


@dataclasses.dataclass
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    inside: str  # the text between the parentheses
    root: bool


Computation = dict[str, Instruction]


@dataclasses.dataclass
class Collectives:
    """Count of one kind of collective, and the bytes that one device sends for it within its domain and to others."""

    count: int = 0
    bytes: float = 0.0
    network_bytes: float = 0.0


class Program:
    """A compiled program, from `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        current: Computation = {}
        entry = ""
        for line in text.splitlines():
            if line.startswith(" "):
                if instruction := _instruction(line):
                    current[instruction.name] = instruction
            elif head := _HEAD.match(line):
                current = self.computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        if not entry:
            raise UserError("this is not the text of a compiled program: it has no ENTRY computation")
        self.unknown_loops: list[str] = []  # loops without a known trip count, counted once
        self.times: collections.Counter[str] = collections.Counter()  # how often each computation runs
        self.fused: set[str] = set()
        self._visit(entry, 1)

    def _visit(self, name: str, times: int) -> None:
        self.times[name] += times
        for instruction in self.computations[name].values():
            callees = _callees(instruction.attributes)
            turns = self._turns(instruction, self.computations[name]) if instruction.opcode == "while" else 1
            if instruction.opcode == "fusion":
                self.fused.update(callees)
            for callee in callees:
                if callee in self.computations:
                    self._visit(callee, times * turns)

    def _turns(self, loop: Instruction, around: Computation) -> int:
        """Return a loop's trip count: XLA's, or from a condition `i < constant` and a body adding a constant to i."""
        if trip_count := re.search(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)', loop.attributes):
            return int(trip_count[1])
        condition, body = (
            self.computations[m[1]] if (m := re.search(rf"{part}=%([\w.\-]+)", loop.attributes)) else {}
            for part in ("condition", "body")
        )
        test = next((i for i in condition.values() if i.root), None)
        end = step = index = None
        if test and test.opcode == "compare" and "direction=LT" in test.attributes:
            counter = condition.get(test.operands[0])
            end = _constant(condition, test.operands[1])
            index = counter and re.search(r"index=(\d+)", counter.attributes)
        result = next((i for i in body.values() if i.root), None)
        if index and result and result.opcode == "tuple":
            added = body.get(result.operands[int(index[1])])
            if added and added.opcode == "add":
                step = next((c for o in added.operands if (c := _constant(body, o))), None)
        if end is None or index is None:
            self.unknown_loops.append(loop.name)
            return 1
        start = 0
        state = around.get(loop.operands[0])
        if state and state.opcode == "tuple":
            start = _constant(around, state.operands[int(index[1])]) or 0
        return max(-(-(end - start) // (step or 1)), 0)

    def collectives(self, devices: int, domain: Sequence[int] | None = None) -> dict[str, Collectives]:
        """Return the collectives by kind. Bytes are those of ring algorithms within each domain, then between domains.

        For n devices in d domains of m = n / d devices each, and x bytes per device: within a domain, all-gather sends
        (n - d) x, reduce-scatter (m - 1)/m x, all-to-all (m - 1)/n x; to other domains (d - 1) x, (d - 1)/d x/m and
        (n - m)/n x. All-reduce sends twice as much as reduce-scatter. Collective-permute sends x, either way.

        Args:
          domain: slice (or host) of each device, in mesh order; None: all devices are in one domain.
        """
        # A collective that overlaps with several fusions appears in each: it runs as often as the least frequent one.
        runs: dict[str, int] = {}
        instructions = []
        for name, computation in self.computations.items():
            for instruction in computation.values():
                kind = _kind(instruction)
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # as TPUs' compiler writes one: a fusion that keeps a part of a sum
                if kind not in KINDS or not self.times[name]:
                    continue
                chain = "chain_id=" in instruction.attributes and re.search(r"channel_id=\d+", instruction.attributes)
                key = chain[0] if chain else f"{name} {instruction.name}"
                if key not in runs:
                    instructions.append((key, kind, instruction, computation))
                runs[key] = min(runs.get(key, self.times[name]), self.times[name])
        result: dict[str, Collectives] = collections.defaultdict(Collectives)
        for key, kind, instruction, computation in instructions:
            # Between slices, XLA emits a `send` of the first operand to the same device of each other slice.
            is_send = instruction.opcode == "send"
            size = sum(_bytes(computation[o].shape) for o in instruction.operands[: 1 if is_send else None])
            group = _groups(instruction.attributes, devices)[0]
            members = sorted(set(domain or [0])) if is_send else [domain[device] if domain else 0 for device in group]
            n, d = len(members), len(set(members))
            if n == 1:
                continue
            m = n / d
            inside, between = {
                "all-gather": (n - d, d - 1),
                "all-to-all": ((m - 1) / n, (n - m) / n),
                "collective-permute": (float(d == 1), float(d > 1)),
            }.get(kind, ((m - 1) / m, (d - 1) / d / m))
            passes = runs[key] * (2 if kind == "all-reduce" else 1)
            result[kind].count += runs[key]
            result[kind].bytes += passes * size * inside
            result[kind].network_bytes += passes * size * between
        return dict(result)

    def memory_traffic(self) -> float:
        """Return the bytes that all instructions (a fusion counts as one) read from and write to main memory.

        If only a part of an array is read or written, that part counts. Arrays in another memory space (a TPU's VMEM)
        do not count.
        """
        total = 0.0
        for name, computation in self.computations.items():
            if self.times[name] and name not in self.fused:
                total += self.times[name] * sum(self._moved(i, computation) for i in computation.values())
        return total

    def _moved(self, i: Instruction, around: Computation) -> float:
        if i.opcode in FREE or i.opcode.endswith("-done") or i.opcode == "async-update":
            return 0.0
        operands = [around[o].shape for o in i.operands if o in around]
        if i.opcode == "custom-call" and not operands:
            return 0.0  # allocates memory only
        if i.opcode.endswith("-start"):  # the tuple holds source and destination
            sizes = [size for size in map(_array_bytes, _arrays(i.shape)) if size[0] > 8]
            return min((s for s, _ in sizes), default=0) * sum(main for _, main in sizes[:2])
        if i.opcode in ("dynamic-slice", "gather", "slice", "copy", "reshape", "transpose"):
            return 2 * _main_bytes(i.shape)
        if i.opcode == "dynamic-update-slice":
            return 2 * _main_bytes(operands[1])
        if "__cublas" in i.attributes:
            return _main_bytes(i.shape.partition(", s8[")[0]) + sum(map(_main_bytes, operands))  # without its workspace
        if i.opcode != "fusion":
            return _main_bytes(i.shape) + sum(map(_main_bytes, operands))
        inner = self.computations[_callees(i.attributes)[0]]
        parameters = _parameters(inner)
        read = sum(min(_main_bytes(shape), self._read(inner, parameters[n])) for n, shape in enumerate(operands))
        root = next(p for p in inner.values() if p.root)
        parts = [inner[o] for o in root.operands] if root.opcode == "tuple" else [root]
        written = 0.0
        for (size, main), part in zip(map(_array_bytes, _arrays(i.shape)), parts, strict=False):
            written += min(size, self._written(inner, part)) * main
        return read + written

    def _read(self, inner: Computation, parameter: str) -> float:
        """Return an upper bound of the bytes read of a fusion's parameter."""
        total = 0.0
        for user in inner.values():
            if parameter not in user.operands or user.opcode == "tuple" or user.opcode in KINDS:
                continue
            if self._passes(user, parameter):  # of which a fusion computes only what it needs
                needed = float("inf") if user.root else self._read(inner, user.name)
                total += needed * _bytes(inner[parameter].shape) / _bytes(user.shape)
            elif user.opcode == "fusion":
                nested = self.computations[_callees(user.attributes)[0]]
                total += self._read(nested, _parameters(nested)[user.operands.index(parameter)])
            elif user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == parameter:
                total += _bytes(user.shape)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter:
                return float("inf")
        return total

    def _passes(self, i: Instruction, operand: str) -> bool:
        """Return whether an instruction within a fusion only changes layout or dtype of this operand."""
        if i.opcode != "fusion":
            return i.opcode in ("bitcast", "convert", "copy")
        nested = self.computations[_callees(i.attributes)[0]]
        name, end = _parameters(nested)[i.operands.index(operand)], next(p for p in nested.values() if p.root)
        while end.name != name and end.operands and self._passes(end, end.operands[0]):
            end = nested[end.operands[0]]
        return end.name == name

    def _written(self, inner: Computation, part: Instruction) -> float:
        """Return an upper bound of the bytes written of a fusion's result; 0 for a parameter that is passed through."""
        if part.opcode == "parameter" or part.opcode in KINDS:
            return 0.0
        if part.opcode == "bitcast":
            return self._written(inner, inner[part.operands[0]])
        if part.opcode == "fusion":
            nested = self.computations[_callees(part.attributes)[0]]
            root = next(p for p in nested.values() if p.root)
            return float("inf") if root.opcode == "tuple" else self._written(nested, root)
        return _bytes(inner[part.operands[1]].shape) if part.opcode == "dynamic-update-slice" else float("inf")


def _parameters(computation: Computation) -> dict[int, str]:
    return {int(p.inside): p.name for p in computation.values() if p.opcode == "parameter"}


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[shape_end + 1 :].partition("(")
    start = shape_end + 1 + len(opcode)
    end = _closing(rest, start)
    inside = rest[start + 1 : end]
    return Instruction(
        head[2], rest[:shape_end], opcode, _NAMES.findall(inside), rest[end + 1 :], inside, bool(head[1])
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise UserError(f"unbalanced parentheses in a line of HLO: {text[:200]}")


def _kind(instruction: Instruction) -> str:
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if transfer and instruction.opcode == "send":
        return transfer[1].lower().replace("_", "-")
    return instruction.opcode.removesuffix("-start")


def _callees(attributes: str) -> list[str]:
    named = re.findall(
        r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)", attributes
    )
    for several in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", attributes):
        named += _NAMES.findall(several)
    return named


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation.get(name)
    if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.inside):
        return None
    return int(instruction.inside)


def _arrays(shape: str) -> list[tuple[str, str, str]]:
    return _ARRAY.findall(shape)


def _array_bytes(array: tuple[str, str, str]) -> tuple[float, bool]:
    """Return the bytes of an array in a shape's text, and whether it is in main memory (space 0)."""
    dtype, dims, layout = array
    bits = {"pred": 8, "token": 0, "opaque": 0}.get(dtype) if not re.search(r"\d", dtype) else None
    if bits is None:
        bits = int(re.findall(r"\d+", dtype)[0])
    size = bits / 8
    for dim in dims.replace("<=", "").split(","):
        size *= int(dim) if dim else 1
    return size, not re.search(r"S\([1-9]", layout)


def _bytes(shape: str) -> float:
    return sum(size for size, _ in map(_array_bytes, _arrays(shape)))


def _main_bytes(shape: str) -> float:
    return sum(size for size, main in map(_array_bytes, _arrays(shape)) if main)


def _groups(attributes: str, devices: int) -> np.ndarray:
    """Return the groups of devices that communicate, [groups, devices per group], from any form that XLA prints."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        moves = [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])]
        across = [pair for pair in moves if pair[0] != pair[1]]
        return np.array(across or [[0]])
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        numbers: Callable[[str], list[int]] = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
        ids = np.arange(np.prod(numbers(iota[2]))).reshape(numbers(iota[2]))
        return (ids.transpose(numbers(iota[3])) if iota[3] else ids).reshape(numbers(iota[1]))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        joined = re.findall(r"'([^']+)'", mesh[2])
        ids = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
        order = [a for a in sizes if a not in joined] + joined
        ids = ids.transpose([list(sizes).index(a) for a in order])
        return ids.reshape(-1, int(np.prod([sizes[a] for a in joined])))
    return np.arange(devices)[None]  # all devices
