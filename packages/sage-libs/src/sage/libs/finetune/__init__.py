"""Fine-tuning: runs, their data, the trainer, and the worker process.

`FinetuneManager` and `FinetuneConfig` are the public interface. They do not import torch. They are imported on first use,
because a command that only shows progress does not need them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sage.libs.finetune.config import FinetuneConfig
    from sage.libs.finetune.manager import FinetuneManager

__all__ = ["FinetuneConfig", "FinetuneManager"]


def __getattr__(name: str) -> Any:
    match name:
        case "FinetuneConfig":
            from sage.libs.finetune.config import FinetuneConfig

            return FinetuneConfig
        case "FinetuneManager":
            from sage.libs.finetune.manager import FinetuneManager

            return FinetuneManager
        case _:
            raise AttributeError(name)
