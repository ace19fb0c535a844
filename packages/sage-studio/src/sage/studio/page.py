"""The dashboard page, which shows the engines and the loss curve of the selected run."""

from typing import Any

from nicegui import ui

from sage.common.errors import SageError
from sage.common.progress_bar import duration, eta_text
from sage.common.training import FIGURES, TrainingProgress, TrainingStep
from sage.llm.client import AsyncSageClient
from sage.llm.client.types import SETTLED, EngineState, EngineView

_REFRESH_SECONDS = 1.0
_LIVING = [state for state in EngineState if state not in SETTLED]
#: Maximum number of settled engines (stopped, completed or failed) to show; the newest are shown.
_SETTLED_SHOWN = 100
_MAX_EVENTS = 1000
#: Maximum number of points of the loss curve in one request.
_MAX_POINTS = 1000
_COLUMNS = [
    {"name": name, "label": label, "field": name, "align": align}
    for name, label, align in (
        ("id", "Engine", "left"), ("kind", "Kind", "left"), ("name", "Model", "left"), ("state", "State", "left"),
        ("progress", "Progress", "right"), ("loss", "Loss", "right"), ("eta", "ETA", "right"), ("memory", "Memory", "right"),
    )
]  # fmt: skip


class EnginesPage:
    """The dashboard page of one browser tab."""

    def __init__(self, client: AsyncSageClient) -> None:
        self._client = client
        self._engines: dict[str, EngineView] = {}
        self._settled: list[EngineView] = []
        self._cursor: int | None = None
        self._curve = LossCurve(client)
        ui.page_title("SAGE")
        with ui.row().classes("items-center w-full"):
            ui.label("Engines").classes("text-h5")
            ui.space()
            ui.button("Stop", on_click=self._stop).props("outline")
            ui.button("Resume", on_click=self._resume).props("outline")
        self._error = ui.label().classes("text-negative")
        self._table = ui.table(columns=_COLUMNS, rows=[], row_key="id", selection="single").classes("w-full")
        self._table.on_select(self.refresh)
        self._summary = ui.label().classes("text-subtitle1")
        self._chart = ui.echart(_loss_chart([])).classes("w-full h-80")
        self._chart.set_visibility(False)
        ui.timer(_REFRESH_SECONDS, self.refresh)

    async def refresh(self) -> None:
        """Read the engines and show them. An error is shown until a later refresh succeeds."""
        try:
            if await self._has_changed():
                page = await self._client.page_engines(limit=_SETTLED_SHOWN, states=sorted(SETTLED), order="desc")
                self._settled = page.data[::-1]
            living = await self._client.list_engines(states=_LIVING)
            self._engines = {engine.id: engine for engine in (*self._settled, *living)}
            self._table.update_rows([_row(engine) for engine in self._engines.values()], clear_selection=False)
            await self._show_selected()
            self._error.text = ""
        except SageError as error:
            self._error.text = str(error)

    async def _has_changed(self) -> bool:
        """Read all new events of the change feed, and return whether there were new events. The first call returns True."""
        has_changed = self._cursor is None
        while True:
            page = await self._client.changes("latest" if self._cursor is None else self._cursor, _MAX_EVENTS)
            has_changed, self._cursor = has_changed or bool(page.data), page.last_id
            if not page.has_more:
                return has_changed

    async def _show_selected(self) -> None:
        engine = self._selected()
        steps = await self._curve.read(engine.id) if engine else []
        self._summary.text = _summary(engine) if engine else "Select an engine to see its details."
        self._chart.set_visibility(bool(steps))
        if steps:
            self._chart.options.update(_loss_chart(steps))
            self._chart.update()

    async def _stop(self) -> None:
        if engine := self._selected():
            await self._notify(self._client.stop_engine(engine.id))

    async def _resume(self) -> None:
        if engine := self._selected():
            await self._notify(self._client.resume_engine(engine.id))

    async def _notify(self, call: Any) -> None:
        try:
            engine = await call
            ui.notify(f"{engine.id}: {engine.state}")
        except SageError as error:
            ui.notify(str(error), type="negative")

    def _selected(self) -> EngineView | None:
        selected = self._table.selected
        return self._engines.get(selected[0]["id"]) if selected else None


class LossCurve:
    """The steps of one training run.

    A repeated `read` of the same run requests only new steps, unless more than 2 * _MAX_POINTS steps are stored. Then,
    `read` discards the stored steps and requests all steps again.
    """

    def __init__(self, client: AsyncSageClient) -> None:
        self._client = client
        self._engine_id = ""
        self._steps: list[TrainingStep] = []

    async def read(self, engine_id: str) -> list[TrainingStep]:
        """Return the steps of a run, oldest first, downsampled if there are many."""
        if engine_id != self._engine_id or len(self._steps) > 2 * _MAX_POINTS:
            self._engine_id, self._steps = engine_id, []
        after = self._steps[-1].step if self._steps else 0
        self._steps += await self._client.training_steps(engine_id, after, _MAX_POINTS)
        return self._steps


def _row(engine: EngineView) -> dict[str, str]:
    training = engine.training
    is_running = engine.state == "running"
    return {
        "id": engine.id,
        "kind": engine.kind,
        "name": engine.name,
        "state": engine.state,
        "progress": f"{100 * training.progress:.0f} %" if training and training.progress is not None else "",
        "loss": f"{training.loss:.4f}" if training and training.loss is not None else "",
        "eta": eta_text(training.eta_seconds) if training and is_running else "",
        "memory": f"{engine.memory_bytes / 1e9:.1f} GB" if engine.memory_bytes else "",
    }


def _summary(engine: EngineView) -> str:
    facts = [f"{engine.id} is {engine.state}"]
    if engine.reason:
        facts.append(f"{engine.reason.message} {engine.reason.hint}")
    if engine.training:
        facts += _figures(engine.training)
    return " · ".join(facts)


def _figures(training: TrainingProgress) -> list[str]:
    texts = [f"step {training.step} of {training.total_steps}"] if training.total_steps else []
    texts += [
        f"{figure.title}: {figure.text(value)}"
        for figure in FIGURES
        if (value := getattr(training, figure.name)) is not None
    ]
    return [*texts, f"{duration(training.eta_seconds)} left"] if training.eta_seconds else texts


def _loss_chart(steps: list[TrainingStep]) -> dict[str, Any]:
    return {
        "animation": False,
        "tooltip": {"trigger": "axis"},
        "grid": {"left": 60, "right": 20, "top": 40, "bottom": 50},
        "xAxis": {"type": "value", "name": "step", "nameLocation": "middle", "nameGap": 28, "minInterval": 1},
        "yAxis": {"type": "value", "name": "loss (nats/token)", "scale": True},
        "series": [
            {"type": "line", "name": "loss", "showSymbol": len(steps) < 3, "data": [[s.step, s.loss] for s in steps]}
        ],
    }
