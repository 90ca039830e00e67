"""Collectives by each other's memory: ranks of one machine whose NVIDIA GPUs reach one another.

A rank writes what it sends straight into the others' memory, by plain kernels in the graph that
computes, and a word after it that says so; NCCL's collectives are graphs of their own inside that
graph, take a GPU's processors while they wait, and must be told to use more than a third of a link.
An experiment: no group of the product uses it.

Every rank has an inbox, which the others map (CUDA's inter-process memory): a `Header`, and two
halves that are used in turns, of one slot a sender. Each collective is three kernels, in an order
that data keeps:

    push     writes to every other rank's slot for this one, then "round r of mine is there"
    wait     one small block waits until round r of every other rank is there
    collect  puts own and received numbers together, or adds them up

Two halves are enough: a rank pushes round r + 2 after it has collected round r + 1, to which every
other rank has pushed after collecting round r. Rounds are counted on the GPU, so that collectives
which were described and never computed count for nothing.

A sum is two rounds: each rank adds up one part of the array, in the order of ranks and in float32,
and the parts are gathered. So all ranks get the same bytes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.kernels.cuda_transformer import kernel_of
from fluxmesh.models.collectives import Pending, Ranks
from fluxmesh.models.waiting import InGraph

HEADER_BYTES = 4096
UNIT = 16  # bytes that a thread moves at once; whole units alone travel this way
GROWTH = 1 << 20  # bytes: slots are multiples of it
PUSH_THREADS = 512
COLLECT_BLOCKS, COLLECT_THREADS = 528, 256
TOKEN = (32,)  # words: arrays of a few bytes would lie in memory that the host shares
PATIENCE = 60  # seconds that a rank waits for another before it gives up with an error

# At the start of every inbox. `arrived[p]` counts rounds of rank p and is written by it; the other
# two are this rank's own: rounds that it has pushed, and blocks of the push that runs.
HEADER = """
struct Header { unsigned arrived[64]; unsigned rounds; unsigned tickets; };
struct alignas(16) Unit { unsigned at[4]; };

__device__ inline Header* header_of(const uint64_t* inboxes, int rank) {
  return reinterpret_cast<Header*>(inboxes[rank]);
}

// Of a rank's inbox, the slot of a sender in a round.
__device__ inline char* slot_of(
    const uint64_t* inboxes, int rank, unsigned round, int sender, int size, long slot) {
  const long half = round & 1u;
  return reinterpret_cast<char*>(inboxes[rank]) + HEADER_BYTES + (half * size + sender) * slot;
}

// This thread's share of a copy: a few units are read before the first is written.
__device__ inline void copy_units(Unit* to, const Unit* from, long count, long first, long step) {
  long i = first;
  for (; i + 3 * step < count; i += 4 * step) {
    Unit units[4];
    #pragma unroll
    for (int j = 0; j < 4; ++j) units[j] = from[i + j * step];
    #pragma unroll
    for (int j = 0; j < 4; ++j) to[i + j * step] = units[j];
  }
  for (; i < count; i += step) to[i] = from[i];
}

__device__ inline unsigned read_word(const unsigned* from) {
  unsigned word;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}

__device__ inline void write_word(unsigned* to, unsigned word) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(to), "r"(word) : "memory");
}
""".replace("HEADER_BYTES", str(HEADER_BYTES))

# PART units go to each rank: of a gather the same, of a sum each rank's own, of which the last may
# be shorter. The last block of all says that they are there.
PUSH = """
  const long slot = static_cast<long>(SLOT) * GROWTH;
  Header* own = header_of(inboxes, RANK);
  const unsigned round = *reinterpret_cast<volatile unsigned*>(&own->rounds);
  const Unit* from = reinterpret_cast<const Unit*>(x);
  const long step = static_cast<long>(gridDim.x) * blockDim.x;
  const long first = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x;
  for (int away = 1; away < SIZE; ++away) {
    const int peer = (RANK + away) % SIZE;
    const long start = PARTS ? static_cast<long>(peer) * PART : 0;
    const long count = min(static_cast<long>(PART), UNITS - start);
    Unit* to = reinterpret_cast<Unit*>(slot_of(inboxes, peer, round, RANK, SIZE, slot));
    copy_units(to, from + start, count, first, step);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    if (atomicAdd(&own->tickets, 1u) == gridDim.x - 1) {
      __threadfence_system();
      own->tickets = 0;
      own->rounds = round + 1;
      for (int away = 1; away < SIZE; ++away)
        write_word(&header_of(inboxes, (RANK + away) % SIZE)->arrived[RANK], round + 1);
      pushed[0] = round + 1;
    }
  }
