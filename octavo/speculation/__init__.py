"""Drafters: who guesses the next tokens. Verification is the model runner's, and the same for all."""
