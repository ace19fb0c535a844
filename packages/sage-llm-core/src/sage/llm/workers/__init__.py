"""Inference server processes. Other packages must not import these modules, because most of them import torch."""