"""

# A thread a rank. Whoever waited in vain ends its process's work with an error.
WAIT = """
  const int peer = threadIdx.x;
  if (peer < SIZE && peer != RANK) {
    const Header* own = header_of(inboxes, RANK);
    const unsigned round = own->rounds;
    unsigned long long begun, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begun));
    while (static_cast<int>(read_word(&own->arrived[peer]) - round) < 0) {
      __nanosleep(64);
      asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
      if (now - begun > PATIENCE * 1000000000ull) __trap();
    }
  }
  there[threadIdx.x] = 1;
"""

COLLECT = """
  const long slot = static_cast<long>(SLOT) * GROWTH;
  const unsigned round = header_of(inboxes, RANK)->rounds - 1;
  const long step = static_cast<long>(gridDim.x) * blockDim.x;
  const long first = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x;
  for (int sender = 0; sender < SIZE; ++sender) {
    const Unit* from = sender == RANK ? reinterpret_cast<const Unit*>(x)
        : reinterpret_cast<const Unit*>(slot_of(inboxes, RANK, round, sender, SIZE, slot));
    Unit* to = reinterpret_cast<Unit*>(every) + static_cast<long>(sender) * UNITS;
    copy_units(to, from, UNITS, first, step);
  }
  if (first == 0) collected[0] = round + 1;
"""

ADD = """
  constexpr int NUMBERS = 16 / sizeof(T);
  const long slot = static_cast<long>(SLOT) * GROWTH;
  const unsigned round = header_of(inboxes, RANK)->rounds - 1;
  const long step = static_cast<long>(gridDim.x) * blockDim.x;
  const long first = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x;
  const long start = static_cast<long>(RANK) * PART;
  for (long i = first; i < PART; i += step) {
    float total[NUMBERS] = {};
    if (start + i < UNITS) {
      for (int sender = 0; sender < SIZE; ++sender) {
        const T* from = sender == RANK ? x + (start + i) * NUMBERS
            : reinterpret_cast<const T*>(slot_of(inboxes, RANK, round, sender, SIZE, slot))
                + i * NUMBERS;
        alignas(16) T read[NUMBERS];
        *reinterpret_cast<Unit*>(read) = *reinterpret_cast<const Unit*>(from);
        #pragma unroll
        for (int j = 0; j < NUMBERS; ++j) total[j] += static_cast<float>(read[j]);
      }
    }
    alignas(16) T sum[NUMBERS];
    #pragma unroll
    for (int j = 0; j < NUMBERS; ++j) sum[j] = static_cast<T>(total[j]);
    reinterpret_cast<Unit*>(part)[i] = *reinterpret_cast<const Unit*>(sum);
  }
  if (first == 0) collected[0] = round + 1;
