"""Convert validation errors of pydantic to a one-sentence message that names the option."""

from collections.abc import Collection
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sage.common.counting import counted
from sage.common.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)


def validated(model: type[ModelT], values: dict[str, Any], what: str = "option") -> ModelT:
    """Validate `values` and return them as an instance of `model`.

    Raises ConfigError about the first invalid option.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise config_error(error, what) from error


def config_error(error: ValidationError, what: str = "option", secrets: Collection[str] = ()) -> ConfigError:
    """Return a ConfigError for the first problem of a ValidationError. The hint lists the options with further problems.

    secrets: names of options whose values are not shown in the message.
    """
    first, *rest = error.errors()
    name = ".".join(str(part) for part in first["loc"]) or what
    is_hidden = first["type"] in ("missing", "extra_forbidden") or name in secrets
    given = "" if is_hidden else f", got {first['input']!r}"
    problem = first["msg"].removeprefix("Value error, ")
    messages = {"missing": "is required", "extra_forbidden": f"is not {'an' if what[0] in 'aeiou' else 'a'} {what} here"}
    problem = messages.get(first["type"], problem[:1].lower() + problem[1:])
    more = (
        f" ({counted(len(rest), 'more error')}: {', '.join(str(e['loc'][-1]) for e in rest if e['loc'])}.)" if rest else ""
    )
    return ConfigError(
        code="config_invalid",
        message=f"{name}: {problem}{given}.",
        hint=f"Correct '{name}' and retry; nothing was started.{more}",
        param=name,
    )
