"""Export models for other programs. Only `weights` and `gguf_conversion` import torch; they run as separate processes."""
