"""Where models run, and in which precision, outside of training (trainers ask Accelerate)."""

import os
import platform

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str | None = None, argument: str = "device") -> torch.device:
    """The device with this name; without one the accelerator that torch finds (CUDA, MPS, ...), else the CPU.

    `ACCELERATE_USE_CPU=true` keeps to the CPU, as it does for the trainers. `argument` is what messages call the name.

    Raises:
        ValueError: a name that torch does not know, or a device that is not there.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if not name:
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        found = None if on_cpu else torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cpu" and device.index:
            raise RuntimeError("torch has one CPU, whatever its cores")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`{argument}` = {name!r} cannot be used here ({reason}); give cpu, or none to choose."
        ) from None
    return device


def device_name(device: torch.device) -> str:
    """What people call a device: the GPU's name, or the CPU's with its threads.

    Example:
        >>> device_name(torch.device("mps"))
        'MPS'
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type.upper()


def find_dtype(name: str) -> torch.dtype:
    """The precision with this name.

    Raises:
        ValueError: another name.
    """
    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]
