"""Text, and what a model makes of it block by block."""
