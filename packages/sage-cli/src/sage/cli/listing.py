"""Select the engines that `sage llm engine list` shows."""

from dataclasses import dataclass

from sage.llm.client import SageClient
from sage.llm.client.types import SETTLED, EngineKind, EngineState, EngineView


@dataclass(frozen=True)
class Selection:
    """Filters of the list of engines; an empty tuple means no filter."""

    states: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    settled_limit: int | None = 20  #: maximum number of stopped, completed and failed engines; None: no limit


def select(client: SageClient, selection: Selection) -> tuple[list[EngineView], bool]:
    """Return the selected engines, oldest first, and whether there are more settled engines than `settled_limit`."""
    states = [EngineState(state) for state in selection.states] or list(EngineState)
    kinds = [EngineKind(kind) for kind in selection.kinds]
    if selection.settled_limit is None:
        return client.list_engines(states=states if selection.states else (), kinds=kinds), False
    engines, has_more = [], False
    if active := [state for state in states if state not in SETTLED]:
        engines = client.list_engines(states=active, kinds=kinds)
    if settled := [state for state in states if state in SETTLED]:
        page = client.page_engines(limit=max(selection.settled_limit, 1), states=settled, kinds=kinds, order="desc")
        shown = page.data[: selection.settled_limit]
        has_more = page.has_more or len(shown) < len(page.data)
        settled_ids = {engine.id for engine in shown}  # an engine that ended between the two requests is in both answers
        engines = sorted([*(e for e in engines if e.id not in settled_ids), *shown], key=lambda e: e.created_at)
    return engines, has_more
