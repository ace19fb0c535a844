"""The training step's own mathematics: autograd functions with hand-written backwards, in plain torch.

They compute what transformers and PEFT compute, with less work: no padding, no gradient that nobody needs, no intermediate
that is cheaper to make again than to keep. `install.py` puts them in place where a model's structure allows.
"""
