"""The devices of a node (GPUs that NVIDIA's library reports, fake GPUs, main memory) and the engines that use them."""

import os
import socket
from collections import namedtuple
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest

from sage.common.cgroups import MemoryLimit
from sage.common.errors import ConfigError, EngineError
from sage.common.fake_devices import FakeDevice, parse_fake_devices
from sage.common.settings import load_settings
from sage.llm.control_plane.admission import DeviceMemory
from sage.llm.control_plane.inventory import Inventory, Occupant, gpu_memory_of, gpus, has_gpu, inventory
from sage.llm.control_plane.inventory.inventory import within
from sage.llm.control_plane.metrics import device_metrics

PID = os.getpid()
SIZES = (("gpu-0", 80, 8), ("gpu-2", 40, 9), ("gpu-3", 24, 1), ("gpu-4", 40, 0), ("mig-0", 20, 0), ("mig-4", 5, 3))
MEMORY = {name: SimpleNamespace(total=total, used=used) for name, total, used in SIZES}


class NVMLError(Exception):
    """The error that NVIDIA's library raises for a value that a device does not support."""


class Nvml:
    """NVIDIA's library on a machine with five GPUs.

    GPU 0 is ordinary, GPU 1 was lost, GPU 2 is partitioned into two MIG devices,
    GPU 3 reports only its memory, and GPU 4 is partitioned, but has no MIG devices yet.
    """

    NVMLError = NVMLError
    NVML_DEVICE_MIG_ENABLE, NVML_TEMPERATURE_GPU = 1, 0
    processes = (SimpleNamespace(pid=PID, usedGpuMemory=6), SimpleNamespace(pid=1, usedGpuMemory=None))
    values: ClassVar[dict[str, dict[Any, Any]]] = {
        "nvmlDeviceGetHandleByIndex": {0: "gpu-0", 2: "gpu-2", 3: "gpu-3", 4: "gpu-4"},
        "nvmlDeviceGetMigMode": {"gpu-0": [0, 1], "gpu-2": [1, 1], "gpu-4": [1, 1]},
        "nvmlDeviceGetMaxMigDeviceCount": {"gpu-2": 7},
        "nvmlDeviceGetName": {"gpu-0": "H100", "mig-0": "A100 MIG 3g.20gb", "mig-4": "A100 MIG 1g.5gb"},
        "nvmlDeviceGetUUID": {"gpu-0": "GPU-0", "mig-0": "MIG-0", "mig-4": "MIG-4"},
        "nvmlDeviceGetUtilizationRates": {"gpu-0": SimpleNamespace(gpu=50), "gpu-2": SimpleNamespace(gpu=7)},
        "nvmlDeviceGetTemperature": {"gpu-0": 40, "gpu-2": 50},
        "nvmlDeviceGetComputeRunningProcesses": {"gpu-0": processes, "mig-4": processes},
        "nvmlDeviceGetMemoryInfo": MEMORY,
    }

    def __getattr__(self, name: str) -> Any:
        def call(handle: Any, *_: int) -> Any:
            if handle not in self.values[name]:
                raise NVMLError("Not Supported")
            return self.values[name][handle]

        return call

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 5

    def nvmlDeviceGetMigDeviceHandleByIndex(self, _: str, index: int) -> str:  # noqa: N802
        if index not in (0, 4):
            raise NVMLError("Not Found")
        return f"mig-{index}"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace NVIDIA's library, because the machine of the tests has no GPU."""
    monkeypatch.setattr(gpus, "_nvml", Nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        ("0", ["cuda:0"]),
        ("3, 0", ["cuda:0", "cuda:4"]),
        ("2", ["cuda:2", "cuda:3"]),
        ("MIG-4", ["cuda:3"]),
        ("GPU-0", ["cuda:0"]),
        ("", []),
        ("-1", []),
    ],
)
def test_only_gpus_that_the_gateway_may_use_are_listed(
    visible: str, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [device.id for device in Inventory(load_settings()).devices()] == [*ids, "cpu"]
    assert has_gpu() == bool(ids)


@pytest.mark.usefixtures("nvml")
def test_gpus_and_the_mig_devices_of_partitioned_gpus_are_listed() -> None:
    devices = Inventory(load_settings()).devices()
    assert [(device.id, device.name, device.uuid, device.is_mig) for device in devices] == [
        ("cuda:0", "H100", "GPU-0", False),
        ("cuda:2", "A100 MIG 3g.20gb", "MIG-0", True),
        ("cuda:3", "A100 MIG 1g.5gb", "MIG-4", True),
        ("cuda:4", "GPU", None, False),
        ("cpu", "main memory", None, False),
    ]
    assert [(d.memory_total_bytes, d.memory_used_bytes) for d in devices[:4]] == [(80, 8), (20, 0), (5, 3), (24, 1)]
    assert [device.utilization_percent for device in devices[:4]] == [50, None, None, None]
    assert [device.temperature_celsius for device in devices[:4]] == [40, 50, 50, None]
    assert not any(device.is_fake for device in devices)
    assert has_gpu()


@pytest.mark.usefixtures("nvml")
def test_a_device_lists_the_engines_that_use_or_have_reserved_its_memory() -> None:
    running = Occupant("engine-a", "a", PID, 1000, ("cuda:0",), 70)
    starting = Occupant("engine-b", "b", None, None, ("cuda:2", "cpu"), 15)
    devices = {device.id: device for device in Inventory(load_settings()).devices([running, starting])}
    shares = {
        key: [(engine.id, engine.memory_bytes, engine.reserved_bytes) for engine in device.engines]
        for key, device in devices.items()
    }
    assert shares == {
        "cuda:0": [("engine-a", 6, 70)],
        "cuda:2": [("engine-b", 0, 15)],
        "cuda:3": [("engine-a", 6, None)],
        "cuda:4": [],
        "cpu": [("engine-a", 1000, None), ("engine-b", 0, 15)],
    }


@pytest.mark.usefixtures("nvml")
def test_the_memory_of_own_servers_is_not_counted_as_used_by_other_programs() -> None:
    measured = Inventory(load_settings())
    assert measured.memory({})[1:3] == [DeviceMemory("cuda:0", 80, 8), DeviceMemory("cuda:2", 20, 0)]
    assert measured.memory({"server-a": PID})[1:] == [
        DeviceMemory("cuda:0", 80, 2, {"server-a": 6}),
        DeviceMemory("cuda:2", 20, 0),
        DeviceMemory("cuda:3", 5, 0, {"server-a": 6}),
        DeviceMemory("cuda:4", 24, 1),
    ]
    assert gpu_memory_of(PID) == 12
    assert gpu_memory_of(2**22) is None


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("devices", "visible"),
    [
        (("cuda:0",), "0"),
        (("cuda:4", "cuda:0"), "0,3"),
        (("cuda:3",), "MIG-4"),  # a number selects only whole GPUs
        (("cpu",), ""),
    ],
)
def test_a_process_sees_only_the_gpus_that_it_was_given(devices: tuple[str, ...], visible: str) -> None:
    variables = Inventory(load_settings()).variables(devices)
    assert variables == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}


