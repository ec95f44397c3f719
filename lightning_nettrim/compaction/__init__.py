"""Compaction: networks without the units that no layer reads, and their files."""

from lightning_nettrim.compaction.compact import CompactionReport, CompactResult, compact, report_compaction
from lightning_nettrim.compaction.files import load_compact, save_without_channels

__all__ = ["CompactionReport", "CompactResult", "compact", "load_compact", "report_compaction", "save_without_channels"]
