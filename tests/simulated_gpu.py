"""A GPU that is not there: `SIMULATED_GPU=1 pytest` runs tests as on a machine that has one.

Tensors of the device `cuda` lie in the host's memory, and its kernels are those of the processor (simulated_gpu.cpp).
What programs do wrong on GPUs shows: tensors of two devices in one operation, places where the host waits, graphs whose
memory has moved, memory that nobody has written, a memory that is full. Speed, kernels in Triton and races do not: what
one stream does before another has ended, or what the host reads before a copy has. Those need a real GPU.

To be imported before torch, which looks for its devices once. It needs a torch without CUDA, and a C++ compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
TORCH = Path(str(importlib.util.find_spec("torch").origin)).parent  # type: ignore[union-attr]
if "torch" in sys.modules:
    sys.exit("a simulated GPU comes before torch, which is imported already")
if "cuda: Optional[str] = None" not in (TORCH / "version.py").read_text():
    sys.exit("a simulated GPU needs a build of torch without CUDA")
GB = 1 << 30
MODES = {"default": 0, "warn": 1, "error": 2}


def library() -> Path:
    """The compiled source, which is kept for this torch."""
    parts = SOURCE.read_bytes(), (TORCH / "version.py").read_bytes(), str(TORCH).encode()
    out = SOURCE.parent.parent / "build" / f"simulated-gpu-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    if not out.exists():
        compiler = shutil.which("c++") or shutil.which("g++") or sys.exit("a simulated GPU needs a C++ compiler: g++")
        out.parent.mkdir(exist_ok=True)
        made, folder = out.with_suffix(f".{os.getpid()}"), TORCH / "lib"
        command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{TORCH / 'include'}", str(SOURCE)]
        links = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lc10", "-ltorch_cpu", "-ltorch"]
        subprocess.run([*command, "-o", str(made), *links], check=True)
        made.rename(out)
    return out


ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  what it imports depends on whether this build has CUDA
import torch._inductor.utils  # noqa: E402
import torch.nn.attention.varlen  # noqa: E402

with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
    import bitsandbytes.backends.cpu.ops as four_bits  # noqa: E402  without kernels for a GPU

gpu = torch.ops.simulated_gpu


class Nothing:
    """A stream, an event or a context: all work is done where it is asked for."""

    cuda_stream = stream_id = device_index = 0
    device_type, device = 1, torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


class Graph:
    """Operations that are recorded and replayed on the same memory."""

    def capture_begin(self, *_: Any, **__: Any) -> None:
        gpu.capture_begin()

    def capture_end(self) -> None:
        self.number = gpu.capture_end()

    def replay(self) -> None:
        gpu.replay(self.number)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            gpu.forget(self.number)


def varlen_attn(query: Any, key: Any, value: Any, starts: Any, key_starts: Any, *_: Any, **options: Any) -> Any:
    """torch's kernel for sequences of any length, whose ends of queries and keys are aligned: [T, H, D]."""
    behind, ahead = options.get("window_size", (-1, 0 if options.get("is_causal") else -1))
    out = []
    queries, keys = gpu.peek(starts), gpu.peek(key_starts)  # the host need not wait: the kernel reads them
    for a, b, c, d in zip(queries, queries[1:], keys, keys[1:], strict=False):
        q, k, v = (x.transpose(0, 1)[None].float() for x in (query[a:b], key[c:d], value[c:d]))
        back = torch.arange(d - c - (b - a), d - c, device=q.device)[:, None] - torch.arange(d - c, device=q.device)
        seen = (back <= behind if behind >= 0 else back == back) & (back >= -ahead if ahead >= 0 else back == back)
        gqa = q.shape[1] != k.shape[1]
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, seen, scale=options.get("scale"), enable_gqa=gqa
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out).to(query.dtype)


def on_gpu(storage: Any) -> Any:
    """Empty storage of the same size on the GPU, which builds without CUDA cannot make directly."""
    return torch.empty(storage.nbytes(), dtype=torch.uint8, device="cuda").untyped_storage()


def storage_to(storage: Any, device: Any, non_blocking: bool) -> Any:
    if torch.device(device).type != "cuda" or storage.device.type == "cuda":
        return usual_to(storage, device, non_blocking)
    return on_gpu(storage).copy_(storage, non_blocking)


