"""Parts shared by the benchmarks and the memory tests: limited children, checkpoints, disk probes, contenders, statistics."""
