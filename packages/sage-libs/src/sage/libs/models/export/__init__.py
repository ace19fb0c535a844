"""Export models for other programs. Only `weights` and `gguf_conversion`, which run as separate processes, import torch."""
