"""The data position as a part of an Orbax checkpoint: files that the data iterator writes and reads back."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future


@runtime_checkable
class DataIterator(Protocol):
    """An iterator that can write its position as files into an empty local folder, and restore it from them.

    Each process writes its own files, under names that no other process uses. `restore` gets one folder with the files
    of all processes, which may be remote; without such files, or if it is missing, it begins at the start.
    """

    def save(self, path: str) -> None: ...

    def restore(self, path: str) -> None: ...


class DataPositionHandler(ocp.handlers.AsyncCheckpointHandler):
    """Writes ``data/``, to which every process adds its files, in the background together with the arrays."""

    async def async_save(self, directory: epath.Path, args: "DataPositionSave") -> list[future.Future]:  # pyright: ignore[reportIncompatibleMethodOverride]
        async def write() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            for name, content in args.files.items():
                (directory / name).write_bytes(content)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="data_position_save")]

    def save(self, directory: epath.Path, args: "DataPositionSave") -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError("The data position is only written through Orbax's asynchronous checkpointer.")

    def restore(self, directory: epath.Path, args: "DataPositionRestore") -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        args.iterator.restore(str(directory))


@ocp.args.register_with_handler(DataPositionHandler, for_save=True)
@dataclasses.dataclass
class DataPositionSave(ocp.args.CheckpointArgs):
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, iterator: DataIterator) -> "DataPositionSave":
        """Capture the position of `iterator` synchronously, so that it belongs to the same step as the arrays."""
        with tempfile.TemporaryDirectory() as folder:
            iterator.save(folder)
            return cls({path.name: path.read_bytes() for path in Path(folder).iterdir()})


@ocp.args.register_with_handler(DataPositionHandler, for_restore=True)
@dataclasses.dataclass
class DataPositionRestore(ocp.args.CheckpointArgs):
    iterator: DataIterator
