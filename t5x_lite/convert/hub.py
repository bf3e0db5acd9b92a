"""Download models from the Hugging Face hub, and upload them: a name such as google/flan-t5-small to and from a folder.

The package huggingface_hub does it, and is imported when it is needed. Must not depend on models or file formats.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5x_lite.convert.bucket import AnyPath, place_of
from t5x_lite.errors import MissingFileError, MissingPackageError, UserError

log = logging.getLogger(__name__)

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?")
_WEIGHTS = ("*.safetensors", "*.msgpack", "*.bin")  # the first that the repository has
_OTHERS = ["*.json", "*.model", "vocab.txt"]


def is_name(path: str | AnyPath) -> bool:
    """Return whether this is OWNER/NAME[@REVISION], and no path: neither it nor its parent folder is here."""
    local = Path(str(path)).expanduser()
    return _NAME.fullmatch(str(path)) is not None and not (local.exists() or local.parent.exists())


def located(path: str | AnyPath) -> AnyPath:
    """Return where a model is: a place in a bucket, a local folder, or that of a name in the hub's cache.

    What the cache has is not looked up on the hub.

    Raises:
      MissingPackageError: huggingface_hub is not installed.
      MissingFileError: the model cannot be downloaded.
    """
    match = _NAME.fullmatch(str(path))
    if match is None or not is_name(path):
        return place_of(path)
    huggingface_hub = _client(f"{str(path)!r} does not exist here. To read a model of that name from")
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
        raise MissingFileError(
            f"{str(path)!r} does not exist here, and cannot be read from the Hugging Face hub: {_reason(error)} Check "
            f"the name and the network (HF_ENDPOINT; HF_TOKEN for private models), or run `hf download {name} "
            "--local-dir DIR` where there is one, and name DIR"
        ) from error
    return Path(folder)


def check_login(name: str) -> None:
    """Ask the hub who the user is, before the work of an upload to the repository `name`.

    Raises:
      MissingPackageError: huggingface_hub is not installed.
      UserError: there is no token, the hub does not accept it, or the hub cannot be reached.
    """
    huggingface_hub = _client(f"To write {name} on")
    with _upload_errors(name):
        huggingface_hub.HfApi().whoami()


def upload(folder: Path, name: str, *, revision: str | None, private: bool, message: str) -> str:
    """Upload the files of `folder` as one commit to the model repository `name`, and return its address.

    Args:
      revision: a branch, which is created if it does not exist; None is the main branch.
      private: whether the repository must be private.

    Raises UserError if the repository cannot be written, or if it must be private, exists and is public.
    """
    huggingface_hub = _client(f"To write {name} on")
    with _upload_errors(name):
        api = huggingface_hub.HfApi()
        url = str(api.create_repo(name, private=private or None, exist_ok=True))
        if private and not api.model_info(name).private:
            raise UserError(
                f"{name} exists on the Hugging Face hub and is public, and --private is only for new repositories: "
                "make it private in its settings, or name another repository"
            )
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message)
    return url if revision is None else f"{url}/tree/{revision}"


@contextlib.contextmanager
def _upload_errors(name: str) -> Iterator[None]:
    """Turn errors of the hub's client into a UserError of one line that names the repository and the cure."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the hub's client or of its HTTP library
        status = _status(error)
        if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
            reason = f"there is no valid token: {LOG_IN}, with a token that may write"
        elif status == 403:
            reason = f"your token may not write there: {LOG_IN}, with a token that may write to {name.split('/')[0]}"
        elif status == 404:
            reason = "the hub has no model of that name for your token; data sets and Spaces are other repositories"
        else:
            reason = f"{_reason(error)} Check the name and the network (HF_ENDPOINT), and run it again"
        raise UserError(f"{name} cannot be written on the Hugging Face hub: {reason}") from error


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error of the hub's client, or of the error that caused it."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response.status_code
        error = error.__cause__
    return None


def _reason(error: Exception) -> str:
    """Return the texts of an error and of its cause in one line."""
    texts = dict.fromkeys(str(e) or repr(e) for e in (error, error.__cause__) if e is not None)
    return " ".join(" ".join(texts).split())[:300].rstrip(".") + "."


def _client(purpose: str) -> Any:
    """Return the package huggingface_hub. Raises MissingPackageError, which begins with the purpose."""
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise MissingPackageError(f"{purpose} the Hugging Face hub: pip install 't5x_lite[hub]'") from None
    return huggingface_hub


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
