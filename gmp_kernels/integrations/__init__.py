"""Pruning inside the trainers that people already have; the callbacks need the package they are named after."""
