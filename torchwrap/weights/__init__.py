"""A model whose weights are not all in memory: where they lie, how modules get them, and what becomes of copies, moves and state dicts."""
