"""How much memory is free."""

import math
from contextlib import suppress
from pathlib import Path

import torch

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still take; infinity where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    found = [math.inf]
    if device.type == "cpu":
        with suppress(OSError):  # no Linux
            found.append(bytes_of("/proc/meminfo", "MemAvailable"))
            own = bytes_of("/proc/self/status", "RssAnon")
            for limit in LIMITS:
                with suppress(OSError, ValueError):  # the other version of cgroups, or "max"
                    found.append(int(Path(limit).read_text()) - own)
    return max(0, min(found))


def bytes_of(path: str, name: str) -> int:
    """A line "name: NUMBER kB" of a file in /proc."""
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    return 1024 * next(int(words[1]) for words in lines if words and words[0] == f"{name}:")
