"""One HTML page that shows what a training run did."""

from dydit_scale.report.page import write_report

__all__ = ["write_report"]
