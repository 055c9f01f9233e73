"""Benchmarks that need one CUDA card; everything here collects and skips without."""
