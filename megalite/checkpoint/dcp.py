"""torch's distributed checkpoint (DCP) without its pickle: the metadata file is JSON, tensors load with weights_only.

DCP plans who writes and who reads which shard; stock DCP keeps that plan in a pickle that runs code when loaded.
Everything stored is a tensor; a checkpoint that names a file outside its own folder is refused.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megalite.checkpoint.planner import HeldLoadPlanner, HeldSavePlanner
from megalite.comm import Communicator
from megalite.errors import UserError
from megalite.mesh import AXES
from megalite.parallel.boxes import Held
from megalite.progress import Progress

METADATA_FILE = "metadata.json"


class JsonWriter(dcp.FileSystemWriter):
    """DCP's file writer (one file a rank, synced to disk) with JSON metadata."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored = {result.index: result.storage_data for written in results for result in written}
        tensors: dict[str, Any] = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), f"{name} is not a tensor"
            chunks = []
            for chunk in entry.chunks:
                info = stored[MetadataIndex(name, chunk.offsets)]
                place = {"file": info.relative_path, "offset": info.offset, "length": info.length}
                chunks.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), **place})
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": chunks}
        with open(Path(self.path) / METADATA_FILE, "w") as file:
            json.dump({"format": "megalite-dcp", "version": 1, "tensors": tensors}, file)
            file.flush()
            os.fsync(file.fileno())


def read_metadata(folder: Path) -> Metadata:
    """DCP's metadata rebuilt from JSON; UserError when it is missing, malformed or points outside `folder`."""
    path = folder / METADATA_FILE
    try:
        document = json.loads(path.read_text())
        entries: dict[str, Any] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for name, entry in document["tensors"].items():
            chunks = []
            for chunk in entry["chunks"]:
                if Path(chunk["file"]).name != chunk["file"]:
                    raise ValueError(f"tensor {name} lies outside the folder: {chunk['file']}")
                chunks.append(ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])))
                index = MetadataIndex(name, chunk["offsets"])
                storage[index] = _StorageInfo(chunk["file"], int(chunk["offset"]), int(chunk["length"]))
            dtype = getattr(torch, entry["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"tensor {name} has no dtype {entry['dtype']}")
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["shape"]), chunks)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error}); use another one or delete its folder") from error
    return Metadata(entries, storage_data=storage, storage_meta=StorageMeta())


class JsonReader(dcp.FileSystemReader):
    """DCP's file reader over `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


@contextmanager
def quiet_alone() -> Iterator[None]:
    """DCP warns that it works without a process group; with one process that is what we asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def first_cause(error: dcp.CheckpointException) -> str:
    """What went wrong on the first rank that failed, in one line."""
    cause = next(iter(error.failures.values()))[0]
    return str(getattr(cause, "strerror", None) or " ".join(str(cause).split()))


def save_tensors(
    folder: Path, tensors: Mapping[str, Held], group: dist.ProcessGroup | None, show: bool = True
) -> None:
    """Write `tensors` into `folder`, each rank of `group` (None: this process alone) what it stores of them. `show`:
    whether this rank tells its progress.

    Together the ranks must hold every element; replicas share out what they all hold. OSError on every rank when one of
    them could not write.
    """
    writer = JsonWriter(folder, single_file_per_rank=True, sync_files=True)
    try:
        with quiet_alone(), Progress(f"saving {folder.stem}", unit="B", show=show) as bar:
            planner = HeldSavePlanner(tensors, bar)
            dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        raise OSError(0, first_cause(error)) from error


def load_tensors(
    folder: Path, tensors: Mapping[str, Held], comm: Communicator | None = None, also_stored: tuple[str, ...] = ()
) -> None:
    """Fill `tensors` in place, whatever layout stored them, with all ranks of `comm` (None: this process alone).

    Every one must be there with its logical shape and dtype; what else is stored must begin with "rng.", with one of
    `also_stored`, or be wanted by another rank. UserError otherwise, on every rank.
    """
    metadata = read_metadata(folder).state_dict_metadata
    problems = _mismatches(metadata, tensors)
    names = sorted(name for name in metadata if not name.startswith(("rng.", *also_stored)))
    wanted = torch.tensor([int(name in tensors) for name in names])
    if comm is not None:
        comm.all_reduce(wanted, *AXES, op="max")
        problems = list(dict.fromkeys(line for lines in comm.gather_json(problems[:3]) for line in lines))
    problems += [f"{name} unexpected" for name, known in zip(names, wanted.tolist(), strict=True) if not known]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{folder}: made by another model or optimizer ({'; '.join(problems[:3])}{more})")
    group = None if comm is None else comm.mesh.group(*AXES)
    reader, show = JsonReader(folder), comm is None or comm.mesh.rank == 0
    try:
        with quiet_alone(), Progress(f"loading {folder.name}", unit="pieces", show=show) as bar:
            planner = HeldLoadPlanner(tensors, bar)
            dcp.load({}, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        raise UserError(
            f"{folder}: damaged ({first_cause(error)}); delete the folder to go on from an older checkpoint"
        ) from error


def _mismatches(metadata: Mapping[str, Any], tensors: Mapping[str, Held]) -> list[str]:
    """What `tensors` asks for and is not stored as it should be."""
    problems = [f"{name} missing" for name in tensors if name not in metadata]
    for name, held in tensors.items():
        stored = metadata.get(name)
        if isinstance(stored, TensorStorageMetadata) and (stored.size, stored.properties.dtype) != (
            torch.Size(held.shape),
            held.dtype,
        ):
            expected = f"{held.shape} {held.dtype}"
            problems.append(f"{name} is {tuple(stored.size)} {stored.properties.dtype}, expected {expected}")
    return problems
