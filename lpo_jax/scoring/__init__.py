"""Scores of images by outside judges, and how often one model beats another."""
