"""Real processes, signals and disks. A test leaves no process, descriptor or memory behind."""
