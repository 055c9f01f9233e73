"""Benchmarks: what the library costs and gains, beside its rivals, in the same run.

`python -m benchmarks` runs the offload benchmarks and writes docs/results/; the `test_*.py` files run the same code under
pytest-benchmark. Nothing here is collected by `make test`, and no time is asserted: bars live in targets.toml.
"""
