"""The test suite. A package, so that `tests.models` never means a folder of the same name that some distribution installed."""
