"""The experiments of claims.py, one a file."""
