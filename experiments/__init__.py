"""What takes an hour and ships: the scripts behind bundled/, beside the library."""
