"""The files of a run: spec, events, checkpoints. These modules do not import torch."""
