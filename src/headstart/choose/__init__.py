"""What a person decides with: estimates, advice, and fair comparisons."""