def storage_clone(storage: Any) -> Any:
    return usual_clone(storage) if storage.device.type != "cuda" else on_gpu(storage).copy_(storage, False)


def pointer(x: Any) -> Any:
    """The address of a tensor, as bitsandbytes' kernels for processors ask for it."""
    if x is not None and x.is_cuda:
        raise RuntimeError("a kernel of the processor was given memory of the GPU")
    return usual_pointer(x)


usual_pointer, four_bits.get_ptr = four_bits.get_ptr, pointer
usual_to, usual_clone = torch.storage._to, torch.UntypedStorage.clone  # type: ignore[attr-defined]
torch.storage._to, torch.UntypedStorage.clone = storage_to, storage_clone  # type: ignore[attr-defined, method-assign]
varlen_attn.__signature__ = inspect.signature(torch.nn.attention.varlen.varlen_attn)  # type: ignore[attr-defined]
torch.nn.attention.varlen.varlen_attn = varlen_attn  # type: ignore[assignment]
torch.version.cuda = "12.8"
torch.backends.cuda.is_flash_attention_available = lambda: True
PROPERTIES = SimpleNamespace(
    name="simulated GPU", major=9, minor=0, total_memory=16 * GB, multi_processor_count=4, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, gcnArchName="", uuid="0",
)  # fmt: skip


def answers() -> dict[str, Any]:
    """What torch.cuda says and does."""
    nothing = lambda *_, **__: None  # noqa: E731
    out: dict[str, Any] = dict.fromkeys(
        ("init", "_lazy_init", "set_device", "set_stream", "synchronize", "empty_cache", "ipc_collect"), nothing
    )
    out |= dict.fromkeys(("reset_accumulated_memory_stats", "seed", "seed_all"), nothing)
    out |= dict.fromkeys(("is_available", "is_initialized", "_is_compiled", "is_bf16_supported"), lambda *_, **__: True)
    out |= dict.fromkeys(("Stream", "Event", "stream", "StreamContext", "device", "device_of", "_DeviceGuard"), Nothing)
    out |= dict.fromkeys(("current_stream", "default_stream"), Nothing)
    out |= dict.fromkeys(("device_count", "_device_count_nvml"), lambda: 1)
    out |= dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *_: gpu.allocated())
    out |= dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda *_: gpu.peak())
    out |= dict.fromkeys(("manual_seed", "manual_seed_all"), lambda seed: gpu.seed(int(seed) % (1 << 63)))
    return out | {
        "current_device": lambda: 0,
        "reset_peak_memory_stats": lambda *_: gpu.reset_peak(),
        "memory_stats": lambda *_: {
            "allocated_bytes.all.peak": gpu.peak(),
            "allocated_bytes.all.current": gpu.allocated(),
        },
        "set_per_process_memory_fraction": lambda part, *_: gpu.set_limit(int(part * PROPERTIES.total_memory)),
        "memory_summary": lambda *_, **__: "",
        "mem_get_info": lambda *_: (max(0, min(gpu.limit(), PROPERTIES.total_memory) - gpu.allocated()), 16 * GB),
        "get_device_name": lambda *_: PROPERTIES.name,
        "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": lambda *_: PROPERTIES,
        "get_arch_list": lambda: ["sm_90"],
        "CUDAGraph": Graph,
        "is_current_stream_capturing": lambda: gpu.recording(),
        "get_sync_debug_mode": lambda: gpu.debug(),
        "set_sync_debug_mode": lambda mode: gpu.set_debug(MODES.get(mode, mode)),
        "initial_seed": lambda: gpu.initial_seed(),
        "get_rng_state": lambda *_: gpu.rng_state(),
        "set_rng_state": lambda state, *_: gpu.set_rng_state(state),
        "get_rng_state_all": lambda: [gpu.rng_state()],
        "set_rng_state_all": lambda states: gpu.set_rng_state(states[0]),
    }


for place in (torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams, torch.cuda.graphs):
    for name, answer in answers().items():
        if place is torch.cuda or hasattr(place, name):
            setattr(place, name, answer)
torch._C._cuda_getDeviceCount = lambda: 1  # type: ignore[attr-defined]
torch._C._cuda_getCurrentRawStream = lambda *_: 0  # type: ignore[attr-defined]
torch._C._cuda_isCurrentStreamCapturing = lambda: gpu.recording()  # type: ignore[attr-defined]
