"""The command line, run in this process through `main` and, where processes matter, from outside."""
