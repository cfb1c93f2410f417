"""The in-process shell: forked workers, channels, the reactor that drives the node machine."""
