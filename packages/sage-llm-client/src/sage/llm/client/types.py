"""The types of the gateway's HTTP interface: its requests and answers."""

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from sage.common.training import TrainingProgress as TrainingProgress
from sage.common.training import TrainingStep as TrainingStep


class EngineState(StrEnum):
    """The state of an engine."""

    VALIDATING = "validating"  #: its dataset is being checked
    QUEUED = "queued"  #: waits to be started
    STARTING = "starting"  #: its process is being started and is not ready yet
    RUNNING = "running"  #: serves requests, or trains
    PAUSED = "paused"  #: unloaded, since it had no requests; the next request loads it again
    STOPPING = "stopping"  #: was asked to stop and is saving its state
    STOPPED = "stopped"  #: ended because a user requested it
    COMPLETED = "completed"  #: training finished
    FAILED = "failed"  #: ended with an error; see `reason`


#: States in which nothing happens to an engine until a user requests it.
SETTLED = frozenset({EngineState.STOPPED, EngineState.COMPLETED, EngineState.FAILED})


class EngineKind(StrEnum):
    """The task of an engine."""

    LLM = "llm"  #: answers chats and completions
    EMBEDDING = "embedding"  #: turns texts into vectors
    FINETUNE = "finetune"  #: trains an adapter


SUPPORTED_ENGINE_KINDS = [kind.value for kind in EngineKind]
#: Model name in a request; means the running engine of the kind that was started last.
DEFAULT_MODEL = "sage-default"
_NAME = re.compile(r"[\w./@:+-]+")
#: Each part begins with a letter or digit, so that no part of a URL's path is `.` or `..`.
_ROUTE_NAME = re.compile(r"\w[\w.@:+-]*(/\w[\w.@:+-]*)*")
_ENGINE_ID = re.compile(r"engine-[a-z0-9]{10}")


class DesiredState(StrEnum):
    """The state that the user requested."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class RestartPolicy(StrEnum):
    """When an engine is restarted automatically, as in Docker."""

    NO = "no"  #: never
    ON_FAILURE = "on-failure"  #: if its process exits with an error, is killed, or no longer answers
    UNLESS_STOPPED = "unless-stopped"  #: in these cases, and after a power cut or reboot


def check_engine_name(name: str) -> str:
    """Return the name of an engine; raises ValueError if it cannot be one."""
    if not _NAME.fullmatch(name) or name == DEFAULT_MODEL:
        raise ValueError(f"must be letters, digits and ./@:+-_ and not {DEFAULT_MODEL!r}")
    return name


class ServeRequest(BaseModel):
    """How the result of a training run is served."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(
        None, max_length=200, description="Name in requests; default: the name of the run, or of its output folder."
    )
    checkpoints: bool = Field(False, description="Serve each checkpoint while the run continues.")

    @field_validator("name")
    @classmethod
    def _usable_name(cls, name: str | None) -> str | None:
        return name if name is None else check_engine_name(name)


