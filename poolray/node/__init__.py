"""The node machine: tasks, objects and workers of one machine, wired together."""
