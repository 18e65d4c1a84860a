"""Safetensors files: written whole or not at all, and hashed as they are written and as they are read.

    8 bytes    length of the header, little-endian
    header     JSON, {"__metadata__": {…}, name: {"dtype": "F32", "shape": […], "data_offsets": [from, to]}, …},
               padded with spaces to a multiple of 8 bytes
    data       the tensors' bytes without gaps, in the order of the header, widest types first

The safetensors package reads these files and writes the same bytes. It is not used because what it raises on a full
disk is no OSError, and because it maps a file into memory, where bytes may change after they were hashed. One tensor
at a time is copied, never the whole file.
"""

import json
import os
from collections.abc import Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from routesae.machine.files import BadFile, open_regular, parse_json, replacing

METADATA, HASH = "__metadata__", "xxh3_128"
NO_HASH = "0" * 32
LARGEST_HEADER = 1 << 24
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile(NamedTuple):
    """What a file holds. hash: xxh3-128 of the bytes that were read, with zeros where they hold it themselves."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    hash: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors, on any device, and return the xxh3-128 of the file. Raises OSError.

    metadata: stands in the header, together with that hash, which the reader then compares.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {METADATA: {**metadata, HASH: NO_HASH}} if metadata else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    hasher = xxhash.xxh3_128()
    with replacing(path) as file:
        head: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
        for data in chain(head, (_bytes_of(tensor) for _, tensor in ordered)):
            file.write(data)
            hasher.update(data)
        if metadata:
            file.seek(len(head[0]))
            file.write(text.replace(NO_HASH.encode(), hasher.hexdigest().encode()))
    return hasher.hexdigest()


def read_tensors(path: Path) -> TensorFile:
    """Read a file to the CPU. Raises BadFile, without the path, if it is not whole; OSError if it cannot be read."""
    hasher = xxhash.xxh3_128()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
            raise BadFile(f"{size:,} bytes, and this machine has a memory of {memory:,}")
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, LARGEST_HEADER):
            raise BadFile("not a safetensors file, or cut")
        text = file.read(length)
        tensors, end = {}, 0
        try:
            header = parse_json(text)
            metadata: dict[str, str] = {**header.pop(METADATA, {})}
            hasher.update(head + text.replace(metadata.get(HASH, NO_HASH).encode(), NO_HASH.encode()))
            for name, place in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype = DTYPES[place["dtype"]]
                begin, end = end, end + prod(place["shape"]) * dtype.itemsize
                if place["data_offsets"] != [begin, end] or end > size - 8 - length:
                    raise BadFile(f"{name} is not where its header says, or the file was cut")
                tensors[name] = torch.empty(place["shape"], dtype=dtype)
                data = _bytes_of(tensors[name])
                if file.readinto(data) != len(data):
                    raise BadFile("cut while it was read")
                hasher.update(data)
        except (AttributeError, LookupError, TypeError, RuntimeError) as error:
            raise BadFile(f"its header is not that of a safetensors file ({error!r})") from error
        if end != size - 8 - length:
            raise BadFile("there are bytes after its last tensor")
        if metadata.pop(HASH, digest := hasher.hexdigest()) != digest:
            raise BadFile("it was altered: its checksum differs")
    return TensorFile(tensors, metadata, digest)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor: its own memory, if that is on the CPU and contiguous."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
