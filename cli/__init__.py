"""`satune`, the command line: an HTTP client of the service, and `up`, which starts it."""
