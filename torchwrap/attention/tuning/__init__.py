"""Which back end is fastest for which kind of call: the table that is shipped, and what was measured on this machine."""
