"""What the documentation says is true: every Python block and docstring example runs, every public name is documented."""