"""


class PeerRanks(Ranks):
    """A group whose large collectives go by each other's memory, and the rest as before."""

    def __init__(self, group: Any, push_blocks: int) -> None:
        """`push_blocks` of threads write to the others: more are faster, and take more of the GPU.

        Raises `DriverError` on every rank where one of them can't reach another's memory.
        """
        super().__init__(group, waiting=InGraph())
        if self.size > 32:
            raise DriverError(f"{self.size} ranks are more than a warp's threads")
        self._push_blocks = push_blocks
        self._driver = Driver()
        self._slot = 0  # GROWTHs
        self._inbox = 0
        self._opened: list[int] = []
        self._inboxes: mx.array | None = None  # uint64 [N]: where each rank's inbox is, here
        self._first = mx.zeros(TOKEN, mx.uint32)  # in the place of a collective before the first
        self._room(GROWTH)

    def sum(self, x: mx.array) -> mx.array:
        if x.nbytes % UNIT or x.dtype not in (mx.float32, mx.bfloat16, mx.float16):
            return super().sum(x)
        self.traffic.sums += 1
        self.traffic.bytes += 2 * (self.size - 1) * x.nbytes // self.size
        units = x.nbytes // UNIT
        part = -(-units // self.size)
        self._room(part * UNIT)
        x = mx.contiguous(x)
        there = self._pushed(x, part, parts=True)
        own, self._last = _kernel("add", ("x", "inboxes", "there"), ("part", "collected"), ADD)(
            inputs=[x, self._inboxes, there],
            template=[("T", x.dtype), ("UNITS", units), ("PART", part), *self._template()],
            output_shapes=[(part * UNIT // x.itemsize,), TOKEN],
            output_dtypes=[x.dtype, mx.uint32],
            grid=(COLLECT_BLOCKS * COLLECT_THREADS, 1, 1),
            threadgroup=(COLLECT_THREADS, 1, 1),
        )
        return self._gathered(own)[: x.size].reshape(x.shape)

    def begin_gather(self, x: mx.array) -> Pending:
        if x.nbytes % UNIT or not x.nbytes:
            return super().begin_gather(x)
        self.traffic.gathers += 1
        self.traffic.bytes += (self.size - 1) * x.nbytes
        self._room(x.nbytes)
        x = mx.contiguous(x)
        every = self._gathered(x)
        return Pending(every.reshape(-1, *x.shape[1:]), InGraph())

    def _gathered(self, x: mx.array) -> mx.array:
        """Every rank's numbers of `x`, [N * x.size]."""
        units = x.nbytes // UNIT
        there = self._pushed(x, units, parts=False)
        names = ("x", "inboxes", "there"), ("every", "collected")
        every, self._last = _kernel("collect", *names, COLLECT)(
            inputs=[x, self._inboxes, there],
            template=[("T", x.dtype), ("UNITS", units), *self._template()],
            output_shapes=[(self.size * x.size,), TOKEN],
            output_dtypes=[x.dtype, mx.uint32],
            grid=(COLLECT_BLOCKS * COLLECT_THREADS, 1, 1),
            threadgroup=(COLLECT_THREADS, 1, 1),
        )
        return every

    def _pushed(self, x: mx.array, part: int, *, parts: bool) -> mx.array:
        """A token that is there when this round of every rank is."""
        names = ("x", "inboxes", "last"), ("pushed",)
        (pushed,) = _kernel("push", *names, PUSH)(
            inputs=[x, self._inboxes, self._first if self._last is None else self._last],
            template=[
                ("UNITS", x.nbytes // UNIT),
                ("PART", part),
                ("PARTS", parts),
                *self._template(),
            ],
            output_shapes=[TOKEN],
            output_dtypes=[mx.uint32],
            grid=(self._push_blocks * PUSH_THREADS, 1, 1),
            threadgroup=(PUSH_THREADS, 1, 1),
        )
        (there,) = _kernel("wait", ("inboxes", "pushed"), ("there",), WAIT)(
            inputs=[self._inboxes, pushed],
            template=[("PATIENCE", PATIENCE), *self._template()],
            output_shapes=[TOKEN],
            output_dtypes=[mx.uint32],
            grid=(TOKEN[0], 1, 1),
            threadgroup=(TOKEN[0], 1, 1),
        )
        return there

    def _template(self) -> list[tuple[str, Any]]:
        return [
            ("RANK", self.rank),
            ("SIZE", self.size),
            ("SLOT", self._slot),
            ("GROWTH", GROWTH),
        ]

    def _room(self, nbytes: int) -> None:
        """Sees to slots of so many bytes; asked for by all ranks at once, as collectives are."""
        slot = math.ceil(nbytes / GROWTH)
        if slot <= self._slot:
            return
        if self._last is not None:
            mx.eval(self._last)
        self._agree(None)  # nobody writes into an inbox, or reads one, any more
        self._close()
        error = None
        try:
            total = HEADER_BYTES + 2 * self.size * slot * GROWTH
            self._inbox = self._driver.allocate(total)
            handle = self._driver.handle(self._inbox)
        except DriverError as problem:
            error, handle = problem, bytes(64)
        self._agree(error)
        every = self._plain(mx.array(np.frombuffer(handle, np.uint8))[None])
        addresses = []
        try:
            for rank, one in enumerate(np.array(every)):
                if rank == self.rank:
                    addresses.append(self._inbox)
                else:
                    addresses.append(self._driver.open(one.tobytes()))
                    self._opened.append(addresses[-1])
        except DriverError as problem:
            error = problem
        self._agree(error)
        # The sum of two lies in the GPU's own memory; what comes from the host does not.
        self._inboxes = mx.array(np.array(addresses, np.uint64)) + mx.array(0, mx.uint64)
        mx.eval(self._inboxes)
        self._slot = slot

    def _plain(self, x: mx.array) -> mx.array:
        """A gather by the group itself."""
        return super().begin_gather(x).result()

    def _agree(self, error: DriverError | None) -> None:
        """Waits for all ranks. Raises what one of them has met, on each."""
        failed = np.array(self._plain(mx.array([error is not None], mx.int32)))
        if error is not None:
            raise error
        if failed.any():
            raise DriverError(f"rank {int(failed.argmax())} can't reach the others' memory")

    def _close(self) -> None:
        for address in self._opened:
            self._driver.close(address)
        self._opened.clear()
        self._agree(None)  # an inbox goes when nobody has it mapped
        if self._inbox:
            self._driver.free(self._inbox)
        self._inbox = 0


def _kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str) -> Any:
    return kernel_of(f"peer_{name}", inputs, outputs, source, HEADER)


class DriverError(Exception):
    """What CUDA's driver has refused."""


class Driver:
    """The few calls of CUDA's driver that MLX doesn't have, on the GPU that computes."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        # The one that MLX uses, which goes with the process.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context

    def allocate(self, nbytes: int) -> int:
        """The address of so many bytes, all zero."""
        address = ctypes.c_uint64()
        with self._current():
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
            self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(nbytes))
            self._call("cuCtxSynchronize")
        return address.value

    def free(self, address: int) -> None:
        with self._current():
            self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def handle(self, address: int) -> bytes:
        """What another process opens to reach it, 64 bytes."""
        handle = Handle()
        with self._current():
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """The address, here, of another process's memory."""
        address = ctypes.c_uint64()
        with self._current():
            own = Handle.from_buffer_copy(handle)
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), own, ctypes.c_uint(1))
        return address.value

    def close(self, address: int) -> None:
        with self._current():
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'unknown').decode()} ({code})")


