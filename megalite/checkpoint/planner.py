"""Which boxes of which logical tensors a rank writes and reads: DCP planners that let any layout load any other."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megalite.parallel.boxes import Box, Held
from megalite.progress import Progress


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box[0]), torch.Size(box[1]))


class HeldSavePlanner(dcp.DefaultSavePlanner):
    """Offers every box that this rank stores; what replicas offer too is written by one of them, shared out."""

    def __init__(self, held: Mapping[str, Held], bar: Progress) -> None:
        super().__init__(flatten_state_dict=False)
        self.held, self.bar = held, bar
        self.values: dict[MetadataIndex, torch.Tensor] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner({}, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, held in self.held.items():
            for box, values in held.parts if held.stores else ():
                index = MetadataIndex(name, box[0])
                properties = TensorProperties(dtype=values.dtype)
                data = TensorWriteData(_chunk(box), properties, torch.Size(held.shape))
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self.values[index] = values
        self.plan = SavePlan(items)
        return self.plan

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.bar.total = sum(self.values[item.index].nbytes for item in new_plan.items)
        return super().finish_plan(new_plan)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        self.bar.advance(self.values[index].nbytes)
        return self.values[index].detach()


class HeldLoadPlanner(dcp.DefaultLoadPlanner):
    """Reads into every box that this rank holds whatever stored chunks overlap it."""

    def __init__(self, held: Mapping[str, Held], bar: Progress) -> None:
        super().__init__(flatten_state_dict=False)
        self.held, self.bar = held, bar
        self.values = {MetadataIndex(name, box[0]): values for name, h in held.items() for box, values in h.read}

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner({}, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, held in self.held.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [_chunk(box) for box, _ in held.read])
        self.bar.total = len(items)
        return LoadPlan(items)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.bar.advance()

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.values[index]
