"""What the CPU can, as far as kernels of runtimes look at it."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

# Those that runtimes choose kernels by.
_LOOKED_AT = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "avx_vnni_int8", "amx_bf16",
    "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """Names as Linux writes them; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            present = set(value.split())
            return tuple(name for name in _LOOKED_AT if name in present)
    return ()


def is_x86() -> bool:
    """Whether this is an x86 processor of 64 or 32 bits."""
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686", "x86")
