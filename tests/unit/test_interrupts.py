"""Ctrl-C while a command waits: the command reports what continues to run."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer
from engine_views import engine_view

from sage.cli import daemon, starting, waiting
from sage.cli.conversation import Conversation
from sage.llm.client.types import EngineView

SHOW = "Show it: `sage llm engine status engine-a`"
STOP = "stop it: `sage llm engine stop engine-a`"


class Client:
    """A client of a gateway; the user presses Ctrl-C during its call."""

    base_url = "http://127.0.0.1:1"

    def __init__(self, state: str) -> None:
        self._view = engine_view(kind="llm", state=state)

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
    ("state", "call", "message"),
    [
        (
            "validating",
            lambda client: starting.start_engine("m", "llm", {}),
            f"still validating. {SHOW}; {STOP}.",
        ),
        ("validating", lambda client: waiting.until_validated(client, "engine-a"), f"still validating. {SHOW}; {STOP}."),
        ("starting", lambda client: waiting.until_running(client, "engine-a"), f"still starting. {SHOW}; {STOP}."),
        ("stopping", lambda client: waiting.until_settled(client, "engine-a"), f"still stopping. {SHOW}."),
    ],
)
def test_an_interrupted_command_says_what_the_engine_does_and_how_to_stop_it(
    state: str,
    call: Callable[[Any], object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = Client(state)
    monkeypatch.setattr(daemon, "connect", lambda: client)
    with pytest.raises(typer.Exit) as ended:
        call(client)
    assert ended.value.exit_code == 130
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_only_the_answer_and_the_conversation_continues(
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
