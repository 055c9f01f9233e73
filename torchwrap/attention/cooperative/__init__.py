"""Keys and values in two memories, attended where they lie: a host beside a device."""
