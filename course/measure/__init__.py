"""How fast and how large: timings, rooflines, the workloads, and what this machine can do."""
