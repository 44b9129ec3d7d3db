"""Starting, profiling and measuring runs."""
