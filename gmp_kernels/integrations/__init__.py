"""Pruning inside the trainers that people already have; each module needs the package it is named after."""
