"""The types of requests and answers about routes."""

import re
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from sage.llm.client.states import EngineState

#: Each part between slashes begins with a letter, digit or `_`, so no part of the route's URL path is `.` or `..`.
_ROUTE_NAME = re.compile(r"\w[\w.@:+-]*(/\w[\w.@:+-]*)*")
_ENGINE_ID = re.compile(r"engine-[a-z0-9]{10}")


def _printable(engine: str) -> str:
    if not engine.isprintable():
        raise ValueError("must contain only printable characters")
    return engine


#: An engine's id, name or model.
EngineName = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_printable)]


class RouteTarget(BaseModel):
    """An engine that answers requests for a route."""

    engine: EngineName = Field(description="An engine's id, name or model.")
    weight: int = Field(
        1,
        ge=1,
        le=1_000_000,
        description="Share of the route's requests that this engine gets, relative to the weights of the other engines.",
    )


class RouteRequest(BaseModel):
    """The engines to which a route's requests are sent."""

    model_config = ConfigDict(extra="forbid")

    engines: list[RouteTarget] = Field(min_length=1, max_length=64)
    fallback: EngineName | None = Field(
        None, description="Id, name or model of the engine that answers if none of `engines` can answer."
    )

    @field_validator("engines")
    @classmethod
    def _distinct(cls, engines: list[RouteTarget]) -> list[RouteTarget]:
        if len({target.engine for target in engines}) < len(engines):
            raise ValueError("each engine can be listed only once; the weight sets the engine's share of the requests")
        return engines


class RouteTargetView(RouteTarget):
    """A target of a route, and the active engine that the target currently selects."""

    engine_id: str | None = Field(
        None, description="Id of the active engine that `engine` means now; null if `engine` matches no active engine."
    )
    state: EngineState | None = Field(None, description="State of the engine with the id `engine_id`.")


class RouteView(BaseModel):
    """A route, as the HTTP interface returns it."""

    name: str = Field(description="Name of the route; requests use this name as `model`.")
    object: str = "route"
    engines: list[RouteTargetView]
    fallback: str | None
    updated_at: datetime


def check_route_name(name: str) -> str:
    """Return `name`. Raises ValueError if the name is not valid for a route."""
    if len(name) > 200 or not _ROUTE_NAME.fullmatch(name):
        raise ValueError(
            "must consist of at most 200 letters, digits and the characters `./@:+-_`; "
            "the first character, and the character directly after each `/`, must be a letter, a digit or `_`"
        )
    if _ENGINE_ID.fullmatch(name):
        raise ValueError("must not be an engine's id")
    return name
