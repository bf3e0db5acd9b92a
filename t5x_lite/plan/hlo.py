"""What a compiled XLA program does on one device in one run: its collectives, and its traffic with the memory.

Read out of the program's text, for XLA's own count (`cost_analysis`) takes the body of a loop once. Here a loop counts
as often as it runs. Knows the text form of HLO; must not know models, meshes or chips.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from t5x_lite.errors import UserError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# What costs nothing by itself: names for what is there already, or a wrapper of computations that are counted.
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
    inside: str  # between the brackets, as it stands
    root: bool


Computation = dict[str, Instruction]


@dataclasses.dataclass
class Collectives:
    """Of one kind: how many run, and the bytes that one device sends for them, in its domain and to others."""

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
                if found := _instruction(line):
                    current[found.name] = found
            elif head := _HEAD.match(line):
                current = self.computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        if not entry:
            raise UserError("this is no text of a compiled program: it has no ENTRY computation")
        self.unknown_loops: list[str] = []  # whose number of turns the text does not give: counted once
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
        """From XLA's own count, or from a condition `i < constant` and a body that adds a constant to i."""
        if known := re.search(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)', loop.attributes):
            return int(known[1])
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
        """By kind. Bytes are the fewest that algorithms with rings inside each domain, and then between them, send.

        For n devices of d domains, m = n / d in each, with x bytes on each device: inside, all-gather sends (n - d) x,
        reduce-scatter (m - 1)/m x, all-to-all (m - 1)/n x; to other domains (d - 1) x, (d - 1)/d x/m and (n - m)/n x;
        all-reduce twice what reduce-scatter does; collective-permute x, on the one way or on the other.

        Args:
          domain: the slice (or host) of each device, in the order of the mesh; None: all in one.
        """
        # A collective that is spread over several fusions, to overlap with them, stands in each: it runs as often as
        # the rarest of them.
        spread: dict[str, int] = {}
        found = []
        for name, computation in self.computations.items():
            for instruction in computation.values():
                kind = _kind(instruction)
                if kind not in KINDS or not self.times[name]:
                    continue
                chain = "chain_id=" in instruction.attributes and re.search(r"channel_id=\d+", instruction.attributes)
                key = chain[0] if chain else f"{name} {instruction.name}"
                if key not in spread:
                    found.append((key, kind, instruction, computation))
                spread[key] = min(spread.get(key, self.times[name]), self.times[name])
        result: dict[str, Collectives] = collections.defaultdict(Collectives)
        for key, kind, instruction, computation in found:
            # One between slices has become a `send` of its first operand to the same device of each other slice.
            apart = instruction.opcode == "send"
            held = sum(_bytes(computation[o].shape) for o in instruction.operands[: 1 if apart else None])
            group = _groups(instruction.attributes, devices)[0]
            members = sorted(set(domain or [0])) if apart else [domain[device] if domain else 0 for device in group]
            n, d = len(members), len(set(members))
            if n == 1:
                continue
            m = n / d
            inside, between = {
                "all-gather": (n - d, d - 1),
                "all-to-all": ((m - 1) / n, (n - m) / n),
                "collective-permute": (float(d == 1), float(d > 1)),
            }.get(kind, ((m - 1) / m, (d - 1) / d / m))
            passes = spread[key] * (2 if kind == "all-reduce" else 1)
            result[kind].count += spread[key]
            result[kind].bytes += passes * held * inside
            result[kind].network_bytes += passes * held * between
        return dict(result)

    def memory_traffic(self) -> float:
        """Bytes to and from the device's main memory: what each instruction (a fusion is one) reads and writes there.

        What only a part is read or written of, counts as that part. Arrays in another memory space (a TPU's VMEM) do
        not count.
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
            return 0.0  # room, not traffic
        if i.opcode.endswith("-start"):  # both sides in one tuple
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
        """How much of a fusion's parameter is read, at most."""
        total = 0.0
        for user in inner.values():
            if parameter not in user.operands or user.opcode == "tuple" or user.opcode in KINDS:
                continue
            if user.opcode == "bitcast":
                total += self._read(inner, user.name)
            elif user.opcode == "fusion":
                nested = self.computations[_callees(user.attributes)[0]]
                total += self._read(nested, _parameters(nested)[user.operands.index(parameter)])
            elif user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == parameter:
                total += _bytes(user.shape)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter:
                return float("inf")
        return total

    def _written(self, inner: Computation, part: Instruction) -> float:
        """How much of a fusion's result is written, at most: nothing of a parameter that is passed on."""
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
    raise UserError(f"unbalanced brackets in a line of HLO: {text[:200]}")


def _kind(instruction: Instruction) -> str:
    sent = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if sent and instruction.opcode == "send":
        return sent[1].lower().replace("_", "-")
    return instruction.opcode.removesuffix("-start")


def _callees(attributes: str) -> list[str]:
    named = re.findall(
        r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)", attributes
    )
    for several in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", attributes):
        named += _NAMES.findall(several)
    return named


def _constant(computation: Computation, name: str) -> int | None:
    found = computation.get(name)
    if found is None or found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.inside):
        return None
    return int(found.inside)


def _arrays(shape: str) -> list[tuple[str, str, str]]:
    return _ARRAY.findall(shape)


def _array_bytes(array: tuple[str, str, str]) -> tuple[float, bool]:
    """Of an array in a shape's text: its bytes, and whether it lies in the main memory, space 0."""
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
    """The devices that exchange with one another, [groups, devices of a group], in all forms that XLA prints."""
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
    return np.arange(devices)[None]  # all of them
