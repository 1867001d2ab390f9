"""What `course bench` can measure: reference workloads, attention alone, and a comparison."""
