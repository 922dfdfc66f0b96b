"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..support.versions import running_versions
from .providers import Provider, runtime


def describe_machine(provider: Provider, device_id: int = 0) -> dict[str, Any]:
    """CPU model, cores of the machine and those this process may use, GPU (None on the CPU) and operating system."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "gpu": gpu_model(device_id) if provider.device == "cuda" else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str]:
    """Versions of everything that a latency depends on."""
    return {
        **running_versions(),
        "onnxruntime": str(runtime().__version__),
        "onnx": importlib.metadata.version("onnx"),
        "python": platform.python_version(),
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The marketing name of the CPU, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def gpu_model(device_id: int) -> str | None:
    """The name of the GPU of that number."""
    if torch.cuda.is_available() and device_id < torch.cuda.device_count():
        return torch.cuda.get_device_name(device_id)
    # A torch without CUDA beside an ONNX Runtime with it.
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", f"--id={device_id}")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
