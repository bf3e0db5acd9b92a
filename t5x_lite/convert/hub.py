"""Find models on the Hugging Face hub: a name such as google/flan-t5-small becomes a folder of the hub's cache.

The package huggingface_hub does it, and is imported when it is needed. Must not depend on models or file formats.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from t5x_lite.errors import MissingFileError, MissingPackageError

log = logging.getLogger(__name__)

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?")
_WEIGHTS = ("*.safetensors", "*.msgpack", "*.bin")  # the first that the repository has
_OTHERS = ["*.json", "*.model", "vocab.txt"]


def is_name(path: str | Path) -> bool:
    """Return whether this is OWNER/NAME[@REVISION], and no path: neither it nor its parent folder is here."""
    local = Path(path).expanduser()
    return _NAME.fullmatch(str(path)) is not None and not (local.exists() or local.parent.exists())


def located(path: str | Path) -> Path:
    """Return the folder of a model: that of a name in the hub's cache, or `path` if it is not a name.

    What the cache has is not looked up on the hub.

    Raises:
      MissingPackageError: huggingface_hub is not installed.
      MissingFileError: the model cannot be downloaded.
    """
    match = _NAME.fullmatch(str(path))
    if match is None or not is_name(path):
        return Path(path).expanduser()
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise MissingPackageError(
            f"{str(path)!r} does not exist here. To read a model of that name from the Hugging Face hub: "
            "pip install 't5x_lite[hub]'"
        ) from None
    name, revision = match.groups()
    cached = _cached(huggingface_hub, name, revision)
    if cached is not None:
        return cached
    log.info("Downloading %s from the Hugging Face hub ...", path)
    try:
        files = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
        weights = next((kind for kind in _WEIGHTS if any(file.endswith(kind[1:]) for file in files)), _WEIGHTS[0])
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*_OTHERS, weights])
    except Exception as error:  # of the hub's client or of its HTTP library
        reason = " ".join((str(error) or repr(error)).split())[:300]
        raise MissingFileError(
            f"{str(path)!r} does not exist here, and cannot be read from the Hugging Face hub: {reason} Check the name "
            f"and the network (HF_ENDPOINT; HF_TOKEN for private models), or run `hf download {name} --local-dir DIR` "
            "where there is one, and name DIR"
        ) from error
    return Path(folder)


def _cached(huggingface_hub: Any, name: str, revision: str | None) -> Path | None:
    """Return the folder of a model that is completely in the hub's cache, or None."""
    for kind in _WEIGHTS:
        try:
            folder = huggingface_hub.snapshot_download(
                name, revision=revision, local_files_only=True, allow_patterns=[*_OTHERS, kind]
            )
            names = {file.name for file in Path(folder).iterdir() if file.exists()}
            indices = [Path(folder, name) for name in names if name.endswith(f"{kind[1:]}.index.json")]
            shards = {shard for index in indices for shard in json.loads(index.read_text())["weight_map"].values()}
        except Exception:  # of the hub's client, which says that it is not there; or a damaged index
            continue
        if "config.json" in names and shards <= names and any(name.endswith(kind[1:]) for name in names):
            return Path(folder)
    return None
