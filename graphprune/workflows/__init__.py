"""Whole ways and whole answers: pipelines, gradual pruning, reports, diagnosis, sensitivity."""
