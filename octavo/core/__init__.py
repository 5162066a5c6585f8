"""The brain: requests, blocks and the scheduler. Plain Python; nothing here imports torch."""
