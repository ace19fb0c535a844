"""Fine-tuning: what a run is, its data, its trainer, and the process that carries it out.

`FinetuneManager` and `FinetuneConfig` are the face; neither imports torch.
"""

from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.manager import FinetuneManager

__all__ = ["FinetuneConfig", "FinetuneManager"]
