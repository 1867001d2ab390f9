"""The files of a model: find them, read them, and refuse what does not fit."""
