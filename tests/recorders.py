"""What stands for a CUDA graph where there is no CUDA."""

from contextlib import nullcontext


class Again:
    """A recorder for the CPU: it runs the function again, into the same output."""

    def __init__(self, device):
        self.replays = 0

    def aside(self):
        return nullcontext()

    def record(self, function):
        self.function, self.output = function, function()
        return self.output

    def replay(self):
        self.replays += 1
        self.output.copy_(self.function())
