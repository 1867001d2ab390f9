"""The commands of `course`, one file each; `course bench` has its benchmarks in benchmarks/."""
