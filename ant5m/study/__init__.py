"""Controlled experiments: several models, the same text, tokens and evaluation, n seeds, and what follows."""
