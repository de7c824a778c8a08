"""What a run leaves behind: folders, logs, videos, curves and reports."""

from __future__ import annotations

from prelar_trl.record.logger import Logger, check_backends
from prelar_trl.record.plots import (
    plot_bars,
    plot_curves,
    plot_psnr_by_step,
    plot_scatter,
    read_metrics,
)
from prelar_trl.record.progress import Progress
from prelar_trl.record.quality import psnr, ssim
from prelar_trl.record.report import html_report
from prelar_trl.record.run import RunFolder, check_space
from prelar_trl.record.statistics import bootstrap_interval, interquartile_mean, wilson_interval
from prelar_trl.record.video import (
    contact_sheet,
    film_rows,
    film_strip,
    read_video,
    to_uint8,
    video_grid,
    write_picture,
    write_video,
)

__all__ = [
    "Logger",
    "Progress",
    "RunFolder",
    "bootstrap_interval",
    "check_backends",
    "check_space",
    "contact_sheet",
    "film_rows",
    "film_strip",
    "html_report",
    "interquartile_mean",
    "plot_bars",
    "plot_curves",
    "plot_psnr_by_step",
    "plot_scatter",
    "psnr",
    "read_metrics",
    "read_video",
    "ssim",
    "to_uint8",
    "video_grid",
    "wilson_interval",
    "write_picture",
    "write_video",
]
