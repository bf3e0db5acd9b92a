"""What the makers say of their chips: memory, peak FLOP/s, bandwidths, and which sets of them can be had.

A chip is one JAX device. This module knows no models and touches no devices.
"""

import dataclasses
from typing import Any, Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates are peaks, a second, as published.

    name: as in a topology's name, "v5e" in "v5e:4x4".
    kinds: how `device_kind` of its JAX device begins.
    memory: bytes of HBM that a program can have.
    flops: dense bfloat16 FLOP/s.
    memory_bandwidth: bytes/s to and from HBM.
    link_bandwidth: bytes/s that it can send over all its links (ICI, NVLink) together: half of what is published as
      bidirectional.
    network_bandwidth: bytes/s that it can send to another slice or host: its share of the host's network; None: not
      published.
    shapes: of TPU slices.
    cores: of a GPU, its streaming multiprocessors.
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
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    *("4x4x12", "4x4x16", "4x8x12", "8x8x12", "12x12x12", "12x16x16", "16x16x16", "16x16x24"),
)

# Memory: of a TPU what libtpu 0.0.42 allows (its compiler names it when it refuses a program), a little less than is
# published; of a GPU three quarters, which is what JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (per chip; shapes are those of the tables there). v4's links are
# six of 50 GB/s each way: Jouppi et al., "TPU v4" (2023), table 4. Network: v5p has it per chip, v5e and v6e per host
# of eight. GPU: NVIDIA's data sheets of the A100, H100 and H200, and for networks those of DGX A100 and DGX H100 (a 200
# or 400 Gb/s adapter for each GPU).
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
    """The chip of a `jax.Device`; None if it is not in the table. Of several kinds that fit, the longest counts."""
    fitting = [(len(k), chip) for chip in CHIPS for k in chip.kinds if device.device_kind.startswith(k)]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None
