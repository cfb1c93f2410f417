"""Scheduling: resources, packets, and the choice of worker and node."""
