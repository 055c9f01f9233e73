"""Loaded by Python at start-up where this folder is on PYTHONPATH: command-line programs then run beside a torchvision that the CPU
build of torch cannot load, exactly as the tests do (see tests/torchvision_ops.py)."""

from tests import torchvision_ops

torchvision_ops.ensure()
