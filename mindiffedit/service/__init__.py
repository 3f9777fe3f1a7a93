"""What runs on and on around one model: the page in a browser, and what it shares with others of its kind."""
