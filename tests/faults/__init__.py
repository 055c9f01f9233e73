"""Faults of disks, files, users and processes, injected on purpose: the result is right, or the error is typed; never a wrong number."""
