"""Measurements of this library against torch and numpy."""
