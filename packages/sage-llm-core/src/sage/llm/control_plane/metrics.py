"""Prometheus metrics of engines and devices, computed at each scrape."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric

from sage.common.training import FIGURES
from sage.llm.client.types import Device, EngineKind, EngineState, EngineView

_LABELS = ("engine", "kind", "model")
_DEVICE_LABELS = ("node", "kind", "index")
#: Name of the metric, its documentation, and the field of TrainingProgress.
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


def engine_metrics(
    counts: Mapping[tuple[EngineKind, EngineState], int], active: list[EngineView], devices: Iterable[Device]
) -> Iterator[Metric]:
    """Yield the metrics of engines and devices.

    counts: number of engines by kind and state.  active: the engines that are not stopped, completed or failed.
    """
    number = GaugeMetricFamily("sage_engines", "Number of engines, by kind and state.", labels=("kind", "state"))
    for kind in EngineKind:
        for candidate in EngineState:
            number.add_metric([kind, candidate], counts.get((kind, candidate), 0))
    state = GaugeMetricFamily("sage_engine_state", "State of an engine as a label; always 1.", labels=(*_LABELS, "state"))
    memory = GaugeMetricFamily("sage_engine_memory_bytes", "Memory that the processes of an engine use.", labels=_LABELS)
    for engine in active:
        state.add_metric([*_labels(engine), engine.state], 1)
        if engine.memory_bytes is not None:
            memory.add_metric(_labels(engine), engine.memory_bytes)
    yield from (number, state, memory)
    for name, documentation, field in _TRAINING:
        family = GaugeMetricFamily(name, documentation, labels=_LABELS)
        for engine in active:
            value = getattr(engine.training, field) if engine.training else None
            if value is not None:
                family.add_metric(_labels(engine), value)
        yield family
    used = GaugeMetricFamily("sage_device_memory_used_bytes", "Used memory of a device.", labels=_DEVICE_LABELS)
    total = GaugeMetricFamily("sage_device_memory_total_bytes", "Memory of a device.", labels=_DEVICE_LABELS)
    for device in devices:
        labels = [device.node, "fake" if device.is_fake else device.kind, str(device.index)]
        used.add_metric(labels, device.memory_used_bytes)
        total.add_metric(labels, device.memory_total_bytes)
    yield from (used, total)


def _labels(engine: EngineView) -> list[str]:
    return [engine.id, engine.kind, engine.model]
