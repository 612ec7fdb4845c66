"""Settings by their dotted names: set, refused, explained."""
