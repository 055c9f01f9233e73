"""The contract: what must hold for every technique on every model, whatever the technique does.

`cases.py` lists the techniques; one line there gives a technique the whole suite.
"""
