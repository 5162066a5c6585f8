"""The OpenAI-compatible server: a front end that imports no torch, before an engine of its own process."""
