"""The editor for others than one command: a page, a server, a batch."""
