"""Ctrl-C while a command waits: whoever presses it is told what goes on without them."""

import os
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import typer

from sage.cli import daemon, waiting
from sage.cli.commands.apps import engine
from sage.cli.conversation import Conversation
from sage.llm.client.types import EngineView


class Client:
    """A gateway's client; the user presses Ctrl-C while it is in a call."""

    base_url = "http://127.0.0.1:1"

    def __init__(self, state: str) -> None:
        now = datetime.now(UTC)
        self._view = EngineView.model_validate({
            "id": "engine-a", "kind": "llm", "model": "m", "name": "m", "state": state, "created_at": now, "state_at": now,
            "log_path": "/log",
        })  # fmt: skip

    def start_engine(self, **_: Any) -> EngineView:
        return self._interrupted()

    def get_engine(self, _: str) -> EngineView:
        return self._interrupted()

    def chat_stream(self, _: str, messages: list[Any], **__: Any) -> Iterator[str]:
        self.asked = [message["content"] for message in messages]
        yield "Once"
        raise KeyboardInterrupt

    def _interrupted(self) -> EngineView:
        os.kill(os.getpid(), signal.SIGINT)
        return self._view


@pytest.mark.parametrize(
    ("state", "call", "told"),
    [
        ("queued", lambda client: engine.start_engine("m", "llm", {}), "engine-a goes on. Watch it"),
        ("starting", lambda client: waiting.until_running(client, "engine-a"), "engine-a goes on. Watch it"),
        ("stopping", lambda client: waiting.until_ended(client, "engine-a"), "engine-a goes on stopping. Look at it"),
    ],
)
def test_an_interrupted_command_says_what_goes_on(
    state: str,
    call: Callable[[Any], object],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = Client(state)
    monkeypatch.setattr(daemon, "connect", lambda: client)
    with pytest.raises(typer.Exit) as ended:
        call(client)
    assert ended.value.exit_code == 130
    assert told in capsys.readouterr().err


def test_an_answer_that_was_cut_short_is_no_success_and_a_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = Client("running")
    with pytest.raises(KeyboardInterrupt):
        Conversation(client, "m", None, {}).ask("Tell me")
    assert capsys.readouterr().out == "Once\n"
    typed = iter(["Tell me", "Go on"])

    def read(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    Conversation(client, "m", None, {}).repeat()
    assert client.asked == ["Tell me", "Once", "Go on"]
