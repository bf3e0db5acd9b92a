"""Use a trained model in Python: load(path), then text or tokens in, text, tokens, scores or logits out.

    python -m t5x_lite.load PATH        reads lines, writes the model's answers

This module must not depend on tasks, runs or gin.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite import checkpoint, convert, sharding
from t5x_lite.convert import hub, tokenizer
from t5x_lite.convert.bucket import AnyPath
from t5x_lite.data import packing
from t5x_lite.errors import UserError
from t5x_lite.inference import decode
from t5x_lite.model import families
from t5x_lite.model.config import Dtype, EncoderDecoderConfig, StoredDtype

Texts = Sequence[str]
Tokens = Sequence[Sequence[int]] | np.ndarray | jax.Array


class LoadedModel:
    """A model that generates text and its parameters, ready to use. Token arrays are int32; 0 is padding."""

    def __init__(
        self,
        config: EncoderDecoderConfig,
        params: Any,
        vocabulary: tokenizer.AnyVocabulary | None = None,
        mesh: sharding.AnyMesh | None = None,
    ):
        self.config, self.params, self.vocabulary = config, params, vocabulary
        self._mesh = mesh or sharding.make_mesh(1, devices=jax.local_devices()[:1])
        self._logits = jax.jit(lambda params, *tokens: config.network().apply({"params": params}, *tokens))
        self._encode = jax.jit(
            lambda params, *tokens: config.network().apply({"params": params}, *tokens, method="encode")
        )
        generate = functools.partial(decode.generate, config=config)
        self._generate = jax.jit(generate, static_argnames=("max_length", "decoding"))  # one program for each value
        self._score = jax.jit(functools.partial(decode.score, config=config))

    def logits(
        self,
        encoder_input_tokens: Int[Array | np.ndarray, "B S"] | None = None,
        decoder_input_tokens: Int[Array | np.ndarray, "B T"] | None = None,
        encoder_segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
        decoder_segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
        decoder_causal_attention: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return logits at every target position, float32. Decoder inputs are the targets shifted right, after a 0.

        Segment ids are for rows with several packed examples. A decoder-only model reads the inputs, if given, before
        the targets; a single array is taken as its rows, as made by SeqIO's LM and prefix LM converters.
        """
        first_B1 = None
        if decoder_input_tokens is None:
            if not self.config.decoder_only or encoder_input_tokens is None:
                raise UserError("logits of an encoder-decoder need encoder_input_tokens and decoder_input_tokens")
            encoder_input_tokens, decoder_input_tokens = None, encoder_input_tokens
        elif self.config.decoder_only and encoder_input_tokens is not None:
            inputs_BS, targets_BT = np.asarray(encoder_input_tokens), np.asarray(decoder_input_tokens)
            # With END appended, the last token is also an input.
            last_BT = np.pad(targets_BT[:, 1:], [(0, 0), (0, 1)], constant_values=decode.END)
            rows = packing.joined(inputs_BS, last_BT)
            first_B1 = np.count_nonzero(inputs_BS, axis=1, keepdims=True)
            encoder_input_tokens, encoder_segment_ids, decoder_segment_ids = None, None, None
            decoder_input_tokens = rows["decoder_input_tokens"]
            decoder_causal_attention = rows["decoder_causal_attention"]
            positions_BT = first_B1 + np.arange(targets_BT.shape[1])
        tokens = (encoder_input_tokens, decoder_input_tokens, encoder_segment_ids, decoder_segment_ids)
        with sharding.use_mesh(self._mesh):
            logits_BTV = self._logits(
                self.params, *jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), (*tokens, decoder_causal_attention))
            )
        if first_B1 is None:
            return logits_BTV
        return jnp.take_along_axis(logits_BTV, positions_BT[..., None], axis=1)

    def encode(
        self,
        encoder_input_tokens: Int[Array | np.ndarray, "B S"],
        encoder_segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Return the encoder's outputs, float32. Outputs at padding positions are meaningless."""
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
        """Return `num_decodes` = N results for each row, and scores; see decode.Decoding and decode.generate.

        Args:
          seed: one seed, or one for each row, so that a row's samples do not depend on the other rows.
          max_lengths: the maximum length of each row, at most `max_length`; not for "beam".
          num_return: alias of `num_decodes`.
        """
        num_decodes = num_decodes if num_return is None else num_return
        decoding = decode.Decoding(method, num_decodes, beam_size, alpha, temperature, top_k, top_p)
        with sharding.use_mesh(self._mesh):
            return self._generate(
                self.params,
                jnp.asarray(encoder_input_tokens, jnp.int32),
                key=jax.random.key(seed) if isinstance(seed, int) else jax.vmap(jax.random.key)(jnp.asarray(seed)),
                max_lengths=max_lengths,
                max_length=max_length,
                decoding=decoding,
            )

    def predict(self, texts: Texts, *, batch_size: int = 16, seed: int = 0, **options: Any) -> list[str]:
        """Return the model's answer to each text.

        Args:
          options: keyword arguments of `generate`; with num_decodes > 1 the results of one text are consecutive.

        Raises:
          ValueError: the model has no tokenizer.
        """
        vocabulary = self._required_vocabulary()
        inputs = self._tokens(texts)
        answers: list[list[str]] = [[] for _ in inputs]
        seeds = np.random.SeedSequence(seed).generate_state(len(inputs))
        for rows in _batches([len(row) for row in inputs], batch_size):
            padded_rows = self._pad_rows(rows)
            tokens_BNT, _ = self.generate(_padded([inputs[i] for i in padded_rows]), seed=seeds[padded_rows], **options)
            is_end_BNT = decode.ended(tokens_BNT, self.config.end_tokens)
            for i, results_NT in zip(rows, jax.device_get(jnp.where(is_end_BNT, decode.END, tokens_BNT)), strict=False):
                answers[i] = [vocabulary.decode(result) for result in results_NT]
        return [answer for results in answers for answer in results]

    def score(self, inputs: Texts | Tokens, targets: Texts | Tokens, *, batch_size: int = 16) -> np.ndarray:
        """Return the log-likelihood (natural logarithm) of each target given its input, including the end token.

        Args:
          inputs, targets: texts, or rows of tokens with an end token; 0 is padding.
        """
        if len(inputs) != len(targets):
            raise UserError(f"{len(inputs)} inputs and {len(targets)} targets: give a target for each input")
        inputs, targets = self._tokens(inputs), self._tokens(targets)
        scores = np.zeros(len(inputs), np.float32)
        for rows in _batches([len(a) + len(b) for a, b in zip(inputs, targets, strict=True)], batch_size):
            arrange = packing.joined if self.config.decoder_only else packing.unpacked
            padded_rows = self._pad_rows(rows)
            batch = arrange(_padded([inputs[i] for i in padded_rows]), _padded([targets[i] for i in padded_rows]))
            with sharding.use_mesh(self._mesh):
                scores[rows] = self._score(self.params, jax.tree.map(jnp.asarray, batch))[: len(rows)]
        return scores

    def _pad_rows(self, rows: list[int]) -> list[int]:
        """Repeat the last row until the number of rows divides over the mesh."""
        return rows + [rows[-1]] * (-len(rows) % sharding.batch_parts(self._mesh))

    def _required_vocabulary(self) -> tokenizer.AnyVocabulary:
        if self.vocabulary is None:
            raise UserError(
                f"this model has no tokenizer: put its {' or '.join(convert.TOKENIZER_FILES)} into its folder, set "
                "model.vocabulary = t5x_lite.Vocabulary(FILE), or use generate and score on tokens"
            )
        return self.vocabulary

    def _tokens(self, rows: Texts | Tokens) -> list[list[int]]:
        if isinstance(rows, str):
            raise UserError("expected a list of texts, got one text: put it in a list")
        if isinstance(rows, jax.Array):
            rows = np.asarray(rows)  # one transfer instead of one for each row
        tokens = [
            [*self._required_vocabulary().encode(row), decode.END]
            if isinstance(row, str)
            else [int(token) for token in np.trim_zeros(np.asarray(row), "b")]
            for row in rows
        ]
        largest, size = max((max(row, default=0) for row in tokens), default=0), self.config.vocab_size
        if largest >= size:
            raise UserError(
                f"token {largest} is not in the model's vocab_size={size}: the tokenizer is another model's"
            )
        return tokens


def _batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Yield batches of row indices, longest first, so that padding is small and running out of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[start : start + size] for start in range(0, len(order), size))