class Handle(ctypes.Structure):
    """CUDA's `CUipcMemHandle`."""

    _fields_ = (("reserved", ctypes.c_byte * 64),)


def check(ranks: Ranks, group: Any) -> None:
    """Holds gathers and sums of many shapes against the group's own. Raises `AssertionError`."""
    plain = Ranks(group, waiting=InGraph())
    for shape, dtype in (
        ((1, 8), mx.bfloat16),
        ((3, 5, 16), mx.float32),
        ((257, 2, 24, 128), mx.bfloat16),
        ((2304, 2, 24, 128), mx.bfloat16),
        ((1, 4608, 3072), mx.bfloat16),
    ):
        for turn in range(3):
            key = mx.random.key(100 * turn + ranks.rank)
            x = mx.random.normal(shape, dtype=mx.float32, key=key).astype(dtype)
            assert mx.array_equal(ranks.gather(x), plain.gather(x)).item(), (shape, dtype)
            got, wanted = ranks.sum(x), plain.sum(x)
            off = np.abs(np.array((got - wanted).astype(mx.float32))).max()
            assert off <= 0.04 * ranks.size, (shape, dtype, off)
            every = np.array(plain.gather(got.reshape(1, -1).view(mx.uint8)))
            assert (every == every[:1]).all(), "ranks have different sums"
