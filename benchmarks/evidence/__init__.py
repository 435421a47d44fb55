"""The method's claims, each measured beside its controls: ``python -m benchmarks.evidence OUT``."""
