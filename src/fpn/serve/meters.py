"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Meters:
    """The meters of one server, in a registry of their own: a process may have several servers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("fpn_requests", "Requests answered", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "fpn_request_seconds", "From a request for detections to its answer", buckets=SECONDS, registry=registry
        )
        self.images = Histogram(
            "fpn_batch_images", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.batches = Histogram(
            "fpn_batch_seconds", "A batch through the detector", buckets=SECONDS, registry=registry
        )
        self.objects = Counter("fpn_detections", "Detections given out", ["name"], registry=registry)
        self.waiting = Gauge("fpn_waiting", "Requests on their way to detections", registry=registry)
        self.memory = Gauge("fpn_held_bytes", "Memory held for what clients have sent", registry=registry)

    def batch(self, images: int, seconds: float) -> None:
        self.images.observe(images)
        self.batches.observe(seconds)

    def page(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
