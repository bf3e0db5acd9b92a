"""`Decoding`: the options of decode.py, validated. This module imports no JAX."""

import dataclasses
from typing import Literal, get_args

from t5x_lite.errors import UserError

Method = Literal["greedy", "sample", "beam"]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decoding options of `generate`.

    method: "greedy" takes the most likely token at each step; "sample" samples it; "beam" searches for the most likely
      sequence with `beam_size` beams (T5X decoding.beam_search).
    num_decodes: number of results for each input.
    alpha: "beam" ranks by log-probability / ((5 + length) / 6)^alpha, the length counting END.
    temperature, top_k, top_p: "sample" samples from softmax(logits / temperature), restricted to the `top_k` most
      likely tokens (0: all) and then to the smallest set with total probability `top_p`.
    """

    method: Method = "greedy"
    num_decodes: int = 1
    beam_size: int = 4
    alpha: float = 0.6
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        max_decodes = {"greedy": 1, "beam": self.beam_size}.get(self.method, self.num_decodes)
        for valid, problem in (
            (
                self.method in get_args(Method),
                f"DECODE_METHOD {self.method!r}: use one of {', '.join(get_args(Method))}",
            ),
            (self.beam_size >= 1, f"BEAM_SIZE {self.beam_size}: it must be at least 1"),
            (
                1 <= self.num_decodes <= max_decodes,
                f"NUM_DECODES {self.num_decodes}: {self.method} gives 1 to {max_decodes} results for an input",
            ),
            (self.alpha >= 0, f"BEAM_ALPHA {self.alpha}: it must be at least 0"),
            (
                self.temperature > 0,
                f"TEMPERATURE {self.temperature}: it must be above 0; DECODE_METHOD = 'greedy' is the limit of 0",
            ),
            (self.top_k >= 0, f"TOP_K {self.top_k}: it must be at least 0 (0: all tokens)"),
            (0 < self.top_p <= 1, f"TOP_P {self.top_p}: it must be above 0 and at most 1"),
        ):
            if not valid:
                raise UserError(problem)

    def __str__(self) -> str:
        used = {"greedy": (), "beam": ("beam_size", "alpha"), "sample": ("temperature", "top_k", "top_p")}
        options = [f"{name} {getattr(self, name)}" for name in used[self.method]]
        return ", ".join([self.method, *options, *([f"{self.num_decodes} results"] if self.num_decodes > 1 else [])])
