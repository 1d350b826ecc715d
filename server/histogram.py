"""A histogram for values that come with every token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenHistogram(Collector):
    """As `prometheus_client.Histogram` with one set of labels, and cheaper: several equal values cost what one
    does, and no lock is taken. It belongs to the thread of the event loop, on which it is scraped, too.
    """

    def __init__(
        self,
        name: str,
        text: str,
        labels: dict[str, str],
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        """buckets: upper bounds, ascending, without infinity."""
        self._name = name
        self._text = text
        self._labels = labels
        self._bounds = [float(bound) for bound in buckets]
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, count: int = 1) -> None:
        """Add `count` values that are `value`."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=[*self._labels])
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = [*zip(names, accumulate(self._counts), strict=True)]
        family.add_metric([*self._labels.values()], buckets, self._sum)
        return [family]
