"""What a run leaves behind: folders, logs, videos, curves and reports."""
