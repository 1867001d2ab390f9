"""How a source file becomes a notebook: a lesson, its exercises, or their solutions."""
