"""Starting, profiling and measuring runs."""

import tasks  # noqa: F401  which checks that all five packages are ours
