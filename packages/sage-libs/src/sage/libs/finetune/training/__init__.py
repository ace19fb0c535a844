"""Modules of the worker process. They import torch, so only `worker.py` may import them."""