@pytest.mark.usefixtures("nvml")
def test_a_process_without_assigned_devices_may_use_all_gpus_and_a_missing_device_is_an_error() -> None:
    assert Inventory(load_settings()).variables(()) == {}
    with pytest.raises(EngineError, match=r"does not have the devices cuda:1, cuda:9\."):
        Inventory(load_settings()).variables(("cuda:9", "cuda:0", "cuda:1"))


@pytest.mark.usefixtures("nvml")
def test_a_process_on_a_fake_gpu_uses_no_real_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_FAKE_DEVICES", "2x24GiB")
    assert Inventory(load_settings()).variables(("cuda:1",))["CUDA_VISIBLE_DEVICES"] == ""


def test_no_gpu_is_listed_if_the_driver_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Nvml):
        def nvmlDeviceGetCount(self) -> int:  # noqa: N802
            raise NVMLError("Driver/library version mismatch")

    monkeypatch.setattr(gpus, "_nvml", Broken)
    assert [device.kind for device in Inventory(load_settings()).devices()] == ["cpu"]
    assert not has_gpu()


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("2x24GiB", 2 * [FakeDevice("fake 24 GiB", 24 * 2**30)]),
        ("1x80GB, 1x1.5GiB", [FakeDevice("fake 80 GB", 80 * 10**9), FakeDevice("fake 1.5 GiB", 3 * 2**29)]),
    ],
)
def test_fake_devices_have_a_count_and_a_size(text: str, devices: list[FakeDevice]) -> None:
    assert parse_fake_devices(text) == devices


