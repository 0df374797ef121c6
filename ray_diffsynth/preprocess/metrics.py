"""What a pool does, as Ray's metrics (Prometheus), reported by the driver: any dashboard of the cluster shows them."""

from ray.util.metrics import Counter, Gauge

from ray_diffsynth.preprocess.monitor_state import Counts
from ray_diffsynth.progress import RateWindow


class PoolMetrics:
    """The metrics of one group's pool, tagged `group`:

    ray_diffsynth_encoded_samples, ray_diffsynth_quarantined_samples and ray_diffsynth_cache_bytes (counters),
    ray_diffsynth_samples_per_second and ray_diffsynth_remaining_samples (gauges).
    """

    def __init__(self, group: str, total: int) -> None:
        self._total = total
        self._before = Counts()
        self._window = RateWindow()
        tags = {"group": group}
        self._encoded = Counter("ray_diffsynth_encoded_samples", "Samples written to the cache", ("group",))
        self._failed = Counter("ray_diffsynth_quarantined_samples", "Samples that could not be encoded", ("group",))
        self._bytes = Counter("ray_diffsynth_cache_bytes", "Bytes written to the cache", ("group",))
        self._rate = Gauge("ray_diffsynth_samples_per_second", "Encoding rate over the last minute", ("group",))
        self._remaining = Gauge("ray_diffsynth_remaining_samples", "Samples still to be encoded", ("group",))
        for metric in (self._encoded, self._failed, self._bytes, self._rate, self._remaining):
            metric.set_default_tags(tags)

    def update(self, counts: Counts) -> float:
        """Report the counts so far; returns samples a second over about the last minute."""
        for metric, now, before in zip(
            (self._encoded, self._failed, self._bytes), counts[:3], self._before[:3], strict=True
        ):
            if now > before:
                metric.inc(now - before)
        self._before = counts
        done = counts.written + counts.failed
        self._window.add(done)
        self._rate.set(self._window.rate)
        self._remaining.set(max(self._total - done, 0))
        return self._window.rate
