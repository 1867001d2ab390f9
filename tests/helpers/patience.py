"""How long a test waits for what should end by itself, on the busiest machine."""

HANGS = 1800  # seconds: only what hangs takes so long, so no slow machine fails by it
