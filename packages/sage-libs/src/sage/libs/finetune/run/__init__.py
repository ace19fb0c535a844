"""A run's files on disk: its spec, its events and its checkpoints. These modules do not import torch."""
