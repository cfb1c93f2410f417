"""Tasks: the life cycle of a call, from submission to result or failure."""
