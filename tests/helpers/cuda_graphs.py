"""CUDA graphs without a GPU: a capture records operations, computes nothing, and a replay repeats them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# What waits for the device, or has a shape that only it knows: CUDA captures none of them.
FORBIDDEN = {
    aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.equal, aten.masked_select, aten._unique2,
}  # fmt: skip

FAILURE = "CUDA error: operation not permitted\nmore lines"


def _tensors(values):
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self, calls, fails):
        super().__init__()
        self.calls = calls
        self.fails = fails
        self.before = {}  # by address, the memory that was there before, and its content
        self.own = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in FORBIDDEN:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        if self.fails and func.overloadpacket is aten._fused_sgd_:
            raise RuntimeError(FAILURE)
        for storage in (t.untyped_storage() for t in _tensors((args, kwargs))):
            if storage.data_ptr() not in self.own:
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self.own |= {t.untyped_storage().data_ptr() for t in _tensors(result)} - known
        # The list keeps every tensor, so that no memory is used twice.
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self):
        for storage, content in self.before.values():
            storage.copy_(content)


class FakeGraph:
    def __init__(self):
        self.calls = []
        self.replays = 0

    def reset(self):
        self.calls.clear()

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            if func.is_view:
                continue
            for kept, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class FakeGenerator:
    """Draws unless it takes itself to be captured; a copy does not."""

    capturing = False

    def clone_state(self):
        return FakeGenerator()

    def graphsafe_set_state(self, other):
        self.capturing = other.capturing


class FakeCuda:
    """Stands in for `torch.cuda`'s graphs; captures in `fail_at` fail, in the optimizer or at their end.

    tidy: whether a capture that fails leaves nothing behind, as in torch 2.15. In 2.11 its stream stays the
    current one, memory comes from its pool (`allocating`), which has a user (`pools`), and the generator is
    taken for captured.
    """

    def __init__(self, monkeypatch, fail_at=(), tidy=False):
        self.graphs = []
        self.fail_at = fail_at
        self.tidy = tidy
        self.captures = 0
        self.generator = FakeGenerator()
        self.pools = []
        self.allocating = []

        class Stream:
            device_index = 0

            def __init__(self, _device=None):
                pass

            def wait_stream(self, _other):
                pass

        self.before = self.current = Stream()

        def end_allocate(_device, pool):
            if pool not in self.allocating:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.allocating.remove(pool)

        for name, stand_in in {
            "_cuda_endAllocateToPool": end_allocate,
            "_cuda_releasePool": lambda _device, pool: self.pools.remove(pool),
        }.items():
            monkeypatch.setattr(torch._C, name, stand_in)
        unfinished = self.unfinished = []  # what was recorded, and nobody has waited for

        class Event:
            def record(self):
                unfinished.append(self)

            def synchronize(self):
                unfinished.remove(self)

        for name, stand_in in {
            "Stream": Stream,
            "Event": Event,
            "stream": lambda _stream: nullcontext(),
            "current_stream": lambda: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "default_generators": (self.generator,),
            "graph_pool_handle": object,
            "CUDAGraph": FakeGraph,
            "graph": self._capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    @contextmanager
    def _capture(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.captures += 1
        self.current, self.generator.capturing = stream, True
        self.pools.append(pool)
        self.allocating.append(pool)
        fails = self.captures - 1 in self.fail_at
        recorder = _Recorder(graph.calls, fails)
        try:
            with torch.random.fork_rng(devices=[]), recorder:
                yield
                if fails:
                    raise RuntimeError(FAILURE)
        except RuntimeError:
            if self.tidy:
                self._end(pool)
                self.pools.remove(pool)
            raise
        finally:
            recorder.undo()
        self._end(pool)
        self.graphs.append(graph)

    def _end(self, pool):
        self.current, self.generator.capturing = self.before, False
        self.allocating.remove(pool)
