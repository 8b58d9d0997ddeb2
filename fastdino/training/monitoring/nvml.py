"""What NVIDIA's management library knows of a GPU, where nvidia-ml-py is installed. No question waits for the GPU."""

import contextlib
from typing import Any

import torch

# nvmlClocksThrottleReason*: an idle GPU, and one whose clocks a person has set, are no fault.
REASONS = {0x04: "power cap", 0x08: "hardware slowdown", 0x20: "too hot", 0x40: "too hot", 0x80: "power brake"}


class Gpu:
    """A GPU of this process. What is not known is None.

    Args:
        device: as torch counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        with contextlib.suppress(Exception):  # no GPU, package or library, no right to ask, a slice of a GPU
            import pynvml

            pynvml.nvmlInit()
            # By UUID: this process may see some of the machine's GPUs, and in another order than NVML.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml

    def clocks(self) -> tuple[int, int] | None:
        """Of its processors, in MHz: now and at most."""
        now, most = (self._ask(f"nvmlDeviceGet{which}ClockInfo", "NVML_CLOCK_SM") for which in ("", "Max"))
        return None if now is None or most is None else (now, most)

    def slowed_by(self) -> int:
        """Why its clock is low, in bits of which REASONS has some."""
        return self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0

    def uncorrected(self) -> int | None:
        """Errors of its memory since its driver was loaded that ECC could not correct; None where ECC is off."""
        kind = "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_VOLATILE_ECC"
        return self._ask("nvmlDeviceGetTotalEccErrors", *kind)

    def driver(self) -> str | None:
        """Its driver's version."""
        with contextlib.suppress(Exception):
            return str(self._nvml.nvmlSystemGetDriverVersion())
        return None

    def _ask(self, function: str, *constants: str) -> int | None:
        with contextlib.suppress(Exception):  # what this GPU does not support, or is not told to everybody
            return int(getattr(self._nvml, function)(self._handle, *(getattr(self._nvml, name) for name in constants)))
        return None


def reasons(bits: int) -> str:
    """:meth:`Gpu.slowed_by`, of any rank, as a person calls it; empty for no fault."""
    return ", ".join(dict.fromkeys(text for bit, text in REASONS.items() if bit & bits))
