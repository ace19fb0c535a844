"""Export models for other programs. Only `weights` and `gguf_conversion` import torch; each runs as a process."""
