"""What an answer must look like: text, JSON of a schema, or calls of functions."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Output:
    """The demands of a request on its answer."""

    schema: dict[str, Any] | None = None  #: JSON schema of the text; None: any text
    functions: list[dict[str, Any]] = field(default_factory=list)  #: that may be called, as in OpenAI's `tools`
    must_call: bool = False  #: the answer must be calls
    may_call_several: bool = True

    @property
    def is_free(self) -> bool:
        """Whether every text is allowed."""
        is_strict = any(function.get("strict") for function in self.functions)
        return not (self.schema or self.must_call or is_strict or (self.functions and not self.may_call_several))
