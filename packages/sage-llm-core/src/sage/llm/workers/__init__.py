"""Inference server processes. They import torch; nothing else may import them."""
