"""Choose a backend for an engine whose request names no backend."""

from collections.abc import Mapping, Sequence

from sage.llm.control_plane.backends.base import Backend
from sage.llm.control_plane.backends.speeds import saved_speeds

#: Generation speed of each backend relative to transformers, for each kind of device. The speeds are for 16 concurrent
#: requests that use one adapter.
#: The values for a CPU are measured (benchmarks/results/serving.md). The values for a GPU are not measured. Their only
#: purpose is to make vLLM the first choice.
RELATIVE_SPEEDS: Mapping[str, Mapping[str, float]] = {
    "cpu": {"transformers": 1.0, "vllm": 0.54, "llamacpp": 1.4, "openvino": 2.4},
    "cuda": {"vllm": 2.0, "transformers": 1.0},
}
#: Like RELATIVE_SPEEDS, but for requests to one whole model, for example to a base model with a merged adapter.
#: The values for a GPU are not measured.
MERGED_SPEEDS: Mapping[str, Mapping[str, float]] = {
    "cpu": {"transformers": 1.0, "llamacpp": 1.4, "vllm": 1.0, "openvino": 2.4},
    "cuda": {"vllm": 2.0, "transformers": 1.0},
}


def choose(candidates: Sequence[Backend], device: str, purpose: str = "for this model") -> tuple[Backend, str]:
    """Return the fastest of the installed backends `candidates`, and the reason to show to users.

    If some candidates can load adapters into a running server, only these candidates are compared.
    purpose: the end of the reason if there is only one candidate, and this candidate cannot load adapters into a running
    server. Example: "that can quantize the model to int8".
    """
    compared = [backend for backend in candidates if backend.capabilities.hot_adapters] or list(candidates)
    if len(compared) == 1:
        which = "that loads adapters into a running server" if compared[0].capabilities.hot_adapters else purpose
        return compared[0], f"the only installed backend {which}"
    return fastest(compared, device, RELATIVE_SPEEDS)


def fastest(
    candidates: Sequence[Backend], device: str, default_speeds: Mapping[str, Mapping[str, float]]
) -> tuple[Backend, str]:
    """Return the fastest backend, and the reason to show to users. Speeds that were measured on this machine are preferred.

    default_speeds: relative speeds by kind of device, used if no speeds were measured on this machine.
    """
    measured = saved_speeds(device)
    speeds = measured.tokens_per_second if measured else default_speeds.get(device, {})
    first = max(candidates, key=lambda backend: speeds.get(backend.name, 0.0))
    if measured:
        return first, f"the fastest in `sage backend benchmark` of {measured.date}"
    return (
        first,
        f"the first choice for the device {device}; `sage backend benchmark MODEL` measures all backends on this machine",
    )
