"""Answers about a running program: which requests wait, how long requests took, which file blocks a hub."""
