"""A trained T5 as a program that runs without this code: StableHLO by jax.export, for any batch size on any platform.

    python -m t5x_lite.export PATH DEST [--method=beam --max_length=64]

DEST gets the program, `predict.jax_export`: token ids in, token ids out, decoding included, for CPU, CUDA and TPU; the
parameters beside it, `params.safetensors`, which a program of 2 GB at most could not hold; the tokenizer's files; and a
README.md that says how to call it. JAX reads a program for at least six months after the release that wrote it.

Knows loading and decoding. It must not know text, tasks, runs or gin. Nothing is made for TensorFlow: JAX's converter
to a SavedModel (jax2tf) needs TensorFlow and is on its way out; StableHLO is what takes its place.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int, UInt32

from t5x_lite import convert
from t5x_lite.convert import tensors
from t5x_lite.errors import ExistingFileError, UserError
from t5x_lite.inference import decode
from t5x_lite.inference.pretrained import LoadedModel, load
from t5x_lite.model.config import Dtype

PLATFORMS = ("cpu", "cuda", "tpu")

_README = """\
# {name}

A {layout} as a program, by t5x_lite: {decoding}, at most {max_length} tokens.

```python
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file

program = jax.export.deserialize(pathlib.Path("predict.jax_export").read_bytes())
params = jax.device_put(load_file("params.safetensors"))
predict = jax.jit(program.call)  # compiled anew for each shape of inputs
inputs = np.array([[100, 200, 1, 0], [300, 400, 500, 1]], np.int32)  # [B, S]; 1 ends a row, 0 fills it up
tokens, scores = predict(params, inputs{seed})  # [B, {num_decodes}, {max_length}] and [B, {num_decodes}]
```

Rows of tokens end with 1, and 0 comes after it; scores are log-probabilities{ranked}. Parameters are float32,
activations {dtype}. This needs jax (written by {version}; it reads programs for at least six months), numpy and
safetensors; no t5x_lite.
"""


def program(model: LoadedModel, max_length: int, decoding: decode.Decoding) -> jax.export.Exported:
    """Decoding as a function of flat parameters (`tensors.flat`), tokens [B, S] and, for "sample", a seed.

    It returns what `decode.generate` does; B and S are free.
    """

    def predict(
        params: dict[str, Array], tokens: Int[Array, "B S"], seed: UInt32[Array, ""] | None = None
    ) -> tuple[Int[Array, "B N T"], Float[Array, "B N"]]:
        nested = traverse_util.unflatten_dict(params, sep="/")
        key = None if seed is None else jax.random.key(seed)
        return decode.generate(nested, tokens, config=model.config, max_length=max_length, decoding=decoding, key=key)

    params = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.flat(model.params).items()}
    arguments: list[Any] = [params, jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, s"), jnp.int32)]
    if decoding.method == "sample":
        arguments.append(jax.ShapeDtypeStruct((), jnp.uint32))
    return jax.export.export(jax.jit(predict), platforms=PLATFORMS)(*arguments)


def export(
    path: str | Path,
    dest: str | Path,
    max_length: int,
    decoding: decode.Decoding,
    dtype: Dtype = "float32",
) -> None:
    """Writes the model in `path` (all that `load` takes) to the folder `dest`, as the module says.

    Raises:
      FileExistsError: `dest` holds something.
      ValueError: it is no T5; and what `load` raises.
    """
    path, dest = Path(path).expanduser(), Path(dest).expanduser()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ExistingFileError(f"{dest} is there and not empty: name a new folder")
    model = load(path, dtype=dtype)
    if not isinstance(model, LoadedModel):
        raise UserError(f"{path} holds no T5, and only T5 generates")
    written = program(model, max_length, decoding).serialize()
    dest.mkdir(parents=True, exist_ok=True)
    (dest / "predict.jax_export").write_bytes(written)
    params = {name: tensors.in_memory(np.asarray(x)) for name, x in tensors.flat(model.params).items()}
    tensors.write_safetensors(dest / "params.safetensors", params)
    convert.copy_tokenizer(path, dest, model.config)
    said = {
        "name": dest.resolve().name,
        "layout": "T5 decoder" if model.config.decoder_only else "T5",
        "decoding": decoding,
        "max_length": max_length,
        "num_decodes": decoding.num_decodes,
        "seed": ", np.uint32(0)" if decoding.method == "sample" else "",
        "ranked": f" / ((5 + length) / 6)^{decoding.alpha}" if decoding.method == "beam" else "",
        "version": jax.__version__,
        "dtype": dtype,
    }
    (dest / "README.md").write_text(_README.format(**said))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m t5x_lite.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", help="Hugging Face directory, T5X checkpoint, MODEL_DIR or checkpoint")
    parser.add_argument("dest", help="folder to make")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of a result at most")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="of activations")
    parser.add_argument("--method", choices=get_args(decode.Method), default=decode.Decoding.method)
    fields = ("num_decodes", "beam_size", "alpha", "temperature", "top_k", "top_p")
    for name in fields:
        default = getattr(decode.Decoding, name)
        names = (f"--{name}", "--num_return") if name == "num_decodes" else (f"--{name}",)
        parser.add_argument(*names, type=type(default), default=default)
    asked = parser.parse_args(arguments)
    try:
        decoding = decode.Decoding(asked.method, **{name: getattr(asked, name) for name in fields})
        export(asked.path, asked.dest, asked.max_length, decoding, asked.dtype)
    except (UserError, OSError) as error:
        print(f"t5x_lite.export: {error}", file=sys.stderr)
        return 2
    print(f"{asked.dest}: {decoding}, at most {asked.max_length} tokens; see its README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
