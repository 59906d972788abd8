"""One page that compares runs: read from what they left, drawn, and put together."""
