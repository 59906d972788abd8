"""What a recovery takes, told beforehand: sums of the costs that operators and criteria say themselves."""
