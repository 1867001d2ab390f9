"""What the lessons share and the engine must not know: models to run, checks, the command line."""
