"""Manifests: rows, read from wherever they are, checked and made Samples."""
