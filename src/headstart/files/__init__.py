"""What is written and read: PEFT's format, both ways, strictly and atomically."""
