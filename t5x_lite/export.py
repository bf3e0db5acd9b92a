"""Export a trained T5 as a StableHLO program (jax.export) that runs without t5x_lite, for any batch size.

    python -m t5x_lite.export PATH DEST [--method=beam --max_length=64]

DEST contains the program `predict.jax_export` (token ids to token ids, with decoding, for CPU, CUDA and TPU); the
parameters in `params.safetensors`, because a program is limited to 2 GB; the tokenizer's files; and a README.md with
an example call. JAX reads a program for at least six months after the release that wrote it.

Must not depend on text, tasks, runs or gin. There is no TensorFlow SavedModel: JAX's converter (jax2tf) needs
TensorFlow and is being retired in favour of StableHLO.
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

from t5x_lite import convert, storage
from t5x_lite.convert import hub, tensors
from t5x_lite.convert.bucket import AnyPath
from t5x_lite.errors import UserError
from t5x_lite.inference import decode
from t5x_lite.inference.pretrained import LoadedModel, load
from t5x_lite.model.config import Dtype

PLATFORMS = ("cpu", "cuda", "tpu")

_README = """\
# {name}

A {layout} exported by t5x_lite: {decoding}, at most {max_length} tokens.

```python
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file

program = jax.export.deserialize(pathlib.Path("predict.jax_export").read_bytes())
params = jax.device_put(load_file("params.safetensors"))
predict = jax.jit(program.call)  # compiled once per shape of inputs
inputs = np.array([[100, 200, 1, 0], [300, 400, 500, 1]], np.int32)  # [B, S]; 1 is EOS, 0 is padding
tokens, scores = predict(params, inputs{seed})  # [B, {num_decodes}, {max_length}] and [B, {num_decodes}]
```

Rows of tokens end with 1 (EOS), followed by 0; scores are log-probabilities{ranked}. Parameters are float32,
activations {dtype}. Requires jax (written by {version}; later releases read it for at least six months), numpy and
safetensors, but not t5x_lite.
"""


def program(model: LoadedModel, max_length: int, decoding: decode.Decoding) -> jax.export.Exported:
    """Export decoding as a function of flat parameters (`tensors.flat`), tokens [B, S] and, for "sample", a seed.

    The function returns the results of `decode.generate`; B and S are symbolic.
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
    """Write the model at `path` (see `load`) to the folder `dest`, which is there when it is complete, in the form
    described in the module.

    Raises:
      ExistingFileError: `dest` exists and is not empty.
      UserError: the model is not a T5; also the errors of `load`.
    """
    with storage.whole_folder(Path(dest).expanduser()) as folder:
        _export(hub.located(path), Path(dest).expanduser().resolve().name, folder, max_length, decoding, dtype)


def _export(place: AnyPath, name: str, folder: Path, max_length: int, decoding: decode.Decoding, dtype: Dtype) -> None:
    model = load(place, dtype=dtype)
    if not isinstance(model, LoadedModel):
        raise UserError(f"{place} is not a T5; only T5 models generate text")
    serialized = program(model, max_length, decoding).serialize()
    folder.mkdir()
    (folder / "predict.jax_export").write_bytes(serialized)
    params = {name: tensors.in_memory(np.asarray(x)) for name, x in tensors.flat(model.params).items()}
    tensors.write_safetensors(folder / "params.safetensors", params)
    convert.copy_tokenizer(place, folder, model.config)
    values = {
        "name": name,
        "layout": "T5 decoder" if model.config.decoder_only else "T5",
        "decoding": decoding,
        "max_length": max_length,
        "num_decodes": decoding.num_decodes,
        "seed": ", np.uint32(0)" if decoding.method == "sample" else "",
        "ranked": f" / ((5 + length) / 6)^{decoding.alpha}" if decoding.method == "beam" else "",
        "version": jax.__version__,
        "dtype": dtype,
    }
    (folder / "README.md").write_text(_README.format(**values), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m t5x_lite.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", help="Hugging Face directory, T5X checkpoint, MODEL_DIR or checkpoint")
    parser.add_argument("dest", help="folder to create")
    parser.add_argument("--max_length", type=int, default=128, help="maximum number of generated tokens")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="dtype of activations")
    parser.add_argument("--method", choices=get_args(decode.Method), default=decode.Decoding.method)
    fields = ("num_decodes", "beam_size", "alpha", "temperature", "top_k", "top_p")
    for name in fields:
        default = getattr(decode.Decoding, name)
        names = (f"--{name}", "--num_return") if name == "num_decodes" else (f"--{name}",)
        parser.add_argument(*names, type=type(default), default=default)
    args = parser.parse_args(arguments)
    try:
        decoding = decode.Decoding(args.method, **{name: getattr(args, name) for name in fields})
        export(args.path, args.dest, args.max_length, decoding, args.dtype)
    except (UserError, OSError) as error:
        print(f"t5x_lite.export: {error}", file=sys.stderr)
        return 2
    print(f"{args.dest}: {decoding}, at most {args.max_length} tokens; see its README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
