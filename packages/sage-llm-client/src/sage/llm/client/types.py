"""The types of the requests and answers of the gateway's HTTP interface."""

import re
from datetime import datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, computed_field, field_validator

from sage.common.training import TrainingProgress as TrainingProgress
from sage.common.training import TrainingStep as TrainingStep
from sage.llm.client.routes import EngineName as EngineName
from sage.llm.client.routes import RouteRequest as RouteRequest
from sage.llm.client.routes import RouteTarget as RouteTarget
from sage.llm.client.routes import RouteTargetView as RouteTargetView
from sage.llm.client.routes import RouteView as RouteView
from sage.llm.client.routes import check_route_name as check_route_name
from sage.llm.client.states import SETTLED as SETTLED
from sage.llm.client.states import SUPPORTED_ENGINE_KINDS as SUPPORTED_ENGINE_KINDS
from sage.llm.client.states import DesiredState as DesiredState
from sage.llm.client.states import EngineKind as EngineKind
from sage.llm.client.states import EngineState as EngineState
from sage.llm.client.states import EventKind as EventKind
from sage.llm.client.states import OnBusy as OnBusy
from sage.llm.client.states import RestartPolicy as RestartPolicy

#: Model name for requests that do not need a specific model. From the engines of the requested kind, the gateway chooses
#: the engine that became ready last.
DEFAULT_MODEL = "sage-default"
_NAME = re.compile(r"[\w./@:+-]+")


def check_engine_name(name: str) -> str:
    """Return `name`. Raises ValueError if `name` is not allowed as the name of an engine."""
    if not _NAME.fullmatch(name) or name == DEFAULT_MODEL:
        raise ValueError(f"must consist of letters, digits and ./@:+-_ and must not be {DEFAULT_MODEL!r}")
    return name


class ServeRequest(BaseModel):
    """How the result and the checkpoints of a training run are served."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(
        None,
        max_length=200,
        description="Model name in requests; default: the run's name, or the output folder's name if the run has no name.",
    )
    checkpoints: bool = Field(False, description="Serve the newest checkpoint while the run trains.")

    @field_validator("name")
    @classmethod
    def _usable_name(cls, name: str | None) -> str | None:
        return name if name is None else check_engine_name(name)


#: The id of a device: `cpu` for the main memory, `cuda:0` for the first GPU.
DeviceId = Annotated[str, Field(pattern=r"^(cpu|cuda:\d{1,3})$")]


class StartRequest(BaseModel):
    """A request to start an engine."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        min_length=1,
        max_length=512,
        description="Path of a folder, name of a model in the models folder, or id on the Hugging Face Hub.",
    )
    engine_kind: EngineKind = EngineKind.LLM
    name: str | None = Field(None, max_length=200, description="Model name in requests; default: the value of `model`.")
    port: int | None = Field(None, ge=1, le=65535, description="Port of an inference engine; default: a free port.")
    backend: str = Field(
        "auto",
        max_length=64,
        description="Backend (program that runs the engine); auto: SAGE chooses an installed backend for the model.",
    )
    restart_policy: RestartPolicy | None = Field(
        None, description="When the engine is restarted automatically; default: `restart_policy` of the gateway's settings."
    )
    max_restarts: int = Field(5, ge=0, le=10_000, description="Maximum number of automatic restarts in a row.")
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16, description="Notes to store with the engine.")
    dedicated: bool = Field(
        False, description="Run the engine on a separate server; an adapter is then merged into its base model."
    )
    merge_in_background: bool = Field(
        False,
        description="For an adapter: serve the adapter at once, merge it into its base model in the background, then serve "
        "the merged model.",
    )
    idle_stop_minutes: float | None = Field(
        None,
        gt=0,
        le=525_600,
        description="Unload an inference engine after this number of minutes without requests; the state is then `paused`.",
    )
    serve: ServeRequest | None = Field(None, description="Serve the result of a training run as an llm engine.")
    on_busy: OnBusy | None = Field(
        None, description="What to do if the memory that the engine needs is not free; default: `on_busy` of the settings."
    )
    priority: int = Field(0, ge=-100, le=100, description="Priority in the queue; engines with a higher priority are ahead.")
    devices: list[DeviceId] | None = Field(
        None, min_length=1, max_length=64, description="Devices that the engine may use; default: any."
    )
    memory_gb: float | None = Field(
        None, gt=0, le=1e6, description="Memory to reserve, in GB (10^9 bytes); default: the memory that SAGE estimates."
    )
    not_before: AwareDatetime | None = Field(None, description="Earliest time to start the engine, with a time zone.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the backend or of the training run.")

    @field_validator("model")
    @classmethod
    def _usable_model(cls, model: str) -> str:
        if not model.isprintable():
            raise ValueError("must contain only printable characters")
        if model.startswith(("./", "../", "~")) or "\\" in model or model in (".", ".."):
            raise ValueError("a folder must be given as an absolute path, because the gateway has its own working folder")
        return model

    @field_validator("name")
    @classmethod
    def _usable_name(cls, name: str | None) -> str | None:
        return name if name is None else check_engine_name(name)


