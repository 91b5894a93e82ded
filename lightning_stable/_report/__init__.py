"""Reads the files of runs, draws them, and writes one page of them; imports neither torch nor lightning."""
