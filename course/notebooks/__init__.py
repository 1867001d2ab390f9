"""How the course's notebooks are built from their sources, run, checked and looked at."""
