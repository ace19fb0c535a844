"""Chat with a model in a terminal."""

import contextlib
import sys
from typing import Any

import typer

from sage.common.errors import SageError
from sage.llm.client import SageClient

_PROMPT = ">>> "


class Conversation:
    """A chat: the messages so far, and methods to send the next message."""

    def __init__(self, client: SageClient, model: str, system: str | None, options: dict[str, Any]) -> None:
        self._client, self._model, self._options = client, model, options
        self._first = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._first)

    def ask(self, text: str) -> None:
        """Send a message and print the answer as it arrives.

        After Ctrl-C, the received part of the answer is stored in the chat, and KeyboardInterrupt is raised.
        """
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
            if answer:  # start the error message on a new line
                sys.stdout.write("\n")
            raise
        self._end(answer)

    def _end(self, answer: str) -> None:
        sys.stdout.write("\n")
        self._messages.append({"role": "assistant", "content": answer})

    def repeat(self) -> None:
        """Send each line of the standard input as a message, until /exit or the end of the input.

        During an answer, Ctrl-C ends only the answer. At the prompt, Ctrl-C ends the conversation.
        """
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - adds a history to `input`
        if sys.stdin.isatty():
            typer.echo(f"Chat with {self._model}. /clear starts a new conversation, /exit exits.", err=True)
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
                    self._ask_and_continue(text)

    def _ask_and_continue(self, text: str) -> None:
        try:
            self.ask(text)
        except KeyboardInterrupt:
            pass  # the user ended the answer, not the conversation
        except SageError as error:  # in a terminal, the user can send the next message
            typer.echo(f"Error: {error}", err=True)
            if not sys.stdin.isatty():
                raise
