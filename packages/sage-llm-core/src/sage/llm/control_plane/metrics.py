"""The engines' figures under Prometheus names, read anew at every scrape."""

from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from sage.llm.client.types import Device, EngineState, EngineView

_LABELS = ("engine", "kind", "model")
#: Name, documentation, field of TrainingProgress.
_TRAINING = (
    ("sage_training_progress_ratio", "Share of the optimizer steps that is done.", "progress"),
    ("sage_training_step", "Optimizer steps done.", "step"),
    ("sage_training_loss", "Loss of the last step in nats per token.", "loss"),
    ("sage_training_heldout_loss", "Held-out loss at the end in nats per token.", "heldout_loss"),
    ("sage_training_tokens_per_second", "Tokens computed a second.", "tokens_per_second"),
    ("sage_training_eta_seconds", "Seconds until the run is completed.", "eta_seconds"),
)


def engine_metrics(engines: list[EngineView], devices: Iterable[Device]) -> Iterator[Metric]:
    """Yield the metrics of engines and devices."""
    state = GaugeMetricFamily("sage_engine_state", "1 for the state that an engine is in.", labels=(*_LABELS, "state"))
    memory = GaugeMetricFamily("sage_engine_memory_bytes", "Memory that an engine's processes hold.", labels=_LABELS)
    for engine in engines:
        for candidate in EngineState:
            state.add_metric([*_labels(engine), candidate], float(engine.state is candidate))
        if engine.memory_bytes is not None:
            memory.add_metric(_labels(engine), engine.memory_bytes)
    yield from (state, memory)
    for name, documentation, field in _TRAINING:
        family = GaugeMetricFamily(name, documentation, labels=_LABELS)
        for engine in engines:
            value = getattr(engine.training, field) if engine.training else None
            if value is not None:
                family.add_metric(_labels(engine), value)
        yield family
    used = GaugeMetricFamily("sage_device_memory_used_bytes", "Memory in use.", labels=("node", "kind", "index"))
    total = GaugeMetricFamily("sage_device_memory_total_bytes", "Memory there is.", labels=("node", "kind", "index"))
    for device in devices:
        labels = [device.node, device.kind, str(device.index)]
        used.add_metric(labels, device.memory_used_bytes)
        total.add_metric(labels, device.memory_total_bytes)
    yield from (used, total)


def _labels(engine: EngineView) -> list[str]:
    return [engine.id, engine.kind, engine.model]
