"""What operators see: health pages, metrics and logs."""

from embedq_consumer.telemetry.health import Health, HealthServer
from embedq_consumer.telemetry.metrics import Metrics

__all__ = ["Health", "HealthServer", "Metrics"]
