"""Kernels of the training step: autograd functions with hand-written backward passes, in plain torch.

They compute the same results as transformers and PEFT with less work: no padding, no unused gradients, and no stored
activation that is cheaper to recompute. `install.py` installs them if the model's structure is supported.
"""