class StartRequest(BaseModel):
    """An engine to start."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=512, description="Folder, name in the models folder, or hub id.")
    engine_kind: EngineKind = EngineKind.LLM
    name: str | None = Field(None, max_length=200, description="Name in requests; default: the model as given.")
    port: int | None = Field(None, ge=1, le=65535, description="Port of an inference engine; default: a free one.")
    backend: str = Field("auto", max_length=64, description="Program that runs it; auto: the fastest that is installed.")
    restart_policy: RestartPolicy | None = Field(None, description="When it is started again; default: the setting.")
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16, description="Your own notes, kept as given.")
    dedicated: bool = Field(False, description="Use a server of its own; an adapter is merged into its base.")
    idle_stop_minutes: float | None = Field(
        None, gt=0, le=525_600, description="Unload an inference engine after this time without requests; see `paused`."
    )
    serve: ServeRequest | None = Field(None, description="Serve the result of a training run as an llm engine.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the kind; see the documentation.")

    @field_validator("model")
    @classmethod
    def _usable_model(cls, model: str) -> str:
        if not model.isprintable():
            raise ValueError("must be printable characters")
        if model.startswith(("./", "../", "~")) or "\\" in model or model in (".", ".."):
            raise ValueError("a folder must be named by its absolute path, since the gateway works in another folder")
        return model

    @field_validator("name")
    @classmethod
    def _usable_name(cls, name: str | None) -> str | None:
        return name if name is None else check_engine_name(name)


class Reason(BaseModel):
    """Why an engine is in its state."""

    code: str
    message: str
    hint: str = ""


class EngineView(BaseModel):
    """An engine as a user sees it."""

    id: str
    object: str = "engine"
    kind: EngineKind
    model: str
    name: str
    backend: str = Field(description="The program that runs it.")
    backend_reason: str | None = Field(None, description="Why `auto` chose that program; null if the request named it.")
    state: EngineState
    desired: DesiredState
    restart_policy: RestartPolicy
    restarts: int = Field(0, description="How often it was started again since a user last started or resumed it.")
    reason: Reason | None = None
    training: TrainingProgress | None = None
    node: str = Field(description="The state folder that it belongs to.")
    server_id: str | None = Field(None, description="The process that hosts it.")
    address: str | None = Field(None, description="HOST:PORT on which its server listens.")
    form: str | None = Field(None, description="How its server has loaded the model, such as merged, or as an adapter.")
    context_tokens: int | None = Field(None, description="Maximum length of prompt and answer, in tokens.")
    slots: int | None = Field(None, description="Answers that its server generates at the same time.")
    idle_stop_minutes: float | None = Field(None, description="It is unloaded after this time without requests.")
    port: int | None = None
    pid: int | None = None
    memory_bytes: int | None = None
    created_at: datetime
    state_at: datetime = Field(description="Since when it is in this state.")
    metadata: dict[str, str] = {}
    task_id: str | None = None
    output_dir: str | None = None
    run_dir: str | None = None
    served_by: str | None = Field(None, description="The engine that serves the result or checkpoints of this run.")
    log_path: str


class EnginePage(BaseModel):
    """One page of a list of engines."""

    object: str = "list"
    data: list[EngineView]
    first_id: str | None
    last_id: str | None = Field(description="`after` of the next page.")
    has_more: bool


class EventKind(StrEnum):
    """The change that an event of the change feed reports."""

    CREATED = "created"
    TRANSITION = "transition"
    DESIRED = "desired"  #: a user requested another state
    UPDATED = "updated"  #: it changed without a transition, such as to a newer version of its adapter
    REMOVED = "removed"
    ROUTE = "route"  #: a route was set or removed; `route` is its name, and `engine_id` is empty


class EngineEvent(BaseModel):
    """One entry of the change feed; `id` is its cursor."""

    id: int
    engine_id: str
    kind: EventKind
    at: datetime
    before: EngineState | None
    after: EngineState | None
    actor: str
    reason: str
    route: str | None = None


class EventPage(BaseModel):
    """One page of the change feed."""

    object: str = "list"
    data: list[EngineEvent]
    last_id: int = Field(description="Cursor: `after` of the next page.")
    has_more: bool


def _printable(engine: str) -> str:
    if not engine.isprintable():
        raise ValueError("must be printable characters")
    return engine


#: An engine's id, name or model.
EngineName = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_printable)]


class RouteTarget(BaseModel):
    """An engine that answers requests for a route."""

    engine: EngineName = Field(description="An engine's id, name or model.")
    weight: int = Field(1, ge=1, le=1_000_000, description="Its share of the requests, relative to the other weights.")


class RouteRequest(BaseModel):
    """The engines to which a route's requests are sent."""

    model_config = ConfigDict(extra="forbid")

    engines: list[RouteTarget] = Field(min_length=1, max_length=64)
    fallback: EngineName | None = Field(
        None, description="Answers if none of `engines` does: an engine's id, name or model."
    )

    @field_validator("engines")
    @classmethod
    def _distinct(cls, engines: list[RouteTarget]) -> list[RouteTarget]:
        if len({target.engine for target in engines}) < len(engines):
            raise ValueError("each engine may be named once; give it a weight instead")
        return engines


class RouteTargetView(RouteTarget):
    """A target of a route, and the engine that it means now."""

    engine_id: str | None = Field(None, description="The engine that it means now; None: no active engine.")
    state: EngineState | None = Field(None, description="State of that engine.")


class RouteView(BaseModel):
    """A route as a user sees it."""

    name: str = Field(description="`model` in requests.")
    object: str = "route"
    engines: list[RouteTargetView]
    fallback: str | None
    updated_at: datetime


def check_route_name(name: str) -> str:
    """Return the name of a route; raises ValueError if it cannot be one."""
    if len(name) > 200 or not _ROUTE_NAME.fullmatch(name):
        raise ValueError("must be at most 200 letters, digits and ./@:+-_, and no part may begin with a sign")
    if _ENGINE_ID.fullmatch(name):
        raise ValueError("must not be an engine's id")
    return name


class Device(BaseModel):
    """Memory that engines share: a GPU, or the main memory of a node."""

    node: str
    kind: str
    index: int
    name: str
    memory_total_bytes: int
    memory_used_bytes: int
    utilization_percent: float | None = None


class BackendView(BaseModel):
    """A program that runs engines."""

    name: str
    object: str = "backend"
    kinds: list[EngineKind]
    formats: list[str] = Field(description="Model formats that it can load.")
    devices: list[str]
    hot_adapters: bool = Field(description="Adapters can be loaded and unloaded while it runs.")
    sleep: bool = Field(description="It can release its memory and allocate it again without a restart.")
    has_environment: bool = Field(description="It has a Python environment of its own: `sage backend install NAME`.")
    is_installed: bool
    version: str
    disk_bytes: int | None = Field(None, description="Size of its environment.")
