"""Prompts written by T5, captions by BLIP; optional, imported by the command line and by users only."""
