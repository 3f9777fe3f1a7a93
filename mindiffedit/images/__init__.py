"""Pictures: read, converted, laid out, written."""
