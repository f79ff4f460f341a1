"""A step of the decoder, recorded once and then replayed: a CUDA graph.

A step is some hundred small kernels. A GPU runs them faster than Python launches them, one by one; a graph is launched at once.
What is recorded are addresses and shapes, so the step must be the static one (`StepDecoder.restart`), and its codes and logits
lie where they lay when it was recorded.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from .step_decoder import StepDecoder

_WORTH_IT_FROM = 32  # steps: recording takes as long as some dozens of them
_WARM_UPS = 3  # torch's own number: libraries choose their kernels and allocate their workspaces at the first calls


class Recorder(Protocol):
    """Records what a function does on a device and does it again. One recorder, one function."""

    def __init__(self, device: torch.device): ...

    def aside(self) -> AbstractContextManager:
        """Where the function is warmed up and recorded."""

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        """The function's output, in which every replay leaves its own. RuntimeError: it cannot be recorded."""

    def replay(self) -> None:
        """What was recorded, once more."""


class CudaRecorder:
    """A `Recorder` that is a CUDA graph."""

    def __init__(self, device: torch.device):
        self.device = device
        self.graph = torch.cuda.CUDAGraph()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A stream of its own, for the default stream cannot be recorded; a process can record one graph at a time."""
        with _RECORDING, torch.cuda.device(self.device):
            side, current = _side_stream(self.device), torch.cuda.current_stream()
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    yield
            finally:
                current.wait_stream(side)

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        # Not `torch.cuda.graph`, which gives all cached memory back first: a training would have to ask for it again, each time.
        # Only what this thread does is recorded: others (loaders, NCCL's) may go on.
        self.graph.capture_begin(capture_error_mode="thread_local")
        try:
            try:
                return function()
            finally:
                self.graph.capture_end()
        except RuntimeError:
            # Some versions of torch leave their generator as if the recording still went on: it would refuse to draw.
            numbers = torch.cuda.default_generators[torch.cuda.current_device()]
            numbers.graphsafe_set_state(numbers.clone_state())
            raise

    def replay(self) -> None:
        self.graph.replay()


_RECORDING = threading.Lock()
RECORDERS: dict[str, type[Recorder]] = {"cuda": CudaRecorder}  # by type of device


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings on a device: cuBLAS keeps megabytes for each stream that it has seen."""
    return torch.cuda.Stream(device)


class RecordedStep:
    """Codes [B, K] to logits [B, K, V], as `decoder.logits(decoder.step(codes))`, from its first step on.

    Args:
        decoder: it becomes static, and is this object's from now on.
        codes: [B, K], any: their shape, dtype and device.

    Raises:
        RuntimeError: a layer that cannot be recorded (it waits for the GPU, say).
    """

    def __init__(self, decoder: StepDecoder, codes: Tensor):
        self.codes = inputs = torch.zeros_like(codes)
        self.recorder = RECORDERS[codes.device.type](codes.device)
        decoder.restart(static=True)

        def step() -> Tensor:
            return decoder.logits(
                decoder.step(inputs)
            )  # without self: a cycle would keep the memory until garbage is collected

        self.step = step  # keeps alive what the recording reads and writes
        with self.recorder.aside():
            for _ in range(_WARM_UPS):
                step()
                decoder.rewind()  # each time: there may be room for fewer steps than that
            self.logits = self.recorder.record(step)
            decoder.rewind()

    def __call__(self, codes: Tensor) -> Tensor:
        """The logits are overwritten by the next call."""
        self.codes.copy_(codes)
        self.recorder.replay()
        return self.logits


def check_graph(cuda_graph: bool | None, device: torch.device) -> None:
    """ValueError where a graph is asked for on a device that has none."""
    if cuda_graph and device.type not in RECORDERS:
        raise ValueError(
            f"`cuda_graph` = {cuda_graph!r} needs the generator on a CUDA device, and it is on {str(device)!r}; move it "
            "there, or leave `cuda_graph` out."
        )


def next_logits(decoder: StepDecoder, codes: Tensor, cuda_graph: bool | None) -> Callable[[Tensor], Tensor]:
    """What turns the codes [B, K] of a step into the logits [B, K, V] of the next one, which its next call may overwrite.

    Args:
        decoder: at its first step.
        codes: [B, K], any: their shape, dtype and device.
        cuda_graph: record a graph? None: on CUDA, where enough steps are drawn. Where a layer cannot be recorded, a warning
            says so, and the steps are run one by one.
    """
    if cuda_graph is None:
        cuda_graph = codes.device.type in RECORDERS and decoder.steps >= _WORTH_IT_FROM
    if cuda_graph:
        try:
            return RecordedStep(decoder, codes)
        except RuntimeError as error:
            reason = (str(error.__context__ or error).splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"A step of this generator cannot be recorded as a CUDA graph ({reason}); its steps are launched one by "
                "one, which is slower. `cuda_graph=False` does so without this warning.",
                stacklevel=2,
            )
            decoder.restart()
    return lambda codes: decoder.logits(decoder.step(codes))
