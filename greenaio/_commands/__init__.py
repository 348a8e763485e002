"""The commands of ``python -m greenaio``, and how they print."""
