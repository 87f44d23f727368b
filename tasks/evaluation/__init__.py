"""What evaluation keeps beside its numbers, and how it is compared."""
