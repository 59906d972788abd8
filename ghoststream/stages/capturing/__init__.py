"""Hidden states and taps of a text, written to stores."""
