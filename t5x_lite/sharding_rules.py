"""Rules from the logical axes of arrays to the axes of the mesh; sharding.py applies them. This module imports no JAX.

The mesh has three axes. `data` replicates parameters and splits the batch; `fsdp` splits both; `tensor` splits heads,
MLP and vocabulary. A run may set other rules.
"""

from collections.abc import Sequence

MESH_AXES = ("data", "fsdp", "tensor")

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

# In order of precedence. An array uses a mesh axis only once: `embed` splits parameters over fsdp but not activations,
# whose batch axis already uses fsdp. An axis without a rule is not split.
RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("joined_kv", "tensor"),
    ("embed", "fsdp"),
)
