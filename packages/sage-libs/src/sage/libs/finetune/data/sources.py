"""Which datasets a run learns from, and how often each is taken."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

_WEIGHED = re.compile(r"(?P<path>.+)=(?P<weight>(\d+(\.\d+)?|\.\d+)(e[+-]?\d+)?)")


@dataclass(frozen=True)
class Source:
    """A dataset as it was asked for: `FILE`, or `FILE=WEIGHT`."""

    path: Path  #: absolute
    weight: float = 1.0  #: how many times its samples are taken in an epoch

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Return the source of `FILE` or `FILE=WEIGHT`; relative paths count from the working folder.

        A file or folder of the whole name wins. Raises ValueError for a weight of zero and for an unknown user's home.
        """
        weighed = None if _exists(absolute(text)) else _WEIGHED.fullmatch(text)
        path, weight = (weighed["path"], float(weighed["weight"])) if weighed else (text, 1.0)
        if not 0 < weight < math.inf:
            raise ValueError(f"{text}: a weight must be a number above 0; to leave the dataset out, omit it")
        return cls(absolute(path), weight)

    def __str__(self) -> str:
        """The way back of `parse`, also once the file is gone."""
        is_plain = self.weight == 1 and not _WEIGHED.fullmatch(str(self.path))
        return str(self.path) if is_plain else f"{self.path}={repr(self.weight).removesuffix('.0')}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, say
        return False


def absolute(text: str) -> Path:
    """Return a path that was typed, with `~` for the home folder, as an absolute one.

    Raises ValueError if there is no such user.
    """
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{text}: the home folder of this user is not known") from error
