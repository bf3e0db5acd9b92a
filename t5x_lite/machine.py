"""A run's devices, the shapes of its state on them, and its model as functions on numpy rows.

What the devices do not allow is refused here, before any data is read. It knows the model, the step and the mesh; it
must not know text, SeqIO or TensorFlow.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import bert, decode, packing, sharding, step
from t5x_lite.errors import UserError
from t5x_lite.run_config import RunConfig

logger = logging.getLogger(__name__)


class Machine:
    """The devices of a run and the shapes of its state on them; what can be refused without reading data is."""

    def __init__(self, run: RunConfig, devices: Sequence[Any] | None = None):
        """devices: of a plan, which may be of machines that are not there; None: all there are."""
        if devices is None and jax.process_count() > 1 and not jax.distributed.is_initialized():
            raise UserError(
                "the devices belong to several processes, which have not found one another: give "
                "--coordinator_address, --process_count and --process_index"
            )
        if unknown := set(run.mesh) - set(sharding.MESH_AXES):
            raise UserError(f"MESH has no axis {unknown.pop()!r}: its axes are {', '.join(sharding.MESH_AXES)}")
        sizes = (run.mesh.get(axis, 1) for axis in sharding.MESH_AXES)
        self.mesh = sharding.make_mesh(*sizes, devices=devices)
        self.rules = run.logical_axis_rules or sharding.RULES
        parts = sharding.batch_parts(self.mesh, self.rules)
        for name, rows in (
            ("BATCH_SIZE / NUM_MICROBATCHES", run.batch_size // run.num_microbatches),
            ("EVAL_BATCH_SIZE", run.eval_batch_size),
        ):
            if rows % parts:
                raise UserError(f"{name} = {rows} does not divide over the {parts} parts of the mesh's batch axes")
        self.compiler = step.Compiler(self.mesh, self.rules)
        self.abstract = step.abstract_state(run.model, run.optimizer, self.mesh, self.rules)
        self.batch_sharding = sharding.batch_sharding(self.mesh, self.rules)

    def local_rows(self, batch_size: int) -> tuple[int, int]:
        """First and last + 1 of the rows of a global batch that lie on this host's devices.

        Raises ValueError: they do not follow one another.
        """
        held = self.batch_sharding.addressable_devices_indices_map((batch_size,)).values()
        parts = {rows[0].indices(batch_size)[:2] for rows in held if rows is not None}
        first, last = min(start for start, _ in parts), max(end for _, end in parts)
        if sum(end - start for start, end in parts) != last - first:
            raise UserError(
                f"the devices of this host hold the rows {sorted(parts)} of a batch, which do not follow one another; "
                f"MESH = {dict(self.mesh.shape)} over {jax.process_count()} hosts: give data and fsdp whole hosts"
            )
        return first, last

    def __str__(self) -> str:
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        device = self.mesh.devices.flat[0]
        return f"{self.mesh.size} x {device.device_kind} ({device.platform}) on {jax.process_count()} host(s): {axes}"


class Functions:
    """A model as functions on numpy rows: the same rows on every host, the same results on every host."""

    def __init__(self, run: RunConfig, machine: Machine):
        self._machine, self._layout = machine, run.model.layout
        compiler, abstract = machine.compiler, machine.abstract
        if self._layout == "classifier":
            self._classify = compiler.with_params(_classify, abstract, config=run.model)
        elif self._layout != "encoder":
            length = run.max_decode_length or run.task_feature_lengths["targets"]
            logger.info("Decoding: %s, at most %d tokens", run.decoding, length)
            self._generate = compiler.with_params(
                _generate, abstract, config=run.model, max_length=length, seed=run.random_seed, decoding=run.decoding
            )
            self._score = compiler.with_params(decode.score, abstract, config=run.model)
        self._sums = compiler.with_params(step.eval_step, abstract, config=run.model)

    def _spread(self, rows: Any) -> Any:
        def put(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, self._machine.batch_sharding, lambda index: x[index])

        return jax.tree.map(put, rows)

    def predict(self, params: Any, inputs_BS: np.ndarray) -> np.ndarray:
        """Token ids [B, T], the best of each row."""
        return self.generate(params, inputs_BS)[0][:, 0]

    def generate(self, params: Any, inputs_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """NUM_DECODES results for each row: token ids [B, N, T], log-likelihoods [B, N]; -inf: no such result."""
        return jax.device_get(self._generate(params, self._spread(inputs_BS)))

    def score(self, params: Any, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Log-likelihoods [B] of the targets, which are apart from the inputs whatever the model's layout."""
        if self._layout == "decoder":
            rows = packing.joined(rows["encoder_input_tokens"], rows["decoder_target_tokens"])
        return jax.device_get(self._score(params, self._spread(dict(rows))))

    def classify(self, params: Any, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits of the classes [B, N] of `inputs` and `segments` [B, S]."""
        return jax.device_get(self._classify(params, self._spread(dict(rows))))

    def loss(self, params: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Mean cross entropy and accuracy of the targets; batches of this host's rows, in the model's layout."""
        found = [
            jax.device_get(self._sums(params, sharding.shard_batch(batch, self._machine.batch_sharding)))
            for batch in batches
        ]
        if not found:
            return {}
        means = step.means(jax.tree.map(lambda *sums: float(np.sum(sums, dtype=np.float64)), *found))
        if "accuracy" in means:
            means["token_accuracy"] = means.pop("accuracy")
        return {name: float(x) for name, x in means.items() if not name.endswith(("z_loss", "cross_ent_loss"))}


def _classify(params: Any, rows: Mapping[str, jax.Array], *, config: bert.BertConfig) -> jax.Array:
    return bert.forward(config, params, rows)["classify"]


def _generate(
    params: Any, inputs_BS: jax.Array, *, seed: int, decoding: decode.Decoding, **settings: Any
) -> tuple[jax.Array, jax.Array]:
    """`decode.generate` with keys that follow from the seed and each row's tokens: the same input, the same samples."""
    places_S = jnp.arange(1, inputs_BS.shape[1] + 1, dtype=jnp.uint32)
    sums_B = jnp.sum(inputs_BS.astype(jnp.uint32) * places_S, axis=1)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), sums_B)
    tokens_BNT, scores_BN = decode.generate(params, inputs_BS, key=keys_B, decoding=decoding, **settings)
    return tokens_BNT, decode.log_likelihoods(tokens_BNT, scores_BN, decoding)
