"""What evaluation keeps in addition to its numbers, and how it is compared."""
