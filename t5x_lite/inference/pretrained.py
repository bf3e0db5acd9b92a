"""A trained model in Python: load(path), then text or tokens in, text, tokens, scores or logits out.

    python -m t5x_lite.load PATH        reads lines, writes the model's answers

Knows the model, decoding, converters, and the tokenizer beside a model. It must not know tasks, runs or gin.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite import convert, sharding
from t5x_lite.convert import tokenizer
from t5x_lite.data import packing
from t5x_lite.errors import UserError
from t5x_lite.inference import decode
from t5x_lite.model import interface
from t5x_lite.model.config import Dtype
from t5x_lite.model.t5 import T5, T5Config

Texts = Sequence[str]
Tokens = Sequence[Sequence[int]] | np.ndarray | jax.Array


class LoadedModel:
    """A T5 and its parameters, ready to use. Token arrays are int32; 0 is padding."""

    def __init__(
        self,
        config: T5Config,
        params: Any,
        vocabulary: tokenizer.AnyVocabulary | None = None,
        mesh: sharding.AnyMesh | None = None,
    ):
        self.config, self.params, self.vocabulary = config, params, vocabulary
        self._mesh = mesh or sharding.make_mesh(1, devices=jax.local_devices()[:1])
        self._logits = jax.jit(lambda params, *tokens: T5(config).apply({"params": params}, *tokens))
        self._encode = jax.jit(lambda params, *tokens: T5(config).apply({"params": params}, *tokens, method="encode"))
        generate = functools.partial(decode.generate, config=config)
        self._generate = jax.jit(generate, static_argnames=("max_length", "decoding"))  # a new value is compiled anew
        self._score = jax.jit(functools.partial(decode.score, config=config))

    def logits(
        self,
        encoder_input_tokens: Int[Array | np.ndarray, "B S"] | None = None,
        decoder_input_tokens: Int[Array | np.ndarray, "B T"] | None = None,
        encoder_segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
        decoder_segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
        decoder_causal_attention: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits at every target position, float32. The decoder's inputs are the targets after a start token, 0.

        Segment ids are for rows of several packed examples. A decoder alone that is given inputs reads them before the
        targets; if one array is given, it is its rows, as SeqIO's LM and prefix LM converters make them.
        """
        first_B1 = None
        if decoder_input_tokens is None:
            if not self.config.decoder_only or encoder_input_tokens is None:
                raise UserError("logits of an encoder-decoder need encoder_input_tokens and decoder_input_tokens")
            encoder_input_tokens, decoder_input_tokens = None, encoder_input_tokens
        elif self.config.decoder_only and encoder_input_tokens is not None:
            inputs_BS, targets_BT = np.asarray(encoder_input_tokens), np.asarray(decoder_input_tokens)
            last_BT = np.pad(targets_BT[:, 1:], [(0, 0), (0, 1)], constant_values=decode.END)  # so that all are read
            rows = packing.joined(inputs_BS, last_BT)
            first_B1 = np.count_nonzero(inputs_BS, axis=1, keepdims=True)
            encoder_input_tokens, encoder_segment_ids, decoder_segment_ids = None, None, None
            decoder_input_tokens = rows["decoder_input_tokens"]
            decoder_causal_attention = rows["decoder_causal_attention"]
            places_BT = first_B1 + np.arange(targets_BT.shape[1])
        tokens = (encoder_input_tokens, decoder_input_tokens, encoder_segment_ids, decoder_segment_ids)
        with sharding.use_mesh(self._mesh):
            logits_BTV = self._logits(
                self.params, *jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), (*tokens, decoder_causal_attention))
            )
        if first_B1 is None:
            return logits_BTV
        return jnp.take_along_axis(logits_BTV, places_BT[..., None], axis=1)

    def encode(
        self,
        encoder_input_tokens: Int[Array | np.ndarray, "B S"],
        encoder_segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """The encoder's outputs, float32; what stands at padding means nothing."""
        tokens = (encoder_input_tokens, encoder_segment_ids)
        with sharding.use_mesh(self._mesh):
            encoded_BSD = self._encode(self.params, *jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), tokens))
        return encoded_BSD.astype(jnp.float32)

    def generate(
        self,
        encoder_input_tokens: Int[Array | np.ndarray, "B S"],
        method: decode.Method = decode.Decoding.method,
        max_length: int = 128,
        beam_size: int = decode.Decoding.beam_size,
        alpha: float = decode.Decoding.alpha,
        temperature: float = decode.Decoding.temperature,
        top_k: int = decode.Decoding.top_k,
        top_p: float = decode.Decoding.top_p,
        num_decodes: int = decode.Decoding.num_decodes,
        seed: int | Sequence[int] | np.ndarray = 0,
        max_lengths: Int[Array | np.ndarray, " B"] | None = None,
        num_return: int | None = None,
    ) -> tuple[Int[Array, "B N T"], Float[Array, "B N"]]:
        """`num_decodes` = N results for each row and their scores: see decode.Decoding and decode.generate.

        Args:
          seed: one, or one for each row, whose samples then do not depend on the rows beside it.
          max_lengths: of each row, where it is less than `max_length`; not for "beam".
          num_return: another name of `num_decodes`.
        """
        num_decodes = num_decodes if num_return is None else num_return
        decoding = decode.Decoding(method, num_decodes, beam_size, alpha, temperature, top_k, top_p)
        with sharding.use_mesh(self._mesh):
            return self._generate(
                *(self.params, jnp.asarray(encoder_input_tokens, jnp.int32)),
                key=jax.random.key(seed) if isinstance(seed, int) else jax.vmap(jax.random.key)(jnp.asarray(seed)),
                max_lengths=max_lengths,
                max_length=max_length,
                decoding=decoding,
            )

    def predict(self, texts: Texts, *, batch_size: int = 16, seed: int = 0, **options: Any) -> list[str]:
        """The model's answer to each text.

        Args:
          options: those of `generate`; with num_decodes > 1 the results of one text follow each other.

        Raises:
          ValueError: the model came without a tokenizer.
        """
        vocabulary = self._required_vocabulary()
        inputs = self._tokens(texts)
        answers: list[list[str]] = [[] for _ in inputs]
        seeds = np.random.SeedSequence(seed).generate_state(len(inputs))
        for rows in _batches([len(row) for row in inputs], batch_size):
            filled = self._filled_up(rows)
            tokens_BNT, _ = self.generate(_padded([inputs[i] for i in filled]), seed=seeds[filled], **options)
            for i, results_NT in zip(rows, jax.device_get(tokens_BNT), strict=False):
                answers[i] = [vocabulary.decode(result) for result in results_NT]
        return [answer for results in answers for answer in results]

    def score(self, inputs: Texts | Tokens, targets: Texts | Tokens, *, batch_size: int = 16) -> np.ndarray:
        """The log-likelihood (natural logarithm) of each of `targets` given its input, the end token included.

        Args:
          inputs, targets: texts, or rows of tokens with their end token; 0 in a row is padding.
        """
        if len(inputs) != len(targets):
            raise UserError(f"{len(inputs)} inputs and {len(targets)} targets: give a target for each input")
        inputs, targets = self._tokens(inputs), self._tokens(targets)
        scores = np.zeros(len(inputs), np.float32)
        for rows in _batches([len(a) + len(b) for a, b in zip(inputs, targets, strict=True)], batch_size):
            arrange = packing.joined if self.config.decoder_only else packing.unpacked
            filled = self._filled_up(rows)
            batch = arrange(_padded([inputs[i] for i in filled]), _padded([targets[i] for i in filled]))
            with sharding.use_mesh(self._mesh):
                scores[rows] = self._score(self.params, jax.tree.map(jnp.asarray, batch))[: len(rows)]
        return scores

    def _filled_up(self, rows: list[int]) -> list[int]:
        """The last again, until they divide over the mesh."""
        return rows + [rows[-1]] * (-len(rows) % sharding.batch_parts(self._mesh))

    def _required_vocabulary(self) -> tokenizer.AnyVocabulary:
        if self.vocabulary is None:
            raise UserError(
                f"this model came without a tokenizer: put its {' or '.join(convert.TOKENIZER_FILES)} beside it, set "
                "model.vocabulary = t5x_lite.Vocabulary(FILE), or use generate and score on tokens"
            )
        return self.vocabulary

    def _tokens(self, rows: Texts | Tokens) -> list[list[int]]:
        if isinstance(rows, str):
            raise UserError("expected a list of texts, got one text: put it in a list")
        if isinstance(rows, jax.Array):
            rows = np.asarray(rows)  # its rows would be fetched one by one
        return [
            [*self._required_vocabulary().encode(row), decode.END]
            if isinstance(row, str)
            else [int(token) for token in np.trim_zeros(np.asarray(row), "b")]
            for row in rows
        ]


