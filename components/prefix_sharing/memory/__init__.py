"""Memory of a run: as measured while it runs, and as estimated before there is a device."""

from prefix_sharing.memory.measured import memory_by_part, peak_memory

__all__ = ["memory_by_part", "peak_memory"]
