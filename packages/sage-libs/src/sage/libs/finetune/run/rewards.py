"""The reward function of GRPO, which the user writes in a Python file.

`def reward(prompts, completions, **columns)` returns one number per completion. `columns` contains the other fields of the
dataset.
"""

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sage.common.errors import ConfigError

_NAME = "reward"


def check_reward_file(path: Path) -> None:
    """Raise ConfigError if a file defines no reward function; the file is not executed."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise _unusable(path, f"is not valid Python: {error}") from error
    if not any(isinstance(node, ast.FunctionDef) and node.name == _NAME for node in tree.body):
        raise _unusable(path, f"defines no function `{_NAME}`")


def load_reward(path: Path) -> Callable[..., list[float]]:
    """Execute a Python file and return its reward function in the form that TRL calls.

    TRL passes conversations. The user's function receives texts: the last message of each prompt, and each completion.
    """
    spec = importlib.util.spec_from_file_location("sage_reward", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, _NAME)

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        texts = [[messages[-1]["content"] for messages in conversations] for conversations in (prompts, completions)]
        rewards = [float(number) for number in function(*texts, **columns)]
        if len(rewards) != len(completions):
            raise ValueError(f"{path}: {_NAME} returned {len(rewards)} numbers for {len(completions)} completions")
        return rewards

    return reward


def _unusable(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        code="reward_file_unusable",
        message=f"The reward file {path} {problem}.",
        hint=f"Define `def {_NAME}(prompts, completions, **columns)`, which returns a number for each completion.",
        param="reward_file",
    )
