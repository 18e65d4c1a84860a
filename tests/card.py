"""A stand-in for a GPU: tensors in host memory that say they are on cuda:0, and a record of what comes after what.

Everything is computed at once, so numbers are right whatever the order. What may go wrong on a GPU is found by vector
clocks instead: each stream, and the host, knows how far each other one was when it last heard of it (an event waited
for, a synchronisation, what the host knew when it launched something). Two accesses to one memory, one of them a
write, of which neither knows of the other, are a race; so is memory given back to its stream that another still
reads, and a copy to the device that is not asynchronous. `races` holds a line for each.

What it does not check: the kernels, the allocator, and anything that does not go through torch's Python functions.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

CUDA = torch.device("cuda:0")
HOST = "host"
TO_HOST = {"cpu", "item", "tolist", "nonzero", "__bool__", "__float__", "__int__", "__index__"}  # which wait


class Memory:
    """One allocation: who has it, and every access (agent, its clock then, whether it wrote)."""

    def __init__(self, card: Card, address: int, size: int, owner: str):
        self.card, self.address, self.size, self.owner = card, address, size, owner
        self.accesses: list[tuple[str, int, bool]] = []
        self.recorded: set[str] = set()
        self.used_by_threads = 0

    def __del__(self) -> None:
        known = self.card.known[self.owner] | self.card.known[HOST]
        for agent, clock, _ in self.accesses:
            if self.owner != HOST and agent not in (self.owner, *self.recorded) and known[agent] < clock:
                self.card.races.append(f"{self.owner}'s memory is free while {agent} may use it")


class Stream:
    def __init__(self, card: Card, name: str):
        self.card, self.name = card, name

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.card)
        event.known = Counter(self.card.known[self.name])
        return event

    def wait_event(self, event: Event) -> None:
        self.card.hear("wait_event", self.name, event.known)

    def synchronize(self) -> None:
        self.card.hear("synchronize", HOST, self.card.known[self.name])


class Event:
    def __init__(self, card: Card):
        self.card, self.known = card, Counter[str]()

    def synchronize(self) -> None:
        self.card.hear("synchronize", HOST, self.known)


class OnCard(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return CARDS[-1].call(func, args, kwargs or {})

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        if stream.card.without != "record_stream":
            self.memory.recorded.add(stream.name)  # type: ignore[attr-defined]


CARDS: list[Card] = []


class Card:
    """without: a call that has no effect (wait_event, synchronize, record_stream), as if it had been left out."""

    def __init__(self, without: str = ""):
        self.without = without
        self.races: list[str] = []
        self.known: dict[str, Counter[str]] = {HOST: Counter()}
        self.main = self.stream()
        self.memories: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        self.pinned: list[Memory] = []
        self.current = threading.local()
        self.lock = threading.RLock()

    def stream(self, *_: object) -> Stream:
        name = f"stream {len(self.known) - 1}"
        self.known[name] = Counter()
        return Stream(self, name)

    def current_stream(self, *_: object) -> Stream:
        return getattr(self.current, "stream", self.main)  # type: ignore[no-any-return]

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        before = self.current_stream()
        self.current.stream = stream or before
        try:
            yield
        finally:
            self.current.stream = before

    def hear(self, call: str, agent: str, of: Counter[str]) -> None:
        with self.lock:
            if call != self.without:
                self.known[agent] |= of

    def access(self, agent: str, memory: Memory, *, writes: bool) -> None:
        with self.lock:
            if agent != HOST:  # the launch comes after all that the host has done and waited for
                self.known[agent] |= self.known[HOST]
                if writes and memory.used_by_threads:
                    self.races.append(f"{agent} writes what a thread is reading or writing")
            self.known[agent][agent] += 1
            for other, clock, wrote in memory.accesses:
                if (writes or wrote) and self.known[agent][other] < clock:
                    self.races.append(f"{agent} {'writes' if writes else 'reads'} what {other} may be using")
            memory.accesses.append((agent, self.known[agent][agent], writes))

    @contextmanager
    def host_uses(self, array: np.ndarray[Any, Any], *, writes: bool) -> Iterator[None]:
        """While open, a thread of the host reads or writes the array, if it is of pinned memory."""
        address = array.__array_interface__["data"][0]
        found = [one for one in self.pinned if one.address <= address < one.address + one.size]
        for memory in found:
            self.access(HOST, memory, writes=writes)
            memory.used_by_threads += 1
        yield
        for memory in found:
            memory.used_by_threads -= 1

    # ---------------------------------------------------------------------------------------------------- tensors

    def memory_of(self, tensor: torch.Tensor) -> Memory | None:
        return self.memories.get(tensor.untyped_storage().data_ptr())

    def placed(self, tensor: torch.Tensor, owner: str) -> torch.Tensor:
        """The tensor as one of the card, or of pinned memory if the host owns it."""
        storage = tensor.untyped_storage()
        memory = self.memories.get(storage.data_ptr())
        if memory is None:
            memory = self.memories[storage.data_ptr()] = Memory(self, storage.data_ptr(), storage.nbytes(), owner)
        if owner == HOST:
            self.pinned.append(memory)
            return tensor
        on_card = tensor.as_subclass(OnCard)
        on_card.memory = memory  # type: ignore[attr-defined]  # kept for as long as any view of it
        return on_card

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
            if name in ("device", "is_cuda") and isinstance(args[0], OnCard):
                return CUDA if name == "device" else True
        with torch._C.DisableTorchFunctionSubclass():
            devices = [one for one in (*args, kwargs.get("device")) if isinstance(one, torch.device)]
            to_card = any(one.type == "cuda" for one in devices)
            pinned = kwargs.pop("pin_memory", False)
            if to_card:
                args = tuple("cpu" if isinstance(one, torch.device) else one for one in args)
                kwargs = {**kwargs, **({"device": "cpu"} if "device" in kwargs else {})}
            tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
            of_card = [one for one in tensors if isinstance(one, OnCard)]
            if name == "to" and to_card and not of_card:
                return self._upload(args[0], kwargs)
            out = func(*args, **kwargs)
            if pinned:
                return self.placed(out, HOST)
            if not of_card:
                return self.placed(out, self.current_stream().name) if to_card else out
        return self._launched(name, args, kwargs, tensors, out)

    def _launched(self, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> Any:
        """An operation on the card: of the current stream."""
        agent = self.current_stream().name
        changed = [kwargs["out"]] if isinstance(kwargs.get("out"), torch.Tensor) else []
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            changed.append(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in tensors:
                if (memory := self.memory_of(tensor)) is not None:
                    self.access(agent, memory, writes=any(tensor is one for one in changed))
            if name in TO_HOST:
                self.hear("a copy that waits", HOST, self.known[agent])
                return out if name != "cpu" else out.clone()
            if isinstance(out, torch.Tensor):
                return out if any(out is one for one in changed) else self.placed(out, agent)
            if isinstance(out, (tuple, list)):
                placed = [self.placed(one, agent) if isinstance(one, torch.Tensor) else one for one in out]
                return tuple(placed)
        return out

    def _upload(self, tensor: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        agent = self.current_stream().name
        memory = self.memory_of(tensor)
        if memory is None or not tensor.is_contiguous() or not kwargs.get("non_blocking"):
            self.races.append("a copy to the device is not asynchronous")
        else:
            self.access(agent, memory, writes=False)
        on_card = self.placed(tensor.clone(), agent)
        with torch._C.DisableTorchFunctionSubclass():
            self.access(agent, on_card.memory, writes=True)  # type: ignore[attr-defined]
        return on_card

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            pinned = self.placed(tensor.clone(), HOST)
            self.pinned[-1].kept = pinned  # type: ignore[attr-defined]
            return pinned


class _Mode(TorchFunctionMode):
    def __init__(self, card: Card):
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.card.call(func, args, kwargs or {})


@contextmanager
def card_in(patch: pytest.MonkeyPatch, without: str = "") -> Iterator[Card]:
    """While open, torch has the card, in this thread; others may use its tensors, and make none."""
    card = Card(without)
    CARDS.append(card)
    patch.setattr(torch.cuda, "Stream", card.stream)
    patch.setattr(torch.cuda, "stream", card.on)
    patch.setattr(torch.cuda, "current_stream", card.current_stream)
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor: card.pin(tensor))
    with _Mode(card):
        yield card
    CARDS.pop()


def noting(
    card: Card, function: Callable[..., Any], arrays: Callable[..., Any], *, writes: bool
) -> Callable[..., Any]:
    """The function, while which the host reads or writes arrays(…) of its arguments."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        used = [card.host_uses(array, writes=writes) for array in arrays(*args, **kwargs)]
        for one in used:
            one.__enter__()
        try:
            return function(*args, **kwargs)
        finally:
            for one in used:
                one.__exit__(None, None, None)

    return noted
