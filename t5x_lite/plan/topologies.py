"""Topologies of hardware that you do not have, by name, to compile for.

    v5e:4x4      one TPU slice: chip and shape, as Google names them        2xv5e:16x16    two slices
    h100:8       eight GPUs, eight per host                                 cpu:8          eight CPU devices

This module handles chips and JAX's compilers; it must not depend on models.
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
    """Devices to compile for. real: the devices are of the named chip; False: CPU devices stand in for GPUs."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    real: bool = True

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Options for XLA: use cuBLAS, since without a GPU XLA cannot autotune its own kernels for products."""
        without_gpu = self.chip.platform == "gpu" and self.real
        return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0} if without_gpu else {}

    @property
    def domain_of(self) -> dict[Any, int]:
        """The slice (TPU) or host (GPU) of each device; links within one are fast."""
        if self.chip.platform == "gpu":
            return {device: n // GPUS_PER_HOST for n, device in enumerate(self.devices)}
        return {device: getattr(device, "slice_index", None) or 0 for device in self.devices}


def find(name: str) -> Topology:
    """Return the topology called `name`. Call it before JAX's first use of a device: it restricts JAX to CPU devices.

    Raises:
      UserError: the chip or slice is unknown, its compiler is not installed, or JAX has already started.
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
        _start_cpu_only(2)  # two, because a single CPU device selects another attention implementation
        _disable_compilation_cache()
        return Topology(name, chip, _tpus(name, chip, shape, slices))
    count = int(shape) if shape.isdecimal() else 0
    if count < 1 or slices > 1:
        raise UserError(f"--topology={name}: write {chip.name}:N for N devices, such as {chip.name}:8")
    if chip.platform == "gpu":
        if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
            raise UserError(f"--topology={name}: more than {GPUS_PER_HOST} GPUs must be a multiple of {GPUS_PER_HOST}")
        if _has_cuda():
            _start_cpu_only(2)
            _disable_compilation_cache()
            return Topology(name, chip, _gpus(chip, count))
        return Topology(name, chip, _start_cpu_only(max(count, 2))[:count], real=False)
    return Topology(name, chip, _start_cpu_only(count)[:count])


def _start_cpu_only(count: int) -> tuple[Any, ...]:
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    devices = jax.devices()
    if devices[0].platform != "cpu" or len(devices) < count:
        raise UserError(f"JAX has already started, with {devices}: plan in a new process")
    return tuple(devices)


def _disable_compilation_cache() -> None:
    """Disable JAX's compilation cache, which loads programs onto devices that do not exist here."""
    jax.config.update("jax_enable_compilation_cache", False)


def _tpus(name: str, chip: Chip, shape: str, slices: int) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs libtpu, the TPU compiler (it works without a TPU): "
            "pip install -r requirements-tpu.txt -c constraints.txt"
        )
    quiet = {"TPU_MIN_LOG_LEVEL": "4", "TPU_STDERR_LOG_LEVEL": "4", "TPU_LOG_DIR": "disabled"}
    alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    alone |= {"TPU_ACCELERATOR_TYPE": "v5e-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for variable, value in (quiet | alone).items():
        os.environ.setdefault(variable, value)  # else libtpu queries Google's metadata server and takes a lock
    # Links wrap around in multiples of 4x4x4 cubes, and along a side of 16 chips of a v5e or v6e.
    sides = [int(side) for side in shape.split("x")]
    cubes = len(sides) == 3 and all(side % 4 == 0 for side in sides)
    options: dict[str, Any] = {"wrap": (True,) * 3 if cubes else tuple(side == 16 for side in (*sides, 1)[:3])}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device, as on Cloud TPU VMs
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    description = topologies.get_topology_desc(f"{chip.name}:{shape}", "tpu", **options)
    return tuple(description.devices)


def _has_cuda() -> bool:
    plugins = importlib.util.find_spec("jax_plugins")
    return plugins is not None and any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13))


def _gpus(chip: Chip, count: int) -> tuple[Any, ...]:
    """Return GPUs described by XLA's GpuTargetConfigProto, with numbers from NVIDIA's tuning guides."""
    ampere = chip.name.startswith("a100")
    shared, l2, clock = (163, 40, 1.41) if ampere else (227, 50, 1.98)  # KiB per block, MiB, GHz
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
    hosts, per_host = max(count // GPUS_PER_HOST, 1), min(count, GPUS_PER_HOST)
    shape = f"1x{hosts}x{per_host}"
    description = topologies.get_topology_desc(chip.name, "cuda", target_config=target, topology=shape)
    return tuple(description.devices)
