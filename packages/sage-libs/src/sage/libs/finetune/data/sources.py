"""Which datasets a run learns from, and how often each is taken."""

import re
from dataclasses import dataclass
from pathlib import Path

_WEIGHED = re.compile(r"(?P<path>.+)=(?P<weight>\d+(\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Source:
    """A dataset as it was asked for: `FILE`, or `FILE=WEIGHT`."""

    path: Path  #: absolute
    weight: float = 1.0  #: how many times its samples are taken in an epoch

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Return the source of `FILE` or `FILE=WEIGHT`; relative paths count from the working folder.

        Raises ValueError for a weight of zero.
        """
        weighed = _WEIGHED.fullmatch(text)
        path, weight = (weighed["path"], float(weighed["weight"])) if weighed else (text, 1.0)
        if not weight:
            raise ValueError(f"{text}: a weight is above 0; leave the dataset away instead")
        return cls(Path(path).expanduser().absolute(), weight)

    def __str__(self) -> str:
        """The way back of `parse`."""
        return str(self.path) if self.weight == 1 else f"{self.path}={self.weight:g}"
