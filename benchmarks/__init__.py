"""Measurements of the project, one script each."""
