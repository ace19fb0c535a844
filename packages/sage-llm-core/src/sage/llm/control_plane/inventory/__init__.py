"""The inventory: the devices of this node, their memory, and who uses it."""

from sage.llm.control_plane.inventory.gpus import gpu_memory_of, has_gpu
from sage.llm.control_plane.inventory.inventory import Inventory, Occupant

__all__ = ["Inventory", "Occupant", "gpu_memory_of", "has_gpu"]
