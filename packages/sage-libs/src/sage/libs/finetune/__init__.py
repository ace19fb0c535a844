"""Fine-tuning: what a run is, its data, its trainer, and the process that carries it out.

`FinetuneManager` and `FinetuneConfig` are the face; neither imports torch. They are imported on first use, since a command
line that only shows progress needs neither.
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
