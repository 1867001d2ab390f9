"""The models that lessons run: which one to choose, and how each comes to be on disk."""
