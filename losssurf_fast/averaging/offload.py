"""Copies of weights in pinned host memory, made while the device goes on computing."""

import torch


def leaves_device(values: list[torch.Tensor]) -> bool:
    """Whether a copy to the host of these tensors can overlap with their device's work."""
    return any(v.is_cuda for v in values)


class Staging:
    """Host tensors like ``tensors``, and the streams that fill them.

    ``fetch`` returns at once. The device's current stream waits for the copy before it may change the tensors again,
    so the next optimizer step is safe; the host waits in ``wait``, before it reads ``host``.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        pin = torch.cuda.is_available()
        self.host = [torch.empty_like(t, device="cpu", pin_memory=pin) for t in tensors]
        self._streams = {d: torch.cuda.Stream(d) for d in {t.device for t in tensors} if d.type == "cuda"}
        self._copied: list[torch.cuda.Event] = []

    def fits(self, tensors: list[torch.Tensor]) -> bool:
        return len(self.host) == len(tensors) and all(
            h.shape == t.shape and h.dtype == t.dtype and (t.device.type != "cuda" or t.device in self._streams)
            for h, t in zip(self.host, tensors, strict=True)
        )

    def fetch(self, tensors: list[torch.Tensor]) -> None:
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        for host, tensor in zip(self.host, tensors, strict=True):
            with torch.cuda.stream(self._streams.get(tensor.device)):  # None: the tensor is on the host already
                host.copy_(tensor, non_blocking=True)
        self._copied = [stream.record_event() for stream in self._streams.values()]
        for device, event in zip(self._streams, self._copied, strict=True):
            torch.cuda.current_stream(device).wait_event(event)

    def wait(self) -> None:
        for event in self._copied:
            event.synchronize()
