"""Modules of the worker process. Import them only in `worker.py`, because they import torch."""
