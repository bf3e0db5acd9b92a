"""Published specs of TPUs and GPUs: memory, peak FLOP/s, bandwidth, slice shapes.

A chip is one JAX device. This module does not depend on models and does not access devices.
"""

import dataclasses
from typing import Any, Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak rates and memory of one chip.

    name: name in a topology, "v5e" in "v5e:4x4".
    kinds: prefixes of `device_kind` of its JAX device.
    memory: bytes of HBM available to a program.
    flops: dense bfloat16 FLOP/s.
    memory_bandwidth: HBM bytes/s.
    link_bandwidth: bytes/s sent over all links (ICI, NVLink): half of the published bidirectional bandwidth.
    network_bandwidth: bytes/s sent to other slices or hosts: its share of the host's network; None if not published.
    shapes: shapes of TPU slices.
    cores: streaming multiprocessors of a GPU.
    """

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    kinds: tuple[str, ...] = ()
    memory: float = 0.0
    flops: float = 0.0
    memory_bandwidth: float = 0.0
    link_bandwidth: float = 0.0
    network_bandwidth: float | None = None
    shapes: tuple[str, ...] = ()
    cores: int = 0


SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES_3D = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "4x4x12",
    "4x4x16",
    "4x8x12",
    "8x8x12",
    "12x12x12",
    "12x16x16",
    "16x16x16",
    "16x16x24",
)

# Memory of TPUs: the limit of libtpu 0.0.42 (reported in its out-of-memory errors), slightly below the published size.
# Memory of GPUs: three quarters, JAX's default unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
# TPU specs and slice shapes: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, per chip. A v4 has six links of 50 GB/s
# each way: Jouppi et al., "TPU v4" (2023), table 4. Network bandwidth is published per chip for v5p, and per host of
# eight chips for v5e and v6e. GPU specs: NVIDIA's data sheets of A100, H100 and H200; networks: DGX A100 and DGX H100
# (a 200 or 400 Gb/s adapter per GPU).
CHIPS = (
    Chip("v4", "tpu", ("TPU v4",), 30.75 * GIB, 275e12, 1200e9, 300e9, None, SHAPES_3D),
    Chip("v5e", "tpu", ("TPU v5 lite", "TPU v5e"), 15.75 * GIB, 197e12, 819e9, 200e9, 2 * 12.5e9 / 8, SHAPES_2D),
    Chip("v5p", "tpu", ("TPU v5",), 95.74 * GIB, 459e12, 2765e9, 600e9, 6.25e9, SHAPES_3D),
    Chip("v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 31.25 * GIB, 918e12, 1638e9, 400e9, 4 * 25e9 / 8, SHAPES_2D),
    Chip("a100-40gb", "gpu", ("NVIDIA A100",), 0.75 * 40 * GIB, 312e12, 1555e9, 300e9, 25e9, cores=108),
    Chip("a100-80gb", "gpu", ("NVIDIA A100-SXM4-80GB",), 0.75 * 80 * GIB, 312e12, 2039e9, 300e9, 25e9, cores=108),
    Chip("h100", "gpu", ("NVIDIA H100",), 0.75 * 80 * GIB, 989e12, 3350e9, 450e9, 50e9, cores=132),
    Chip("h100-pcie", "gpu", ("NVIDIA H100 PCIe",), 0.75 * 80 * GIB, 756e12, 2000e9, 300e9, 50e9, cores=114),
    Chip("h100-nvl", "gpu", ("NVIDIA H100 NVL",), 0.75 * 94 * GIB, 835e12, 3900e9, 300e9, 50e9, cores=132),
    Chip("h200", "gpu", ("NVIDIA H200",), 0.75 * 141e9, 989e12, 4800e9, 450e9, 50e9, cores=132),
    Chip("cpu", "cpu"),
)
GPUS_PER_HOST = 8


def of_device(device: Any) -> Chip | None:
    """Return the chip of a `jax.Device`, by the longest matching prefix in `kinds`; None if it is not in the table."""
    matches = [(len(k), chip) for chip in CHIPS for k in chip.kinds if device.device_kind.startswith(k)]
    return max(matches, key=lambda match: match[0])[1] if matches else None
