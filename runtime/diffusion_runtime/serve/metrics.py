"""What /metrics tells: requests, queue, seconds of stages and steps, models loaded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
MEDIA_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Of one server: its own registry, so that several in one process do not add up."""

    def __init__(self) -> None:
        def name(text: str) -> str:
            return f"coreml_sd_{text}"

        self.registry = own = CollectorRegistry()
        self.requests = Counter(name("requests"), "Requests, by path and status.", ["path", "status"], registry=own)
        self.waiting = Gauge(name("queue"), "Requests that wait for a worker.", registry=own)
        self.loaded = Gauge(name("models_loaded"), "1 where the models are loaded.", ["model"], registry=own)
        self.stages = Histogram(
            name("stage_seconds"),
            "Seconds of loading models (load), waiting (wait) and making an order (make).",
            ["model", "stage"],
            buckets=SECONDS,
            registry=own,
        )
        self.steps = Histogram(
            name("step_seconds"), "Seconds between denoising steps.", ["model"], buckets=SECONDS, registry=own
        )
        self.pictures = Counter(
            name("pictures"), "Pictures, by whether they were flagged.", ["flagged"], registry=own
        )
        self.deaths = Counter(name("worker_deaths"), "Workers that ended unasked.", ["model"], registry=own)

    def text(self) -> bytes:
        return generate_latest(self.registry)
