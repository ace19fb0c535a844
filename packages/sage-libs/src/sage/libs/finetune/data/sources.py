"""The datasets of a run, each with its weight."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

_WEIGHED = re.compile(r"(?P<path>.+)=(?P<weight>(\d+(\.\d+)?|\.\d+)(e[+-]?\d+)?)")


@dataclass(frozen=True)
class Source:
    """A dataset as given by the user: `FILE` or `FILE=WEIGHT`."""

    path: Path  #: absolute
    weight: float = 1.0  #: how many times each sample is used per epoch

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Parse `FILE` or `FILE=WEIGHT`; relative paths are resolved from the working directory.

        If a file or folder named `text` exists, `text` is parsed as a path without a weight. Raises ValueError if the weight
        is 0 or infinite, or if the home folder in a path such as `~user` is unknown.
        """
        weighed = None if _exists(absolute(text)) else _WEIGHED.fullmatch(text)
        path, weight = (weighed["path"], float(weighed["weight"])) if weighed else (text, 1.0)
        if not 0 < weight < math.inf:
            raise ValueError(f"{text}: a weight must be a number above 0; to exclude a dataset, remove it")
        return cls(absolute(path), weight)

    def __str__(self) -> str:
        """Return a text that `parse` converts back to the same source, even if the file no longer exists."""
        is_plain = self.weight == 1 and not _WEIGHED.fullmatch(str(self.path))
        return str(self.path) if is_plain else f"{self.path}={repr(self.weight).removesuffix('.0')}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # for example, the name is too long
        return False


def absolute(text: str) -> Path:
    """Return an absolute path, with `~` expanded.

    Raises ValueError if the user in `~user` does not exist.
    """
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{text}: the home folder of this user is not known") from error
