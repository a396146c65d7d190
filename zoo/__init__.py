"""Weights of other systems: their files, and how their names, layouts and conventions map to ours."""
