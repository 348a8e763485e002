"""Open files, names and devices, and which way an operation on them takes so that the hub never waits."""
