"""What a run leaves behind: folders, logs, videos, curves and reports."""

from __future__ import annotations

from prelar_trl.record.comparison import SUMMARY, Comparison, MethodStyle, write_comparison
from prelar_trl.record.comparison_plots import (
    Band,
    Dots,
    plot_estimates,
    plot_learning_curves,
    plot_profiles,
    plot_steps_to_threshold,
)
from prelar_trl.record.learning_curves import EvaluatedRun, write_learning_curves
from prelar_trl.record.logger import Logger, check_backends
from prelar_trl.record.plots import (
    COLORS,
    Series,
    plot_bars,
    plot_curves,
    plot_psnr_by_step,
    plot_scatter,
    read_metrics,
)
from prelar_trl.record.progress import Progress
from prelar_trl.record.quality import psnr, ssim
from prelar_trl.record.report import curves_page, html_report
from prelar_trl.record.run import RunFolder, check_space
from prelar_trl.record.runs import read_reference, read_runs
from prelar_trl.record.statistics import (
    Estimate,
    aggregate_curve,
    bootstrap_band,
    bootstrap_interval,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    ratio_of_means,
    steps_to_threshold,
    wilson_interval,
)
from prelar_trl.record.table import write_csv
from prelar_trl.record.video import (
    contact_sheet,
    film_rows,
    frame_strip,
    read_video,
    to_uint8,
    video_grid,
    write_picture,
    write_video,
)

__all__ = [
    "Band",
    "COLORS",
    "Comparison",
    "Dots",
    "Estimate",
    "EvaluatedRun",
    "Logger",
    "MethodStyle",
    "Progress",
    "RunFolder",
    "SUMMARY",
    "Series",
    "aggregate_curve",
    "bootstrap_band",
    "bootstrap_interval",
    "check_backends",
    "check_space",
    "contact_sheet",
    "curves_page",
    "film_rows",
    "frame_strip",
    "html_report",
    "interquartile_mean",
    "performance_profile",
    "plot_bars",
    "plot_curves",
    "plot_estimates",
    "plot_learning_curves",
    "plot_profiles",
    "plot_psnr_by_step",
    "plot_scatter",
    "plot_steps_to_threshold",
    "probability_of_improvement",
    "psnr",
    "ratio_of_means",
    "read_metrics",
    "read_reference",
    "read_runs",
    "read_video",
    "ssim",
    "steps_to_threshold",
    "to_uint8",
    "video_grid",
    "wilson_interval",
    "write_comparison",
    "write_csv",
    "write_learning_curves",
    "write_picture",
    "write_video",
]
