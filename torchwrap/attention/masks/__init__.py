"""What each query sees: masks as rules that are evaluated tile by tile, how they are made, and how they pass for tensors."""
