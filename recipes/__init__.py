"""Scripts that train, evaluate and report: one for each phase."""
