"""Save the status of a run at each checkpoint and at the end. Readers then parse only the events after the saved status."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from sage.common.files import replace_file
from sage.common.training import AnyRunEvent
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import RunStatus, fold

#: A summary contains a checksum of this many bytes before `offset`. If these bytes have changed, the summary is ignored.
_COMPARED_BYTES = 512


@dataclass(frozen=True)
class Summary:
    """The status of a run, derived from the events before the byte `offset` of `events.jsonl`."""

    offset: int = 0
    crc32: int = 0  #: checksum of up to 512 bytes before the offset
    status: RunStatus = field(default_factory=RunStatus)


_SUMMARY = TypeAdapter(Summary)


def read_status(run: RunDirectory) -> RunStatus:
    """Return the status of a run from its events only, without a check whether the worker is alive."""
    return catch_up(run, read_summary(run)).status


def read_summary(run: RunDirectory) -> Summary:
    """Return the saved summary; if it is missing or does not match the events, return an empty summary."""
    try:
        summary = _SUMMARY.validate_json(run.summary_path.read_bytes())
        return summary if summary.crc32 == _crc32(run, summary.offset) else Summary()
    except (OSError, ValueError):
        return Summary()


def catch_up(run: RunDirectory, summary: Summary) -> Summary:
    """Return a summary that includes the events appended after `summary`. The checksum is not updated."""
    offset = summary.offset

    def appended() -> Iterator[AnyRunEvent]:
        nonlocal offset
        for event, end in run.read_events(offset):
            offset = end
            yield event

    status = fold(summary.status, appended())
    return Summary(offset, summary.crc32, status)


def write_summary(run: RunDirectory) -> None:
    """Save the status of a run in `summary.json`."""
    summary = catch_up(run, read_summary(run))
    saved = Summary(summary.offset, _crc32(run, summary.offset), summary.status)
    replace_file(run.summary_path, _SUMMARY.dump_json(saved), mode=0o600)


def _crc32(run: RunDirectory, offset: int) -> int:
    with run.events_path.open("rb") as file:
        file.seek(max(0, offset - _COMPARED_BYTES))
        return zlib.crc32(file.read(min(offset, _COMPARED_BYTES)))
