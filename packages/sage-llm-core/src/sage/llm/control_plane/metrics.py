"""Prometheus metrics of engines and devices, computed at each scrape."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from sage.common.disks import nearest_existing
from sage.common.training import FIGURES
from sage.llm.client.types import Device, EngineKind, EngineState, EngineView
from sage.llm.control_plane.executors.base import Tokens
from sage.llm.control_plane.request_times import RequestTimes
from sage.llm.control_plane.store.transitions import TransitionCounts

_LABELS = ("engine", "kind", "model")
_DEVICE_LABELS = ("node", "kind", "index")
#: Each entry: name of the metric, documentation of the metric, and the field of TrainingProgress with the value.
_TRAINING = (
    ("sage_training_progress_ratio", "Completed share of the optimizer steps.", "progress"),
    ("sage_training_step", "Completed optimizer steps.", "step"),
    ("sage_training_heldout_loss", "Newest held-out loss in nats per token.", "heldout_loss"),
    ("sage_training_eta_seconds", "Seconds until the run is completed.", "eta_seconds"),
    (
        "sage_training_memory_estimate_error_ratio",
        "Estimated peak memory divided by the measured peak, minus 1.",
        "memory_estimate_error_ratio",
    ),
    *((f"sage_training_{figure.name}", figure.description, figure.name) for figure in FIGURES),
)


@dataclass(frozen=True)
class Measured:
    """The values of one scrape. Metrics with the label `engine` are yielded only for the engines in `active`."""

    active: list[EngineView]  #: the engines that are not stopped, completed or failed
    counts: Mapping[tuple[EngineKind, EngineState], int] = field(default_factory=dict)  #: engine counts, by kind and state
    waiting: list[EngineView] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    tokens: Mapping[str, Tokens] = field(default_factory=dict)  #: numbers of prompt and answer tokens, by engine id
    cpu_seconds: Mapping[str, float] = field(default_factory=dict)  #: CPU time, by engine id
    in_progress: Mapping[str, int] = field(default_factory=dict)  #: number of requests in progress, by engine id
    request_times: RequestTimes = field(default_factory=RequestTimes)
    transitions: TransitionCounts = field(default_factory=TransitionCounts)


def all_metrics(measured: Measured, *, is_active: bool, folders: Mapping[str, Path]) -> Iterator[Metric]:
    """Yield all metrics. This function blocks, because it measures the disks.

    is_active: whether this control plane holds the lease.
    folders: the folders whose disks are measured. Keys: names of the folders, for the label `folder`.
    """
    yield InfoMetricFamily("sage_build", "The version of SAGE.", {"version": version("sage-llm-core")})
    yield GaugeMetricFamily(
        "sage_gateway_active",
        "1 if this gateway is active (manages the engines of its node), 0 if on standby.",
        value=is_active,
    )
    yield from _state_metrics(measured)
    yield from _engine_metrics(measured)
    yield from _request_metrics(measured)
    yield from _training_metrics(measured.active)
    yield from device_metrics(measured.devices)
    yield from _disk_metrics(folders)


def _state_metrics(measured: Measured) -> Iterator[Metric]:
    number = GaugeMetricFamily("sage_engines", "Number of engines, by kind and state.", labels=("kind", "state"))
    for kind in EngineKind:
        for candidate in EngineState:
            number.add_metric([kind, candidate], measured.counts.get((kind, candidate), 0))
    transitions = CounterMetricFamily(
        "sage_engine_transitions",
        "Number of changes of engine states that this gateway recorded.",
        labels=("before", "after"),
    )
    duration = SummaryMetricFamily(
        "sage_engine_state_duration_seconds",
        "Time that an engine spent in a state, recorded when the engine leaves the state.",
        labels=("state",),
    )
    numbers = dict(measured.transitions.numbers)
    for (before, after), count in numbers.items():
        transitions.add_metric([before, after], count)
    for state in EngineState:
        count = sum(count for (before, _), count in numbers.items() if before is state)
        duration.add_metric([state], count, measured.transitions.durations_seconds[state])
    now = datetime.now(UTC)
    waits_seconds = [(now - engine.state_at).total_seconds() for engine in measured.waiting]
    yield from (number, transitions, duration)
    yield GaugeMetricFamily("sage_queue_engines", "Number of engines that wait to start.", value=len(waits_seconds))
    yield GaugeMetricFamily(
        "sage_queue_oldest_wait_seconds",
        "Waiting time of the engine that has waited longest; 0 if no engine waits.",
        value=max([0.0, *waits_seconds]),
    )


def _engine_metrics(measured: Measured) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "sage_engine_state",
        "The label `state` contains the state of an engine; the value is always 1.",
        labels=(*_LABELS, "state"),
    )
    memory = GaugeMetricFamily("sage_engine_memory_bytes", "Memory that the processes of an engine use.", labels=_LABELS)
    gpus = GaugeMetricFamily("sage_engine_gpus", "Number of GPUs that an engine uses.", labels=_LABELS)
    restarts = CounterMetricFamily(
        "sage_engine_restarts",
        "Number of automatic restarts of an engine. The count begins again if a user starts the engine, or after "
        "10 minutes without a crash.",
        labels=_LABELS,
    )
    cpu = CounterMetricFamily("sage_engine_cpu_seconds", "CPU time of the processes of an engine.", labels=_LABELS)
    for engine in measured.active:
        labels = _labels(engine)
        state.add_metric([*labels, engine.state], 1)
        restarts.add_metric(labels, engine.restarts)
        if engine.memory_bytes is not None:
            memory.add_metric(labels, engine.memory_bytes)
        if engine.devices is not None:
            gpus.add_metric(labels, sum(device != "cpu" for device in engine.devices))
        if engine.id in measured.cpu_seconds:
            cpu.add_metric(labels, measured.cpu_seconds[engine.id])
    yield from (state, memory, gpus, restarts, cpu)


def _request_metrics(measured: Measured) -> Iterator[Metric]:
    in_progress = GaugeMetricFamily(
        "sage_engine_requests_in_progress",
        "Number of requests from this gateway that an engine is answering.",
        labels=_LABELS,
    )
    duration = HistogramMetricFamily(
        "sage_engine_request_duration_seconds",
        "Time from a request to the end of its answer, by engine; failed requests are included.",
        labels=_LABELS,
    )
    prompt = CounterMetricFamily("sage_engine_prompt_tokens", "Tokens of the prompts.", labels=_LABELS)
    completion = CounterMetricFamily("sage_engine_completion_tokens", "Tokens of the answers.", labels=_LABELS)
    for engine in measured.active:
        if engine.kind is EngineKind.FINETUNE:
            continue
        labels = _labels(engine)
        in_progress.add_metric(labels, measured.in_progress.get(engine.id, 0))
        measured.request_times.add_to(duration, engine.id, labels)
        if tokens := measured.tokens.get(engine.id):
            prompt.add_metric(labels, tokens.prompt)
            completion.add_metric(labels, tokens.completion)
    yield from (in_progress, duration, prompt, completion)


def _training_metrics(active: list[EngineView]) -> Iterator[Metric]:
    for name, documentation, attribute in _TRAINING:
        family = GaugeMetricFamily(name, documentation, labels=_LABELS)
        for engine in active:
            value = getattr(engine.training, attribute) if engine.training else None
            if value is not None:
                family.add_metric(_labels(engine), value)
        yield family


def device_metrics(devices: Iterable[Device]) -> Iterator[Metric]:
    """Yield the metrics of devices. For a fake device, the label `kind` is `fake`."""
    used = GaugeMetricFamily("sage_device_memory_used_bytes", "Used memory of a device.", labels=_DEVICE_LABELS)
    total = GaugeMetricFamily("sage_device_memory_total_bytes", "Memory of a device.", labels=_DEVICE_LABELS)
    load = GaugeMetricFamily("sage_device_utilization_ratio", "Utilization of a device, from 0 to 1.", labels=_DEVICE_LABELS)
    temperature = GaugeMetricFamily("sage_device_temperature_celsius", "Temperature of a device.", labels=_DEVICE_LABELS)
    for device in devices:
        labels = [device.node, "fake" if device.is_fake else device.kind, str(device.index)]
        used.add_metric(labels, device.memory_used_bytes)
        total.add_metric(labels, device.memory_total_bytes)
        if device.utilization_percent is not None:
            load.add_metric(labels, device.utilization_percent / 100)
        if device.temperature_celsius is not None:
            temperature.add_metric(labels, device.temperature_celsius)
    yield from (used, total, load, temperature)


def _disk_metrics(folders: Mapping[str, Path]) -> Iterator[Metric]:
    free = GaugeMetricFamily(
        "sage_disk_free_bytes", "Free space on the disk that contains the folder in the label `folder`.", labels=("folder",)
    )
    size = GaugeMetricFamily(
        "sage_disk_size_bytes", "Size of the disk that contains the folder in the label `folder`.", labels=("folder",)
    )
    for label, folder in folders.items():
        usage = shutil.disk_usage(nearest_existing(folder))
        free.add_metric([label], usage.free)
        size.add_metric([label], usage.total)
    yield from (free, size)


def _labels(engine: EngineView) -> list[str]:
    return [engine.id, engine.kind, engine.model]
