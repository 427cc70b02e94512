"""Measurements against torch and numpy."""
