"""The page: all engines, and the loss curve of the run that is chosen."""

from typing import Any

from nicegui import ui

from sage.common.errors import SageError
from sage.common.progress_bar import duration, eta_text
from sage.llm.client import AsyncSageClient
from sage.llm.client.types import EngineView, TrainingStep

_REFRESH_SECONDS = 1.0
_COLUMNS = [
    {"name": name, "label": label, "field": name, "align": align}
    for name, label, align in (
        ("id", "Engine", "left"), ("kind", "Kind", "left"), ("name", "Model", "left"), ("state", "State", "left"),
        ("progress", "Progress", "right"), ("loss", "Loss", "right"), ("eta", "ETA", "right"), ("memory", "Memory", "right"),
    )
]  # fmt: skip


class EnginesPage:
    """One browser tab."""

    def __init__(self, client: AsyncSageClient) -> None:
        self._client = client
        self._engines: dict[str, EngineView] = {}
        ui.page_title("SAGE")
        with ui.row().classes("items-center w-full"):
            ui.label("Engines").classes("text-h5")
            ui.space()
            ui.button("Stop", on_click=self._stop).props("outline")
            ui.button("Resume", on_click=self._resume).props("outline")
        self._trouble = ui.label().classes("text-negative")
        self._table = ui.table(columns=_COLUMNS, rows=[], row_key="id", selection="single").classes("w-full")
        self._table.on_select(self.refresh)
        self._about = ui.label().classes("text-subtitle1")
        self._chart = ui.echart(_loss_chart([])).classes("w-full h-80")
        self._chart.set_visibility(False)
        ui.timer(_REFRESH_SECONDS, self.refresh)

    async def refresh(self) -> None:
        """Read the engines again; what goes wrong stands on the page until it is right."""
        try:
            engines = await self._client.list_engines()
            self._engines = {engine.id: engine for engine in engines}
            self._table.update_rows([_row(engine) for engine in engines], clear_selection=False)
            await self._show_chosen()
            self._trouble.text = ""
        except SageError as error:
            self._trouble.text = str(error)

    async def _show_chosen(self) -> None:
        engine = self._chosen()
        steps = await self._client.training_steps(engine.id) if engine else []
        self._about.text = _about(engine) if engine else "Choose an engine to see more of it."
        self._chart.set_visibility(bool(steps))
        if steps:
            self._chart.options.update(_loss_chart(steps))
            self._chart.update()

    async def _stop(self) -> None:
        if engine := self._chosen():
            await self._tell(self._client.stop_engine(engine.id))

    async def _resume(self) -> None:
        if engine := self._chosen():
            await self._tell(self._client.resume_engine(engine.id))

    async def _tell(self, call: Any) -> None:
        try:
            engine = await call
            ui.notify(f"{engine.id}: {engine.state}")
        except SageError as error:
            ui.notify(str(error), type="negative")

    def _chosen(self) -> EngineView | None:
        selected = self._table.selected
        return self._engines.get(selected[0]["id"]) if selected else None


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


def _about(engine: EngineView) -> str:
    facts = [f"{engine.id} is {engine.state}"]
    if engine.reason:
        facts.append(f"{engine.reason.message} {engine.reason.hint}")
    if engine.training and engine.training.total_steps:
        facts.append(f"step {engine.training.step} of {engine.training.total_steps}")
        if engine.training.tokens_per_second:
            facts.append(f"{engine.training.tokens_per_second:.0f} tokens/s")
        if engine.training.eta_seconds:
            facts.append(f"{duration(engine.training.eta_seconds)} left")
    return " · ".join(facts)


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
