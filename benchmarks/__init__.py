"""Benchmarks: one question per file, figures as JSON."""