class Reason(BaseModel):
    """The reason for the current state of an engine."""

    code: str
    message: str
    hint: str = ""


class EngineView(BaseModel):
    """An engine, as the HTTP interface returns it."""

    id: str
    object: str = "engine"
    kind: EngineKind
    model: str
    name: str
    backend: str = Field(description="The program that runs the engine.")
    backend_reason: str | None = Field(
        None, description="Why SAGE chose this backend for `auto`; null if the request named a backend."
    )
    state: EngineState
    desired: DesiredState
    restart_policy: RestartPolicy
    on_busy: OnBusy = Field(OnBusy.WAIT, description="What the engine does if the memory that it needs is not free.")
    priority: int = Field(0, description="Priority in the queue; engines with a higher priority are ahead.")
    not_before: datetime | None = Field(None, description="Earliest time to start the engine.")
    queue_position: int | None = Field(
        None, description="Position in the queue; 1 is the first position. Null if the engine does not wait."
    )
    devices: list[str] | None = Field(
        None,
        description="Devices of the engine's server; null if the engine has no server, or if the server may use any device.",
    )
    reserved_bytes: int | None = Field(
        None, description="Memory that is reserved for the engine; null if the amount is not known."
    )
    restarts: int = Field(
        0,
        description="Number of automatic restarts in a row. The number is set to 0 when a user resumes the engine. After "
        "10 minutes without a crash, the next restart counts as number 1.",
    )
    max_restarts: int = Field(5, description="Maximum number of automatic restarts in a row.")
    reason: Reason | None = None
    training: TrainingProgress | None = None
    node: str = Field(
        description="Id of the node that runs the engine. A node is a SAGE installation with its own state folder; several "
        "nodes can share one database."
    )
    server_id: str | None = Field(None, description="Id of the server process that hosts the engine.")
    address: str | None = Field(None, description="HOST:PORT on which the engine's server listens.")
    form: str | None = Field(
        None, description="Readable description of how the server loads the model; example: `merged, int8`."
    )
    context_tokens: int | None = Field(None, description="Maximum length of prompt plus answer, in tokens.")
    slots: int | None = Field(None, description="Maximum number of answers that the server generates at the same time.")
    kv_cache_tokens: int | None = Field(
        None, description="Size of the key/value cache in tokens; null: the default of the backend."
    )
    threads: int | None = Field(
        None,
        description="Number of CPU threads of the engine's server; null if the number is not known, for example if the "
        "backend chooses the number itself.",
    )
    idle_stop_minutes: float | None = Field(None, description="Minutes without requests after which the engine is unloaded.")
    port: int | None = None
    pid: int | None = None
    memory_bytes: int | None = None
    created_at: datetime
    state_at: datetime = Field(description="When the state of the engine last changed.")
    metadata: dict[str, str] = {}
    task_id: str | None = None
    output_dir: str | None = None
    run_dir: str | None = None
    served_by: str | None = Field(None, description="Id of the engine that serves the result or checkpoints of this run.")
    log_path: str


class EnginePage(BaseModel):
    """One page of a list of engines."""

    object: str = "list"
    data: list[EngineView]
    first_id: str | None
    last_id: str | None = Field(description="Value to send as `after` to get the next page.")
    has_more: bool


