"""Kernels of the training step: autograd functions with hand-written backward passes, in plain torch.

The kernels compute the same results as transformers and PEFT with less work: no padding, no unused gradients, and no stored
activations that are cheap to recompute. `install.py` installs the kernels if the model's structure is supported.
"""
