"""Talking to a model in a terminal."""

import contextlib
import sys
from typing import Any

import typer

from sage.common.errors import SageError
from sage.llm.client import SageClient

_PROMPT = ">>> "


class Conversation:
    """What was said so far, and how it goes on."""

    def __init__(self, client: SageClient, model: str, system: str | None, options: dict[str, Any]) -> None:
        self._client, self._model, self._options = client, model, options
        self._first = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._first)

    def ask(self, text: str) -> None:
        """Say something and print the answer as it comes; Ctrl-C cuts it short, and is raised when what came is kept."""
        self._messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in self._client.chat_stream(self._model, self._messages, **self._options):
                answer += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            self._end(answer)
            raise
        except SageError:
            self._messages.pop()
            if answer:  # the error begins a line of its own
                sys.stdout.write("\n")
            raise
        self._end(answer)

    def _end(self, answer: str) -> None:
        sys.stdout.write("\n")
        self._messages.append({"role": "assistant", "content": answer})

    def repeat(self) -> None:
        """Ask what the user types, until they leave."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` a history
        if sys.stdin.isatty():
            typer.echo(f"Talking to {self._model}. /clear forgets, /exit leaves.", err=True)
        while True:
            try:
                text = input(_PROMPT if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                return
            match text:
                case "/exit" | "/quit":
                    return
                case "/clear":
                    self._messages = list(self._first)
                case "":
                    pass
                case _:
                    self._say(text)

    def _say(self, text: str) -> None:
        try:
            self.ask(text)
        except KeyboardInterrupt:
            pass  # it had said enough
        except SageError as error:  # the next question may do better
            typer.echo(f"Error: {error}", err=True)
            if not sys.stdin.isatty():
                raise
