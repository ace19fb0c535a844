"""Decode a stream of tokens to text with complete characters, and end the text before a stop string."""

import re
from functools import cache
from typing import Any

_REPLACEMENT = "\ufffd"
#: An incomplete character at the end of a text is delayed for at most this number of tokens. After that, replacement
#: characters are returned for the incomplete character.
_MAX_PENDING_TOKENS = 256
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class TextDecoder:
    """Decodes tokens one by one. If the returned texts are joined, the result equals the text of the whole token sequence.

    A token cannot be decoded alone. A character can consist of several byte tokens, and SentencePiece tokenizers remove a
    space at the beginning of a text.
    """

    def __init__(self, tokenizer: Any, context: list[int] | None = None, shown_tokens: frozenset[int] = frozenset()) -> None:
        """context: tokens before the text. Their text is not returned.  shown_tokens: special tokens to return as text."""
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids) - shown_tokens
        self._ids: list[int] = []
        self._known = 0  #: number of context tokens at the start of `_ids`
        self._shown = ""  #: part of the decoded text that was already returned
        self.characters = 0
        for token in (context or [])[-8:]:
            self.push(token)
        self.characters = 0

    def push(self, token: int) -> str:
        """Add a token, and return the new text with complete characters."""
        if token in self._special:
            return ""
        self._ids.append(token)
        text = self._text()
        is_whole = bool(text) and not text.endswith(_REPLACEMENT)
        if not is_whole and len(self._ids) - self._known < _MAX_PENDING_TOKENS:
            return self._show(text.rstrip(_REPLACEMENT))
        new = self._show(text)
        self._ids = self._ids[self._known :]
        self._known, self._shown = len(self._ids), ""
        return new

    def flush(self) -> str:
        """Return the remaining text at the end of an answer."""
        return self._show(self._text())

    def _text(self) -> str:
        context = self._decode(self._ids[: self._known])
        return self._decode(self._ids)[len(context) :]

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown += new
        self.characters += len(new)
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class StopStrings:
    """Ends a text before the first stop string, and delays text that can be the beginning of a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.is_met = False

    def push(self, text: str) -> str:
        """Add text to the delayed text, and return the part that cannot belong to a stop string.

        After the call that finds a stop string, each call returns "".
        """
        if self.is_met:
            return ""
        self._held += text
        if found := [at for stop in self._stops if (at := self._held.find(stop)) >= 0]:
            self.is_met = True
            self._held = self._held[: min(found)]
            return self.flush()
        first = max(0, len(self._held) - self._longest + 1)
        tails = (at for at in range(first, len(self._held)) if self._may_become_stop(self._held[at:]))
        ready = next(tails, len(self._held))
        text, self._held = self._held[:ready], self._held[ready:]
        return text

    def flush(self) -> str:
        """Return the delayed text at the end of an answer."""
        text, self._held = self._held, ""
        return text

    def _may_become_stop(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)


class TokenBytes:
    """Returns the bytes of tokens. A leading space is included, because `Answer` and ` Answer` are different tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._added = tokenizer.added_tokens_decoder
        self.of = cache(self._of)

    def _of(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # the model has more tokens than its tokenizer
            return b""
        if byte := _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(byte[1])
        if token in self._added:
            return str(name).encode()
        text = self._decode([*self._anchor, token]).removeprefix(self._decode(self._anchor))
        if _REPLACEMENT in text and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return text.encode()

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _byte_level_alphabet() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