def _padded(rows: list[list[int]], multiple: int = 32) -> np.ndarray:
    """Pad rows to [B, T], with T rounded up to a multiple, because each new T is compiled again."""
    length = -(-max(1, *map(len, rows), 1) // multiple) * multiple
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


def load(
    path: str | AnyPath,
    dtype: Dtype = "float32",
    mesh: sharding.AnyMesh | None = None,
    base: str | Path | None = None,
    params_dtype: StoredDtype = "float32",
) -> Any:
    """Load a model: a Hugging Face directory or name (T5, BERT), a MODEL_DIR or one of its checkpoints, or T5X's.

    Returns a LoadedModel, a `bert.pretrained.LoadedBert` for BERT, or a `t5_encoder.pretrained.LoadedEncoder`.

    Args:
      dtype: dtype of activations; softmax and logits are float32.
      mesh: the mesh to shard parameters over, by the default rules (None: the first device). The number of rows in a
        batch must divide over data and fsdp.
      base: where the checkpoint is now that a run started from, if the run saved its trained parameters alone.
      params_dtype: how parameters are stored: "bfloat16" takes half of the memory, "int8" a quarter (kernels, with one
        scale for each output; the others in bfloat16).

    Raises:
      FileNotFoundError, ValueError: see `convert.read`.
    """
    for name, value, known in (("dtype", dtype, Dtype), ("params_dtype", params_dtype, StoredDtype)):
        if value not in get_args(known):
            raise UserError(f"{name} = {value!r} must be one of {', '.join(get_args(known))}")
    folder = hub.located(path)
    with checkpoint.base_at(base):
        config, params = convert.read(folder, mesh, params_dtype=params_dtype, dtype=dtype)
    return families.model_of(config).pretrained(params, folder, mesh)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m t5x_lite.load", description="Answers each line of its input.")
    parser.add_argument("path", help="Hugging Face directory or name, T5X checkpoint, MODEL_DIR or checkpoint")
    parser.add_argument("--method", default="greedy", choices=("greedy", "sample", "beam"))
    parser.add_argument("--max_length", type=int, default=128)
    options = parser.parse_args(arguments)
    try:
        model = load(options.path)
        if not isinstance(model, LoadedModel):
            raise UserError(f"{options.path} is not a model that generates text: use t5x_lite.load in Python")
        model.predict(["warm up"], method=options.method, max_length=options.max_length)
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
            print(*model.predict([line], method=options.method, max_length=options.max_length), flush=True)
