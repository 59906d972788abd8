"""What lies at a place: which kind of artifact it is, what it says, whether it is whole."""
