"""What a run takes, told beforehand."""
