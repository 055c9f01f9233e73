"""What is shipped: the wheel, its imports, and the rules of the house that a reader of the tree relies on."""
