"""Parse the setting `fake_devices`: fake GPUs, with which scheduling can be tried on a machine without GPUs."""

import re
from dataclasses import dataclass

_PART = re.compile(r"([1-9]\d?)x(\d+(?:\.\d+)?)(GiB|GB)")
_UNIT_BYTES = {"GB": 10**9, "GiB": 2**30}


@dataclass(frozen=True)
class FakeDevice:
    """A fake GPU."""

    name: str
    memory_bytes: int


def parse_fake_devices(text: str) -> list[FakeDevice]:
    """Return the devices that a text such as `1x80GB,2x24GiB` describes. Raises ValueError if the text is invalid."""
    devices: list[FakeDevice] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None or float(match[2]) == 0:
            raise ValueError("must be COUNTxSIZE with a size in GB or GiB, for example `2x24GiB` or `1x80GB,2x24GiB`")
        count, size, unit = match.groups()
        devices += int(count) * [FakeDevice(f"fake {size} {unit}", round(float(size) * _UNIT_BYTES[unit]))]
    return devices
