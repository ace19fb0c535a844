"""Kernels of the training step: autograd functions with hand-written backward passes, in plain torch.

The kernels compute the same results as transformers and PEFT with less work. They omit padding and unused gradients, and do
not store activations that are cheap to recompute. `install.py` installs the kernels if the model's structure is supported.
"""
