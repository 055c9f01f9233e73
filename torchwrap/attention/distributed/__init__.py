"""Attention over several processes: heads divided among them, or the sequence."""
