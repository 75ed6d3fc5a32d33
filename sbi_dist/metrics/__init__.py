"""Metrics: the one catalogue of their names, and how processes of a Ray cluster export them.

A metric is exported on the metrics port of the node it is set on, in Prometheus' text format, with
Ray's prefix: ``sbi_train_loss`` is scraped as ``ray_sbi_train_loss``. Ray needs the packages of
``ray[default]`` for that port. In a process that is not connected to Ray nothing is exported, yet
names and labels are checked all the same.

Ray sends values to the port every ten seconds. It forgets a gauge that was not set again for about
twenty, so gauges are to be set on a timer; a value that is not finite is not exported. A counter is
there from its first increment on. What a process set last is sent as it ends in order, not as it is
killed.
"""

from sbi_dist.metrics.catalogue import CATALOGUE, Metric
from sbi_dist.metrics.export import add, observe, set_gauge

__all__ = ["CATALOGUE", "Metric", "add", "observe", "set_gauge"]
