"""Weights of other frameworks: reads their files, and maps their names, layouts and conventions to ours."""
