"""What stands between a user's call and the engine, and what a first reader need not open."""
