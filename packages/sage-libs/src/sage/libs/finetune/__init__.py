"""Fine-tuning: runs, their data, the trainer, and the worker process.

`FinetuneManager` and `FinetuneConfig` are the public interface, and do not import torch. Each of the two classes is imported
when it is first used, so that commands that do not use it start faster.
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
