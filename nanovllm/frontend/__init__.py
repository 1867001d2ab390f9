"""Prepare what users pass to `LLM`, such as conversations. A first reader need not open this."""