def _batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Rows by length, the longest first, so that little is padding and what needs the most memory comes at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[start : start + size] for start in range(0, len(order), size))


def _padded(rows: list[list[int]], multiple: int = 32) -> np.ndarray:
    """[B, T], T rounded up: each new T is compiled anew."""
    length = -(-max(1, *map(len, rows), 1) // multiple) * multiple
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


def load(path: str | Path, dtype: Dtype = "float32", mesh: sharding.AnyMesh | None = None) -> Any:
    """The model that `path` holds: a Hugging Face directory (T5, BERT), a MODEL_DIR or a checkpoint in it, or T5X's.

    It is a LoadedModel or, of BERT, a `bert.pretrained.LoadedBert`.

    Args:
      dtype: of activations; parameters, softmax and logits are float32.
      mesh: what parameters lie on, by the usual rules (default: the first device). The rows of a batch are split over
        data and fsdp and must divide.

    Raises:
      FileNotFoundError, ValueError: see `convert.read`.
    """
    config, params = convert.read(path, mesh, dtype=dtype)
    return interface.model_of(config).pretrained(params, Path(path).expanduser(), mesh)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m t5x_lite.load", description="Answers each line of its input.")
    parser.add_argument("path", help="Hugging Face directory, T5X checkpoint, MODEL_DIR or checkpoint")
    parser.add_argument("--method", default="greedy", choices=("greedy", "sample", "beam"))
    parser.add_argument("--max_length", type=int, default=128)
    asked = parser.parse_args(arguments)
    try:
        model = load(asked.path)
        if not isinstance(model, LoadedModel):
            raise UserError(f"{asked.path} is not a model that writes text: use t5x_lite.load in Python")
        model.predict(["warm up"], method=asked.method, max_length=asked.max_length)
    except (UserError, OSError) as error:
        print(f"t5x_lite.load: {error}", file=sys.stderr)
        return 2
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if line.strip():
            print(*model.predict([line], method=asked.method, max_length=asked.max_length), flush=True)
