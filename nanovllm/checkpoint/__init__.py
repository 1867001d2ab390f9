"""Find, read and check the files of a model."""