@pytest.mark.parametrize("text", ["2", "2x24", "0x24GiB", "100x1GB", "2x0GB", "2x24GiB,", "24GiB", "2x24gib"])
def test_a_wrong_description_of_fake_devices_is_an_error_of_the_settings(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_FAKE_DEVICES", text)
    with pytest.raises(
        ConfigError, match="fake_devices: must be COUNTxSIZE with a size in GB or GiB, for example `2x24GiB`"
    ):
        load_settings()


@pytest.mark.usefixtures("nvml")
def test_fake_devices_replace_the_gpus_and_are_named_as_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_FAKE_DEVICES", "2x24GiB")
    measured = Inventory(load_settings())
    devices = measured.devices()
    assert [(device.id, device.name, device.is_fake) for device in devices] == [
        ("cuda:0", "fake 24 GiB", True), ("cuda:1", "fake 24 GiB", True), ("cpu", "main memory", False),
    ]  # fmt: skip
    assert [(memory.id, memory.foreign_bytes) for memory in measured.memory({"server-a": PID})[1:]] == [
        ("cuda:0", 0),
        ("cuda:1", 0),
    ]
    samples = [sample for metric in device_metrics(devices) for sample in metric.samples]
    assert {sample.labels["kind"] for sample in samples if sample.name.startswith("sage_device_")} == {"fake", "cpu"}


@pytest.mark.parametrize(
    ("bounds", "own", "limit", "usable", "foreign"),
    [
        ([(100, 30)], 0, None, 100, 30),
        ([(100, 30)], 20, None, 100, 10),
        ([(100, 30)], 40, None, 100, 0),
        ([(100, 30), (50, 30)], 20, None, 50, 10),
        ([(100, 80), (50, 30)], 20, None, 50, 10),  # without own processes, machine and cgroup have 40 free each
        ([(100, 95), (50, 30)], 20, None, 50, 25),  # without own processes, the machine has 25 free
        ([(100, 30)], 0, 60, 60, 0),  # other programs leave 70
        ([(100, 30)], 0, 90, 90, 20),
        ([(100, 30)], 0, 200, 100, 30),
        ([(100, 30), (50, 45)], 40, 20, 20, 0),
    ],
)
def test_the_smallest_limit_is_usable_and_memory_of_other_programs_is_subtracted(
    bounds: list[tuple[int, int]], own: int, limit: int | None, usable: int, foreign: int
) -> None:
    found = within("cpu", [MemoryLimit(*bound) for bound in bounds], own, limit)
    assert found == DeviceMemory("cpu", usable, foreign)


def test_main_memory_respects_the_setting_and_the_limit_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "memory_limits", lambda: [MemoryLimit(8 * 10**9, 5 * 10**9)])
    [device] = [device for device in Inventory(load_settings()).devices() if device.kind == "cpu"]
    assert device.memory_usable_bytes == min(8 * 10**9, psutil.virtual_memory().total)
    monkeypatch.setenv("SAGE_MEMORY_LIMIT_GB", "0.5")
    assert Inventory(load_settings()).memory({})[0].usable_bytes == 500_000_000


def test_the_private_memory_of_own_processes_is_subtracted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    total = namedtuple("total", "total available")(100 * 10**9, 60 * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: total)
    monkeypatch.setattr(inventory, "memory_limits", list)
    monkeypatch.setattr(inventory, "all_sessions", lambda: {PID: [PID]})
    measured = Inventory(load_settings())
    assert measured.memory({})[0] == DeviceMemory("cpu", 100 * 10**9, 40 * 10**9)
    own = measured.memory({"server-a": PID, "server-b": 2**22})[0]
    used = psutil.Process().memory_info()
    assert 40 * 10**9 - used.rss <= own.foreign_bytes < 40 * 10**9
    assert own.used_bytes == {"server-a": 40 * 10**9 - own.foreign_bytes, "server-b": 0}
    assert socket.gethostname() == measured.devices()[-1].node
