"""The states and kinds of engines, and other enumerations of the HTTP API."""

from enum import StrEnum


class EngineState(StrEnum):
    """The state of an engine."""

    VALIDATING = "validating"  #: the dataset or the model is being checked
    QUEUED = "queued"  #: the engine waits to be started
    STARTING = "starting"  #: the server or worker process has been started and is not ready yet
    RUNNING = "running"  #: the engine serves requests or trains
    PAUSED = "paused"  #: the engine was unloaded and can be loaded again; `reason` says why the engine was unloaded
    STOPPING = "stopping"  #: the engine was asked to stop and is saving its state
    STOPPED = "stopped"  #: the engine ended because a user requested it
    COMPLETED = "completed"  #: the training run finished
    FAILED = "failed"  #: the engine ended with an error; `reason` contains the error


#: States in which an engine has ended.
SETTLED = frozenset({EngineState.STOPPED, EngineState.COMPLETED, EngineState.FAILED})


class EngineKind(StrEnum):
    """The task of an engine."""

    LLM = "llm"  #: answers chats and completions
    EMBEDDING = "embedding"  #: returns the embedding vectors of texts
    FINETUNE = "finetune"  #: trains an adapter or a whole model


SUPPORTED_ENGINE_KINDS = [kind.value for kind in EngineKind]


class DesiredState(StrEnum):
    """The state that the user requested."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class RestartPolicy(StrEnum):
    """When an engine is restarted automatically. The values have the same names as in Docker."""

    NO = "no"  #: the engine is never restarted
    ON_FAILURE = "on-failure"  #: restart if the process ends unexpectedly or no longer answers
    UNLESS_STOPPED = "unless-stopped"  #: restart in the same cases as `on-failure`, and after a power cut or reboot


class OnBusy(StrEnum):
    """What an engine does if the memory that it needs is not free."""

    WAIT = "wait"  #: wait in the queue until enough memory is free
    PREEMPT = "preempt"  #: pause inference engines of the same or a lower priority, then start
    SHARE = "share"  #: start with the free memory if this amount is enough for the engine; otherwise wait
    FAIL = "fail"  #: fail at once


class EventKind(StrEnum):
    """The kind of change that an event reports."""

    CREATED = "created"
    TRANSITION = "transition"
    DESIRED = "desired"  #: a user requested another state
    UPDATED = "updated"  #: something other than the state changed, such as the version of the adapter
    REMOVED = "removed"
    ROUTE = "route"  #: a route was set or removed; `route` is the route's name, and `engine_id` is empty