class MoveRequest(BaseModel):
    """A request to move a waiting engine in the queue."""

    model_config = ConfigDict(extra="forbid")

    position: int = Field(
        ge=1, le=1_000_000, description="New position of the engine in the queue; 1 is the first position."
    )


class EngineQueue(BaseModel):
    """The waiting engines of a node, in the order of the queue."""

    object: str = "list"
    data: list[EngineView]


class EngineEvent(BaseModel):
    """One event of the change feed. To read the events that follow, send the `id` of this event as `after`."""

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
    last_id: int = Field(description="Value to send as `after` to get the next page.")
    has_more: bool


class DeviceEngine(BaseModel):
    """The memory of an engine on a device.

    If several engines share a server, only the first engine is listed, with the memory of the whole server.
    """

    id: str
    name: str
    memory_bytes: int = Field(description="Memory that the engine's processes use; 0 if it cannot be measured.")
    reserved_bytes: int | None = Field(None, description="Memory reserved for the engine; null if no memory is reserved.")


class Device(BaseModel):
    """A device with memory that engines share: a GPU, or the main memory of a node."""

    node: str
    kind: str
    index: int
    name: str
    uuid: str | None = Field(None, description="NVIDIA's id of the GPU or MIG device.")
    memory_total_bytes: int
    memory_usable_bytes: int | None = Field(
        None,
        description="Memory that engines may use. Settings, and the memory limit of a container, can make it less "
        "than the total memory.",
    )
    memory_used_bytes: int
    utilization_percent: float | None = None
    temperature_celsius: float | None = None
    is_mig: bool = Field(False, description="Whether the device is a partition of a GPU (MIG: multi-instance GPU).")
    is_fake: bool = Field(False, description="Whether the device is simulated (defined by the setting `fake_devices`).")
    engines: list[DeviceEngine] = []

    @computed_field  # type: ignore[prop-decorator]
    @property
    def id(self) -> str:
        """The id that requests use: `cpu` for the main memory, `cuda:0` for the first GPU."""
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.index}"


class EstimateView(BaseModel):
    """The memory that an engine is expected to need, and whether a device has enough free memory."""

    object: str = "estimate"
    model: str
    kind: EngineKind
    backend: str = Field(description="Name of the backend for which the memory is estimated.")
    parts: dict[str, int] = Field(
        description="Estimated memory of each component of the engine (for example `weights`), in bytes."
    )
    total_bytes: int = Field(description="Estimated peak memory of the engine, in bytes: the sum of the values in `parts`.")
    least_bytes: int = Field(description="Minimum memory with which the engine can run, in bytes.")
    devices: list[Device] = Field(description="The devices that the backend can use on this machine.")
    fits: bool = Field(
        description="Whether one of the devices has enough free memory for the larger of `total_bytes` and `least_bytes`."
    )
    fitting_samples: int | None = Field(
        None,
        description="For finetune: maximum number of samples in a micro-batch that fits in the free memory, if each sample "
        "has `max_seq_length` tokens.",
    )
    training_seconds: float | None = Field(
        None,
        description="For finetune: expected duration of all training steps, in seconds. The duration is "
        "computed from the speed of an earlier run on this machine.",
    )


class BackendView(BaseModel):
    """A program that runs engines."""

    name: str
    object: str = "backend"
    kinds: list[EngineKind]
    formats: list[str] = Field(description="Model formats that the backend can load.")
    devices: list[str]
    hot_adapters: bool = Field(description="Whether adapters can be loaded and unloaded while the server runs.")
    quantizes: list[str] = Field(
        default=[], description="Values of the option `quantize` that the backend supports, in addition to `none`."
    )
    sleep: bool = Field(description="Whether the server can free its memory and allocate it again without a restart.")
    has_environment: bool = Field(
        description="Whether the backend has its own Python environment, which `sage backend install NAME` installs."
    )
    is_installed: bool
    version: str
    disk_bytes: int | None = Field(None, description="Disk space of the backend's Python environment, in bytes.")


class WebhookResult(BaseModel):
    """The result of a webhook's test message."""

    object: str = "webhook"
    host: str = Field(
        description="Host of the webhook's URL. The rest of the URL is omitted, because it can contain secrets."
    )
    problem: str | None = Field(None, description="Why the test message was not delivered; null if it was delivered.")
