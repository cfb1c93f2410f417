"""Machines fed with events, effects compared. No process, no thread, milliseconds."""
