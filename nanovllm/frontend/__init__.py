"""What comes in and what goes out: prompts, conversations, callers, threads and text.

The engine is above this folder and uses it, so nothing here imports the engine. A first reader need
not open it.
"""
