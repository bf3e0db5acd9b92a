"""Devices that are not there, by the name of what one would rent: to compile for, not to run on.

    v5e:4x4      one TPU slice: chip and shape, as Google names them        2xv5e:16x16    two slices
    h100:8       so many GPUs, eight to a host                              cpu:8          so many CPU devices

This module knows chips and JAX's compilers; it must not know models.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from t5x_lite.errors import UserError
from t5x_lite.metrics.hardware import CHIPS, GPUS_PER_HOST, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for. real: they are of the chip that is named; False: CPU devices in the place of GPUs."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    real: bool = True

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Without a GPU XLA cannot time its own kernels for products against cuBLAS's, so it is to take cuBLAS's."""
        apart = self.chip.platform == "gpu" and self.real
        return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0} if apart else {}

    @property
    def domain_of(self) -> dict[Any, int]:
        """The slice (TPU) or host (GPU) of each device: inside one, links are fast."""
        if self.chip.platform == "gpu":
            return {device: n // GPUS_PER_HOST for n, device in enumerate(self.devices)}
        return {device: getattr(device, "slice_index", None) or 0 for device in self.devices}


def find(name: str) -> Topology:
    """The devices of `name`. JAX is kept off the devices that are there, so this comes before its first use of any.

    Raises:
      ValueError: there is no such chip or slice, what compiles for it is not installed, or JAX has started already.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z][\w-]*):([\dx]+)", name)
    chip = next((c for c in CHIPS if c.name == (match[2] if match else name)), None)
    if match is None or chip is None:
        near = [] if chip else difflib.get_close_matches(name.partition(":")[0], [c.name for c in CHIPS], n=1)
        raise UserError(
            f"--topology={name}: write CHIP:SHAPE, such as v5e:4x4, 2xv5e:16x16 (two slices), h100:8 or cpu:8."
            f"{f' Did you mean {near[0]}?' if near else ''} Chips: {', '.join(c.name for c in CHIPS)}"
        )
    slices, shape = int(match[1] or 1), match[3]
    if chip.platform == "tpu":
        if shape not in chip.shapes:
            raise UserError(
                f"--topology={name}: {chip.name} has no slice {shape!r}; its slices: {', '.join(chip.shapes)}"
            )
        _start_cpu_only(2)  # two, for a lone CPU device is given a program of its own
        _keep_nothing()
        return Topology(name, chip, _tpus(name, chip, shape, slices))
    count = int(shape) if shape.isdecimal() else 0
    if count < 1 or slices > 1:
        raise UserError(f"--topology={name}: write {chip.name}:N, N being how many, such as {chip.name}:8")
    if chip.platform == "gpu":
        if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
            raise UserError(f"--topology={name}: more than {GPUS_PER_HOST} GPUs are whole hosts of {GPUS_PER_HOST}")
        if _has_cuda():
            _start_cpu_only(2)
            _keep_nothing()
            return Topology(name, chip, _gpus(chip, count))
        return Topology(name, chip, _start_cpu_only(max(count, 2))[:count], real=False)
    return Topology(name, chip, _start_cpu_only(count)[:count])


def _start_cpu_only(count: int) -> tuple[Any, ...]:
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    devices = jax.devices()
    if devices[0].platform != "cpu" or len(devices) < count:
        raise UserError(f"JAX has been started already, with {devices}: plan in a process of its own")
    return tuple(devices)


def _keep_nothing() -> None:
    """JAX's cache of compiled programs reads them back onto devices, and there are none."""
    jax.config.update("jax_enable_compilation_cache", False)


def _tpus(name: str, chip: Chip, shape: str, slices: int) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs libtpu, the TPU's compiler, which no TPU is needed for: "
            "pip install -r requirements-tpu.txt -c constraints.txt"
        )
    quiet = {"TPU_MIN_LOG_LEVEL": "4", "TPU_STDERR_LOG_LEVEL": "4", "TPU_LOG_DIR": "disabled"}
    alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    alone |= {"TPU_ACCELERATOR_TYPE": "v5e-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for variable, value in (quiet | alone).items():
        os.environ.setdefault(variable, value)  # or it asks Google's metadata server, and wants to be the only one
    # Where links close to rings: in whole cubes of 4x4x4, and along the 16 chips of a v5e's or v6e's side.
    sides = [int(side) for side in shape.split("x")]
    cubes = len(sides) == 3 and all(side % 4 == 0 for side in sides)
    options: dict[str, Any] = {"wrap": (True,) * 3 if cubes else tuple(side == 16 for side in (*sides, 1)[:3])}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores are one device, as Cloud TPU VMs have it
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    found = topologies.get_topology_desc(f"{chip.name}:{shape}", "tpu", **options)
    return tuple(found.devices)


def _has_cuda() -> bool:
    plugins = importlib.util.find_spec("jax_plugins")
    return plugins is not None and any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13))


def _gpus(chip: Chip, count: int) -> tuple[Any, ...]:
    """GPUs as XLA's compiler describes them to itself (GpuTargetConfigProto), from NVIDIA's tuning guides."""
    ampere = chip.name.startswith("a100")
    shared, l2, clock = (163, 40, 1.41) if ampere else (227, 50, 1.98)  # KiB a block, MiB, GHz
    target = f"""
      platform_name: "CUDA"  device_description_str: "{chip.kinds[0]}"  dnn_version_info {{ major: 9 minor: 10 }}
      gpu_device_info {{
        cuda_compute_capability {{ major: {8 if ampere else 9} }}  core_count: {chip.cores}  clock_rate_ghz: {clock}
        threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
        fpus_per_core: {64 if ampere else 128}  shared_memory_per_block: 49152
        shared_memory_per_block_optin: {shared * 1024}
        shared_memory_per_core: {(shared + 1) * 1024}  registers_per_core_limit: 65536  registers_per_block_limit: 65536
        block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
        memory_bandwidth: {int(chip.memory_bandwidth)}  l2_cache_size: {l2 * 2**20}
        device_memory_size: {int(chip.memory / 0.75)}
      }}"""
    hosts, each = max(count // GPUS_PER_HOST, 1), min(count, GPUS_PER_HOST)
    found = topologies.get_topology_desc(chip.name, "cuda", target_config=target, topology=f"1x{hosts}x{each}")
    return tuple(found.devices)
