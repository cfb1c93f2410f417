"""The head machine: what a cluster must agree on, decided without I/O."""
