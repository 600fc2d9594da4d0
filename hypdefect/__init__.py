"""Few-shot and anomaly inspection in hyperbolic space, on Ray."""

__version__ = "0.1.0"
