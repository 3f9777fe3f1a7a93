"""Random numbers: the streams of PyTorch, and the one door through which all are drawn."""
