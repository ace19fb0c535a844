"""A backend: an inference server that speaks OpenAI's HTTP on a port of its own.

To add one: a class with `options` and `argv`, and an entry in `BACKENDS` of `inference_executor.py`.
"""

from typing import Any, ClassVar, Protocol

from pydantic import BaseModel


class Backend(Protocol):
    """How one inference server is started."""

    #: What a user may set for it.
    options: ClassVar[type[BaseModel]]
    #: When the server is ready, it answers 200 with a JSON object whose `engine` is SAGE_ENGINE_ID of the environment.
    health_path: ClassVar[str]

    def argv(self, model: str, port: int, descriptor: int, options: Any) -> tuple[str, ...]:
        """Return the command that serves `model` on the inherited socket `descriptor`, which listens at `port`."""
